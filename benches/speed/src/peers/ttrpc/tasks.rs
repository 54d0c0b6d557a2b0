//! ttrpc on tokio.

use std::collections::HashMap;
use std::path::Path;

use tokio::runtime::{Builder, Runtime};
use ttrpc::asynchronous::{Client, MethodHandler, Server, Service, TtrpcContext};
use ttrpc::proto::{Request, Response};

use super::{CUT, ECHO, SERVICE, answer, check, free_port, request};
use crate::Failure;
use crate::peers::Source;
use crate::shape::Shape;

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
    let tcp = format!("127.0.0.1:{}", free_port()?);
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    let mut servers = Vec::new();
    for address in [format!("tcp://{tcp}"), format!("unix://{}", path.display())] {
        let mut server = Server::new().bind(&address)?.register_service(service());
        runtime.block_on(server.start())?;
        servers.push(server);
    }
    crate::peers::listening(&tcp, path)
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
        let client = runtime.block_on(Client::connect(address))?;
        Ok(Self { runtime, client, source: Source::default() })
    }
}

impl crate::peers::Caller for Caller {
    fn call(&mut self, shape: Shape) -> Result<(), Failure> {
        let response = self.runtime.block_on(self.client.request(request(shape, &mut self.source)))?;
        check(&response, shape)
    }
}
