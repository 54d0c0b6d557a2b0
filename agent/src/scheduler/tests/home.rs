//! Models with a thread of their own.

use std::sync::atomic::AtomicBool;
use std::thread::{self, ThreadId};

use super::*;
use crate::onward::Listener;
use std::task::Waker;

/// A thread that takes one work at a time.
struct OneThread {
    id: ThreadId,
    works: mpsc::SyncSender<Errand>,
    is_taken: Arc<AtomicBool>,
    expected: AtomicUsize,
}

impl Home for OneThread {
    fn reserve(&self) -> bool {
        !self.is_taken.swap(true, Ordering::SeqCst)
    }

    fn give(&self, work: Errand) {
        self.works.send(work).expect("the thread is there");
    }

    fn expect(&self, _: Listener) {
        self.expected.fetch_add(1, Ordering::SeqCst);
    }
}

/// A model that has a thread, tells where each run begins, and ends it when it is told to.
struct Housed {
    home: Arc<OneThread>,
    begun: mpsc::Sender<ThreadId>,
    ends: Mutex<mpsc::Receiver<()>>,
}

impl Runner for Housed {
    fn run(&self, inputs: Vec<Tensor>, _: &[usize], _: u64, _: &Cancel) -> Result<Vec<Tensor>, Error> {
        self.begun.send(thread::current().id()).expect("the test waits");
        self.ends.lock().expect("not poisoned").recv().expect("the test ends it");
        Ok(inputs)
    }

    fn home(&self, _: &[Tensor]) -> Option<Arc<dyn Home>> {
        Some(Arc::clone(&self.home) as Arc<dyn Home>)
    }
}

struct Street {
    scheduler: Arc<Scheduler>,
    batcher: Arc<Batcher>,
    account: Arc<Account>,
    home: Arc<OneThread>,
    begun: mpsc::Receiver<ThreadId>,
    end: mpsc::Sender<()>,
}

fn street(lanes: usize) -> Street {
    let (works, queue) = mpsc::sync_channel::<Errand>(1);
    let is_taken = Arc::new(AtomicBool::new(false));
    let freed = Arc::clone(&is_taken);
    let thread = thread::spawn(move || {
        for work in queue {
            work();
            freed.store(false, Ordering::SeqCst);
        }
    });
    let id = thread.thread().id();
    let home = Arc::new(OneThread { id, works, is_taken, expected: AtomicUsize::new(0) });
    let ((tell, begun), (end, ends)) = (mpsc::channel(), mpsc::channel());
    let runner = Housed { home: Arc::clone(&home), begun: tell, ends: Mutex::new(ends) };
    let batcher = Arc::new(Batcher::new(Arc::new(runner), alone(2)));
    Street {
        scheduler: Arc::new(Scheduler::new(lanes).expect("threads")),
        batcher,
        account: account(),
        home,
        begun,
        end,
    }
}

impl Street {
    fn call(&self, time: Duration) -> tokio::task::JoinHandle<Result<Timed<Vec<Tensor>>, Error>> {
        let (scheduler, batcher) = (Arc::clone(&self.scheduler), Arc::clone(&self.batcher));
        let asker = within(&self.account, time);
        tokio::spawn(async move { scheduler.run_model(&asker, &batcher, call(&[1])).await })
    }

    /// On which thread a run begins.
    async fn begins(&self) -> ThreadId {
        loop {
            match self.begun.try_recv() {
                Ok(thread) => return thread,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }
}

const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn calls_one_at_a_time_run_on_the_models_thread_and_others_beside_it() {
    let street = street(2);
    for _ in 0..3 {
        let first = street.call(LONG);
        assert_eq!(street.begins().await, street.home.id);
        let second = street.call(LONG);
        assert_ne!(street.begins().await, street.home.id, "which has something to do");
        for _ in 0..2 {
            street.end.send(()).expect("both run");
        }
        first.await.expect("no panic").expect("served");
        second.await.expect("no panic").expect("served");
        while street.home.is_taken.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn whoever_worked_last_is_told_of_what_is_about_to_come() {
    let street = street(1);
    let expected = || {
        street.scheduler.expect(Listener::new(Waker::noop()));
        street.home.expected.load(Ordering::SeqCst)
    };
    assert_eq!(expected(), 0);
    let first = street.call(LONG);
    assert_eq!(street.begins().await, street.home.id);
    assert_eq!(expected(), 1);
    street.end.send(()).expect("it runs");
    first.await.expect("no panic").expect("served");
    assert_eq!(expected(), 2);
    street.scheduler.run(&asker(&street.account), |_| Ok(())).await.expect("served");
    assert_eq!(expected(), 2, "a lane was the last");
}

#[tokio::test]
async fn the_models_thread_is_one_of_the_lanes() {
    let street = street(1);
    let first = street.call(LONG);
    assert_eq!(street.begins().await, street.home.id);
    let (scheduler, asker) = (Arc::clone(&street.scheduler), asker(&street.account));
    let next = tokio::spawn(async move { scheduler.run(&asker, |_| Ok(thread::current().id())).await });
    while street.scheduler.lanes.at_work().0 == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(street.scheduler.lanes.at_work(), (1, 1), "it waits");
    street.end.send(()).expect("it runs");
    first.await.expect("no panic").expect("served");
    assert_ne!(next.await.expect("no panic").expect("served").value, street.home.id);
}

#[tokio::test]
async fn a_caller_that_leaves_frees_the_lane_and_the_thread_goes_on() {
    let street = street(1);
    let late = street.call(Duration::from_millis(20));
    assert_eq!(street.begins().await, street.home.id);
    let refusal = late.await.expect("no panic").expect_err("it takes too long");
    assert_eq!(refusal.reason(), Reason::Deadline);
    let others = street.scheduler.run(&asker(&street.account), |_| Ok(())).await;
    others.expect("the lane is free");
    assert_eq!(street.account.used(Unit::AbandonedRuns), 1);
    let second = street.call(LONG);
    assert_ne!(street.begins().await, street.home.id, "which has not ended");
    for _ in 0..2 {
        street.end.send(()).expect("both run");
    }
    second.await.expect("no panic").expect("served");
    // Whoever is answered may know before the lane that it is free.
    while street.scheduler.lanes.at_work() != (0, 0) || street.home.is_taken.load(Ordering::SeqCst) {
        tokio::task::yield_now().await;
    }
    assert_eq!(street.account.used(Unit::AbandonedRuns), 0);
    let third = street.call(LONG);
    assert_eq!(street.begins().await, street.home.id);
    street.end.send(()).expect("it runs");
    third.await.expect("no panic").expect("served");
}
