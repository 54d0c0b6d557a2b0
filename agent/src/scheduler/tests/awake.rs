//! Lanes that listen to a task, awake.

use std::future::poll_fn;
use std::task::{Poll, Waker};

use tokio::sync::mpsc::{Receiver, channel};
use tokio::time::timeout;

use super::*;
use crate::onward::{self, Listener};

/// What a connection's task does: it waits for calls, and has them computed. It sees them only on a thread that is
/// awake for it, which one of the runtime's never is.
struct Connection {
    calls: Arc<AtomicUsize>,
    waker: Waker,
    served: Receiver<()>,
}

async fn connection(scheduler: &Arc<Scheduler>) -> Connection {
    let ((wait, mut waits), (serve, served)) = (channel(1), channel(4));
    let (scheduler, calls) = (Arc::clone(scheduler), Arc::new(AtomicUsize::new(0)));
    let come = Arc::clone(&calls);
    tokio::spawn(onward::task(async move {
        let account = account();
        loop {
            let reads = poll_fn(|context| {
                let one = |calls: usize| calls.checked_sub(1).filter(|_| onward::is_awake());
                if come.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one).is_ok() {
                    return Poll::Ready(());
                }
                // The test takes the first.
                let _ = wait.try_send(context.waker().clone());
                Poll::Pending
            });
            reads.await;
            scheduler.run(&asker(&account), |_| Ok(())).await.expect("served");
            // Nobody is left to be told when the test is over.
            let _ = serve.try_send(());
        }
    }));
    Connection { calls, waker: waits.recv().await.expect("it waits"), served }
}

impl Connection {
    /// Gives news of it until a call of it is served: a lane that has just worked may not be idle yet.
    async fn serve(&mut self, scheduler: &Scheduler) {
        loop {
            scheduler.expect(Listener::new(&self.waker));
            if let Ok(served) = timeout(Duration::from_millis(5), self.served.recv()).await {
                return served.expect("it goes on");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_lane_that_has_news_reads_the_call_itself_and_stays_for_the_next() {
    let scheduler = Arc::new(Scheduler::new(1).expect("threads"));
    let mut connection = connection(&scheduler).await;
    // On a busy machine it may come too late to stay, but not always.
    for _ in 0..100 {
        for calls in [1, 2] {
            connection.calls.fetch_add(calls, Ordering::SeqCst);
            connection.serve(&scheduler).await;
        }
        // The second came soon after the first.
        let third = timeout(Duration::from_millis(100), connection.served.recv());
        if third.await.is_ok() {
            return;
        }
        connection.serve(&scheduler).await;
    }
    panic!("a lane never stays");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_lane_that_listens_is_there_for_whoever_comes() {
    let scheduler = Arc::new(Scheduler::new(1).expect("threads"));
    let (look, mut looks) = channel(1);
    tokio::spawn(onward::task(poll_fn(move |context| {
        let _ = look.try_send((onward::is_awake(), context.waker().clone()));
        Poll::<()>::Pending
    })));
    let (_, waker) = looks.recv().await.expect("it waits");
    for _ in 0..20 {
        while !matches!(looks.try_recv(), Ok((true, _))) {
            scheduler.expect(Listener::new(&waker));
            tokio::task::yield_now().await;
        }
        // It looks still, or has gone to rest by now.
        scheduler.run(&asker(&account()), |_| Ok(())).await.expect("served");
    }
}
