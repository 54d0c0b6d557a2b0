//! Staying awake for an answer that comes soon.
//!
//! A thread that slept for a few milliseconds takes its time to wake: the processor is in a deep sleep, or was given to
//! somebody else by the machine's own host, and a tenth of a millisecond goes by. Whoever computes on a device spins
//! until that is done, as its driver does; so that this is not lost again, one of the threads that answer calls stays
//! awake meanwhile. One for all calls: what wakes it carries all answers. Machines with few cores have no use for it.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Cores from which one can be spared.
const CORES_MIN: usize = 8;

/// How long a thread stays awake: what comes later is as good a tenth of a millisecond later still.
const TIME_MAX: Duration = Duration::from_millis(20);

/// Somebody is awake.
static IS_WATCHED: AtomicBool = AtomicBool::new(false);

struct Watch;

impl Watch {
    fn begin() -> Option<Self> {
        (!IS_WATCHED.swap(true, Ordering::AcqRel)).then_some(Self)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        IS_WATCHED.store(false, Ordering::Release);
    }
}

/// Whether this machine has a core to spare.
fn is_affordable() -> bool {
    static IS_AFFORDABLE: OnceLock<bool> = OnceLock::new();
    *IS_AFFORDABLE
        .get_or_init(|| std::thread::available_parallelism().is_ok_and(|cores| cores.get() >= CORES_MIN))
}

/// Waits for an answer, awake if it comes soon and nobody else is.
pub(super) async fn awake<F: Future>(comes_soon: bool, answer: F) -> F::Output {
    let watch = if comes_soon && is_affordable() { Watch::begin() } else { None };
    awake_for(TIME_MAX, watch, answer).await
}

async fn awake_for<F: Future>(time: Duration, mut watch: Option<Watch>, answer: F) -> F::Output {
    let (begun, mut answer) = (Instant::now(), pin!(answer));
    poll_fn(|context| {
        let polled = answer.as_mut().poll(context);
        if polled.is_pending() && watch.is_some() {
            if begun.elapsed() < time {
                context.waker().wake_by_ref();
            } else {
                watch = None;
            }
        }
        polled
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::task::Poll;

    #[tokio::test]
    async fn one_stays_awake_for_an_answer_and_not_for_long() {
        let is_there = Arc::new(AtomicBool::new(false));
        let mut answering = None;
        let unannounced = poll_fn(|_| {
            answering.get_or_insert_with(|| {
                let other = Arc::clone(&is_there);
                std::thread::spawn(move || other.store(true, Ordering::Release))
            });
            if is_there.load(Ordering::Acquire) { Poll::Ready(7) } else { Poll::Pending }
        });
        let watch = Watch::begin();
        assert!(watch.is_some() && Watch::begin().is_none(), "one is enough");
        assert_eq!(awake_for(Duration::from_secs(60), watch, unannounced).await, 7);

        let (sender, answer) = tokio::sync::oneshot::channel();
        let sending = async {
            tokio::task::yield_now().await;
            assert!(Watch::begin().is_some(), "whoever waits for long sleeps");
            sender.send(7)
        };
        let (answer, sent) = tokio::join!(awake_for(Duration::ZERO, Watch::begin(), answer), sending);
        assert_eq!((answer, sent), (Ok(7), Ok(())));
    }
}
