//! Threads for work on files, apart from those that compute: a disk that does not answer takes no lane, and what models
//! leave in the allocator's arenas stays on few threads.

use std::sync::Arc;

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;
use vaccel_proto::{Error, Reason};

/// Threads at most: enough that one tenant with all its calls at the disk does not keep others from it. They come when
/// they are needed, and go.
const THREADS_MAX: usize = 128;

/// The threads. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Threads(Arc<Pool>);

/// A runtime for its threads alone; none when it is being dropped.
#[derive(Debug)]
struct Pool(Option<Runtime>);

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // Waiting is for nobody here: what is under way is found again by the next agent.
            runtime.shutdown_background();
        }
    }
}

impl Threads {
    pub(super) fn new() -> std::io::Result<Self> {
        let mut builder = Builder::new_current_thread();
        let runtime = builder.max_blocking_threads(THREADS_MAX).thread_name("store").build()?;
        Ok(Self(Arc::new(Pool(Some(runtime)))))
    }

    /// Starts work that may wait.
    pub(super) fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>, Error> {
        let runtime = self.0.0.as_ref();
        let runtime = runtime.ok_or_else(|| Error::new(Reason::ShuttingDown, "the agent is stopping"))?;
        Ok(runtime.spawn_blocking(work))
    }

    /// Runs work that may wait.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        ended(self.start(work)?.await)?
    }
}

/// The result of work, unless it panicked.
pub(super) fn ended<T>(outcome: Result<T, tokio::task::JoinError>) -> Result<T, Error> {
    let failed = |panic| Error::new(Reason::BackendFailed, "the agent's store failed").caused_by(panic);
    outcome.map_err(failed)
}
