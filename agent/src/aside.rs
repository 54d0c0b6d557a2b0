//! Work that takes its time, aside from the threads that answer: there it would hold up every other call.

use vaccel_proto::{Error, Reason};

/// Bytes that a thread which answers works through by itself. As JSON, the slowest of what is done with them, they take
/// a few milliseconds; to wake another thread for less would only add to it.
const AT_ONCE_BYTES_MAX: usize = 256 << 10;

/// Does what takes a time for each of so many bytes: at once if they are few, else on a thread of its own, to the end
/// even if nobody waits for it any more. What it has to have counted meanwhile, it takes along.
///
/// # Errors
/// Those of the work; `BACKEND_FAILED` when it panics.
pub(crate) async fn aside<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    if bytes <= AT_ONCE_BYTES_MAX { work() } else { on_a_thread(work).await }
}

/// The same for work that is never short.
///
/// # Errors
/// As [`aside`].
pub(crate) async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let failed = |error| Error::new(Reason::BackendFailed, "the work on the call failed").caused_by(error);
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}
