//! ttrpc on tokio.
//!
//! Its own TCP sockets do not know the setting that makes those of threads send at once; these are made as it says.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::Path;

use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::runtime::{Builder, Runtime};
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, MethodHandler, Server, Service, TtrpcContext};
use ttrpc::proto::{Request, Response};

use super::{CUT, ECHO, NODELAY, SERVICE, answer, check, request};
use crate::Failure;
use crate::peers::Source;
use crate::shape::Shape;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 128;

struct Method {
    is_echo: bool,
}

#[async_trait::async_trait]
impl MethodHandler for Method {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        answer(self.is_echo, &request.payload)
    }
}

pub(in crate::peers) fn serve(path: &Path) -> Result<(), Failure> {
    let method = |name: &str, is_echo| {
        let method: Box<dyn MethodHandler + Send + Sync> = Box::new(Method { is_echo });
        (name.to_owned(), method)
    };
    let service = || {
        let methods = HashMap::from([method(CUT, false), method(ECHO, true)]);
        HashMap::from([(SERVICE.to_owned(), Service { methods, streams: HashMap::new() })])
    };
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let tcp = listener()?;
        let address = tcp.local_addr()?.to_string();
        let unix = UnixListener::bind(path)?;
        let mut servers = [Listener::from(tcp), Listener::from(unix)]
            .map(|listener| Server::new().add_listener(listener).register_service(service()));
        for server in &mut servers {
            server.start().await?;
        }
        // The runtime's other threads serve meanwhile.
        crate::peers::listening(&address, path)
    })
}

/// A TCP socket that sends at once or not; what a listener accepts does as the listener.
fn socket() -> Result<TcpSocket, Failure> {
    let socket = TcpSocket::new_v4()?;
    socket.set_nodelay(std::env::var_os(NODELAY).is_some())?;
    Ok(socket)
}

fn listener() -> Result<TcpListener, Failure> {
    let socket = socket()?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    Ok(socket.listen(BACKLOG)?)
}

async fn connect(address: &str) -> Result<Client, Failure> {
    match address.strip_prefix("tcp://") {
        Some(address) => Ok(Client::new(Socket::from(socket()?.connect(address.parse()?).await?))),
        None => Ok(Client::connect(address).await?),
    }
}

/// A client that waits for each call, on its own thread.
pub(in crate::peers) struct Caller {
    runtime: Runtime,
    client: Client,
    source: Source,
}

impl Caller {
    pub(in crate::peers) fn new(address: &str) -> Result<Self, Failure> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(connect(address))?;
        Ok(Self { runtime, client, source: Source::default() })
    }
}

impl crate::peers::Caller for Caller {
    fn call(&mut self, shape: Shape) -> Result<(), Failure> {
        let response = self.runtime.block_on(self.client.request(request(shape, &mut self.source)))?;
        check(&response, shape)
    }
}
