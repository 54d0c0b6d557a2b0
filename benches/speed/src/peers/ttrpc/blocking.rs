//! ttrpc with threads.

use std::collections::HashMap;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use ttrpc::proto::Request;
use ttrpc::{Client, MethodHandler, Server, TtrpcContext};

use super::{CUT, ECHO, SERVICE, answer, check, request};
use crate::Failure;
use crate::peers::Source;
use crate::shape::Shape;

struct Method {
    is_echo: bool,
}

impl MethodHandler for Method {
    fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<()> {
        context.respond(context.mh.stream_id, answer(self.is_echo, &request.payload)?)
    }
}

/// A port that nobody has: ttrpc does not say which one it got.
fn free_port() -> Result<u16, Failure> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

pub(in crate::peers) fn serve(path: &Path) -> Result<(), Failure> {
    let method = |name: &str, is_echo| {
        let method: Box<dyn MethodHandler + Send + Sync> = Box::new(Method { is_echo });
        (format!("/{SERVICE}/{name}"), method)
    };
    let methods = || HashMap::from([method(CUT, false), method(ECHO, true)]);
    let tcp = format!("127.0.0.1:{}", free_port()?);
    let mut servers = Vec::new();
    for address in [format!("tcp://{tcp}"), format!("unix://{}", path.display())] {
        let mut server = Server::new().bind(&address)?.register_service(methods());
        server.start()?;
        servers.push(server);
    }
    crate::peers::listening(&tcp, path)
}

/// A client that waits for each call.
pub(in crate::peers) struct Caller {
    client: Client,
    source: Source,
}

impl Caller {
    pub(in crate::peers) fn new(address: &str) -> Result<Self, Failure> {
        Ok(Self { client: Client::connect(address)?, source: Source::default() })
    }
}

impl crate::peers::Caller for Caller {
    fn call(&mut self, shape: Shape) -> Result<(), Failure> {
        check(&self.client.request(request(shape, &mut self.source))?, shape)
    }
}
