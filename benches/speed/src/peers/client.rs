//! The async client.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use vaccel_client::{
    ArgType, Client, DType, Resource, ResourceFiles, Session, SessionOptions, Tensor, arg, named,
};

use super::guest::{EXEC, NOTHING, Way};
use super::{Source, model};
use crate::Failure;
use crate::shape::Shape;

/// Less is not put into shared memory by the client.
pub(super) const SHARED_BYTES_MIN: usize = 64 << 10;

/// A session.
struct Caller {
    session: Session,
    way: Way,
    models: HashMap<Shape, Resource>,
    source: Source,
}

impl Caller {
    async fn new(client: &Client, way: Way) -> Result<Self, Failure> {
        let session = client.open_session(SessionOptions::default()).await?;
        Ok(Self { session, way, models: HashMap::new(), source: Source::default() })
    }

    /// A run of a model that computes nothing: what comes back is the input, where it is.
    async fn pass(&mut self, shape: Shape) -> Result<(), Failure> {
        if self.source.0.len() != shape.up {
            let mut buffer = self.session.client().buffer(shape.up).await;
            if !buffer.is_shared() {
                return Err("the agent gives no memory".into());
            }
            buffer.fill(1);
            let in_place = buffer.freeze();
            let own = Bytes::copy_from_slice(&in_place);
            self.source.0 = if self.way == Way::InPlace { in_place } else { own };
        }
        let data = self.source.0.clone();
        let came = self.run(Shape { echo: true, ..shape }, data).await?;
        super::check(came, Shape { echo: true, ..shape })
    }

    /// Makes a call as the thin guest does.
    async fn call(&mut self, shape: Shape) -> Result<(), Failure> {
        if self.way != Way::Socket {
            return self.pass(shape).await;
        }
        let data = self.source.bytes(shape.up);
        let came = if shape.up == 0 {
            self.session.noop().await?;
            0
        } else if shape.echo {
            self.run(shape, data).await?
        } else {
            let before = arg(ArgType::Buffer, data.slice(..shape.down()));
            let read = vec![
                arg(ArgType::Uint8, vec![EXEC]),
                arg(ArgType::String, NOTHING),
                arg(ArgType::String, NOTHING),
                arg(ArgType::Buffer, data.slice(shape.down()..)),
            ];
            let (written, _) = self.session.genop(read, vec![before]).await?;
            written.iter().map(|arg| arg.data.len()).sum()
        };
        super::check(came, shape)
    }

    async fn run(&mut self, shape: Shape, data: Bytes) -> Result<usize, Failure> {
        let Self { session, models, .. } = self;
        let model = match models.get(&shape) {
            Some(model) => model,
            None => {
                let files = ResourceFiles::model("model.onnx", model::cut(shape));
                let model = session.register(files).await?;
                &*models.entry(shape).or_insert(model)
            }
        };
        let input = Tensor::from_bytes(DType::F32, &[model::elements(shape.up)], data);
        let run = session.run(model, vec![named("x", input)], &[]).await?;
        Ok(run
            .outputs
            .iter()
            .filter_map(|output| output.tensor.as_ref())
            .map(|tensor| tensor.data.len())
            .sum())
    }
}

/// A caller that waits for each call, on its own thread.
pub(super) struct Single {
    runtime: Runtime,
    caller: Caller,
}

impl Single {
    pub(super) fn new(address: &str, way: Way) -> Result<Self, Failure> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let caller = runtime.block_on(async { Caller::new(&connect(address, way).await?, way).await })?;
        Ok(Self { runtime, caller })
    }
}

impl super::Caller for Single {
    fn call(&mut self, shape: Shape) -> Result<(), Failure> {
        self.runtime.block_on(self.caller.call(shape))
    }
}

async fn connect(address: &str, way: Way) -> Result<Client, Failure> {
    let builder = Client::builder(address.parse()?);
    let builder = if way == Way::Socket { builder.shared_bytes(0) } else { builder };
    Ok(builder.connect().await?)
}

/// Callers that are tasks of one runtime of as many threads as there are cores, and share a client.
pub(super) struct Tasks {
    runtime: Runtime,
    callers: Vec<Caller>,
}

impl Tasks {
    pub(super) fn new(address: &str, way: Way, count: usize) -> Result<Self, Failure> {
        let runtime = Builder::new_multi_thread().enable_all().build()?;
        let client = runtime.block_on(connect(address, way))?;
        let caller = || runtime.block_on(Caller::new(&client, way));
        let callers = (0..count).map(|_| caller()).collect::<Result<_, _>>()?;
        Ok(Self { runtime, callers })
    }
}

impl super::Crowd for Tasks {
    fn call(&mut self, shape: Shape, calls: usize) -> Result<Duration, Failure> {
        let Self { runtime, callers } = self;
        runtime.block_on(async {
            let begun = Instant::now();
            let mut tasks = JoinSet::new();
            for mut caller in callers.drain(..) {
                tasks.spawn(async move {
                    for _ in 0..calls {
                        caller.call(shape).await?;
                    }
                    Ok::<_, Failure>(caller)
                });
            }
            while let Some(done) = tasks.join_next().await {
                callers.push(done??);
            }
            Ok(begun.elapsed())
        })
    }
}
