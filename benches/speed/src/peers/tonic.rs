//! tonic as it comes: its own transport with all defaults, but that messages may be longer than 4 MiB.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

use super::Source;
use crate::Failure;
use crate::contract::Payload;
use crate::contract::speed_client::SpeedClient;
use crate::contract::speed_server::{Speed, SpeedServer};
use crate::shape::{DOWN_BYTES_MAX, Shape};

/// Longest message on both sides.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

struct Service;

#[tonic::async_trait]
impl Speed for Service {
    async fn cut(&self, request: Request<Payload>) -> Result<Response<Payload>, Status> {
        let Payload { data } = request.into_inner();
        let data = data.slice(..data.len().min(DOWN_BYTES_MAX));
        Ok(Response::new(Payload { data }))
    }

    async fn echo(&self, request: Request<Payload>) -> Result<Response<Payload>, Status> {
        Ok(Response::new(request.into_inner()))
    }
}

fn service() -> SpeedServer<Service> {
    SpeedServer::new(Service).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

pub(super) fn serve(path: &Path) -> Result<(), Failure> {
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    let (tcp, path) = (bind(&runtime, path)?, path.to_owned());
    super::listening(&tcp, &path)
}

/// Serves on TCP and on a unix socket; the TCP address.
fn bind(runtime: &Runtime, path: &Path) -> Result<String, Failure> {
    let _guard = runtime.enter();
    // What tonic's own `serve` does with an address; only that this one says which port it got.
    let tcp = TcpIncoming::bind((Ipv4Addr::LOCALHOST, 0).into())?.with_nodelay(Some(true));
    let address = tcp.local_addr()?.to_string();
    let unix = UnixListenerStream::new(UnixListener::bind(PathBuf::from(path))?);
    runtime.spawn(Server::builder().add_service(service()).serve_with_incoming(tcp));
    runtime.spawn(Server::builder().add_service(service()).serve_with_incoming(unix));
    Ok(address)
}

/// A client that waits for each call, on its own thread.
pub(super) struct Caller {
    runtime: Runtime,
    client: SpeedClient<Channel>,
    source: Source,
}

impl Caller {
    pub(super) fn new(address: &str) -> Result<Self, Failure> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        // tonic knows unix sockets by their URI, and TCP by that of HTTP.
        let endpoint = Endpoint::from_shared(address.replace("tcp://", "http://"))?;
        let channel = runtime.block_on(endpoint.connect())?;
        let client = SpeedClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Ok(Self { runtime, client, source: Source::default() })
    }
}

impl super::Caller for Caller {
    fn call(&mut self, shape: Shape) -> Result<(), Failure> {
        let payload = Payload { data: self.source.bytes(shape.up) };
        let client = &mut self.client;
        let reply = self.runtime.block_on(async {
            if shape.echo { client.echo(payload).await } else { client.cut(payload).await }
        })?;
        super::check(reply.into_inner().data.len(), shape)
    }
}
