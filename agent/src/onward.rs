//! Tasks that go on where they are woken.
//!
//! A call is answered by its connection's task, which the runtime runs on a thread that has been asleep since the call
//! came. To wake that thread takes some 30 µs, or twice that on a virtual machine; to write the reply takes 5. So
//! the thread that computed it goes on with the task itself, if it has nothing better to do. And as it is awake, it
//! stays so for a little: who calls again at once is answered by this one thread, which nobody has to wake.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::task::unconstrained;

/// How long a thread that has news of a call stays awake: callers copy meanwhile, an image in a tenth of that.
const AWAKE: Duration = Duration::from_micros(500);

/// How long one stays awake behind its work, if that came as soon after the work before: an image is copied meanwhile,
/// or a short answer read on another machine nearby. As much is spent in vain whenever somebody stops calling.
const LINGER: Duration = Duration::from_micros(200);

thread_local! {
    /// Whether this thread would go on with a task.
    static IS_OFFERED: Cell<bool> = const { Cell::new(false) };
    /// Whether it goes on with a task that waits for its socket, again and again.
    static IS_AWAKE: Cell<bool> = const { Cell::new(false) };
    /// The first that was woken since.
    static WOKEN: RefCell<Option<Arc<dyn Resume>>> = const { RefCell::new(None) };
}

/// Makes a task of the runtime one that others may go on with.
pub(crate) fn task<F: Future<Output = ()> + Send + 'static>(future: F) -> impl Future<Output = ()> + Send {
    let (future, runtime) = (Mutex::new(Some(Box::pin(future))), Handle::current());
    Task(Arc::new(Shared { future, is_missed: AtomicBool::new(false), runtime, waker: Mutex::default() }))
}

/// Does what may wake a task, which is then gone on with here.
pub(crate) fn after<T>(work: impl FnOnce() -> T) -> (T, Onward) {
    IS_OFFERED.set(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    IS_OFFERED.set(false);
    // Whatever became of the work, the task is somebody's to go on with.
    let woken = Onward(WOKEN.take());
    match done {
        Ok(done) => (done, woken),
        Err(panic) => resume_unwind(panic),
    }
}

/// A task that waits for its socket, for a thread that has nothing else to do and waits with it, awake.
#[derive(Debug)]
pub(crate) struct Listener {
    waker: Waker,
    most: Duration,
}

impl Listener {
    /// By what wakes it, for one that is about to be called.
    pub(crate) fn new(waker: &Waker) -> Self {
        Self { waker: waker.clone(), most: AWAKE }
    }

    /// Goes on with it here, as if something had come, until `is_over`, or nothing came for long.
    pub(crate) fn listen(&self, is_over: impl Fn() -> bool) {
        let begun = Instant::now();
        let ((), mut woken) = after(|| self.waker.wake_by_ref());
        let Some(task) = woken.0.take() else { return };
        while !is_over() {
            IS_AWAKE.set(true);
            Arc::clone(&task).resume();
            IS_AWAKE.set(false);
            if begun.elapsed() >= self.most {
                return;
            }
            // Whoever waits for this processor goes first: it may be who calls.
            std::thread::yield_now();
        }
    }
}

/// How soon work comes to a thread, which stays awake for the next if the last did not take long to come.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    idle_since: Option<Instant>,
    is_quick: bool,
}

impl Pace {
    /// There is work.
    pub(crate) fn begin(&mut self) {
        self.is_quick = self.idle_since.is_some_and(|since| since.elapsed() < LINGER);
    }

    /// It is done, and this task went on: the thread is to listen to it, if it is returned.
    pub(crate) fn end(&mut self, task: Option<Listener>) -> Option<Listener> {
        self.idle_since = Some(Instant::now());
        task.filter(|_| self.is_quick)
    }
}

/// Whether a task is looked after by a thread that waits with it: it looks at its socket itself, as the runtime would
/// have to wake to see that something came.
pub(crate) fn is_awake() -> bool {
    IS_AWAKE.get()
}

/// A task that was woken. Dropped, it is the runtime's to go on with it.
pub(crate) struct Onward(Option<Arc<dyn Resume>>);

impl Onward {
    /// Goes on with it on this thread, which is none of the runtime's workers. Returns the task, if there was one.
    pub(crate) fn here(mut self) -> Option<Listener> {
        let task = self.0.take()?;
        let waker = Arc::clone(&task).waker();
        task.resume();
        Some(Listener { waker, most: LINGER })
    }
}

impl Drop for Onward {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.pass_on();
        }
    }
}

trait Resume {
    /// Goes on with the task here, unless somebody is at it.
    fn resume(self: Arc<Self>);

    /// Lets the runtime go on with it.
    fn pass_on(&self);

    /// What wakes it.
    fn waker(self: Arc<Self>) -> Waker;
}

/// What the runtime has of a task.
struct Task<F>(Arc<Shared<F>>);

struct Shared<F> {
    /// None once it is over.
    future: Mutex<Option<Pin<Box<F>>>>,
    /// The runtime came while somebody was at it, and did not wait.
    is_missed: AtomicBool,
    runtime: Handle,
    /// Wakes the runtime's.
    waker: Mutex<Option<Waker>>,
}

impl<F: Future<Output = ()> + Send + 'static> Shared<F> {
    /// The future, unless somebody is at it.
    fn free(&self) -> Option<MutexGuard<'_, Option<Pin<Box<F>>>>> {
        match self.future.try_lock() {
            Ok(future) => Some(future),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// What it is woken by keeps it: when it is over that ends.
    fn poll(self: &Arc<Self>, future: &mut Option<Pin<Box<F>>>) -> Poll<()> {
        let waker = Waker::from(Arc::clone(self));
        let polled = future.as_mut().map(|future| future.as_mut().poll(&mut Context::from_waker(&waker)));
        if polled == Some(Poll::Pending) {
            return Poll::Pending;
        }
        *future = None;
        Poll::Ready(())
    }
}

impl<F: Future<Output = ()> + Send + 'static> Resume for Shared<F> {
    fn resume(self: Arc<Self>) {
        let mut is_owed = !is_awake();
        loop {
            let Some(mut future) = self.free() else {
                // Who only looks leaves it to whoever is at it. What came meanwhile is the runtime's.
                if is_owed {
                    self.pass_on();
                }
                return;
            };
            // As the runtime does it: with its timers and sockets. But a task says itself how much it does at a time:
            // here nobody puts off what is woken again because it was too much, and that would have no end.
            let once = unconstrained(poll_fn(|_| Poll::Ready(self.poll(&mut future))));
            let polled = catch_unwind(AssertUnwindSafe(|| self.runtime.block_on(once)));
            if polled.is_err() {
                *future = None;
            }
            drop(future);
            if !matches!(polled, Ok(Poll::Pending)) {
                return self.pass_on();
            }
            // It is free by now: the runtime has either found it so, or said before that it had been there.
            fence(Ordering::SeqCst);
            is_owed = self.is_missed.swap(false, Ordering::SeqCst);
            if !is_owed {
                return;
            }
        }
    }

    fn pass_on(&self) {
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn waker(self: Arc<Self>) -> Waker {
        Waker::from(self)
    }
}

impl<F: Future<Output = ()> + Send + 'static> Wake for Shared<F> {
    fn wake(self: Arc<Self>) {
        if IS_OFFERED.replace(false) {
            WOKEN.set(Some(self));
        } else {
            self.pass_on();
        }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Future for Task<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        {
            let mut waker = self.0.waker.lock().unwrap_or_else(PoisonError::into_inner);
            if !waker.as_ref().is_some_and(|known| known.will_wake(context.waker())) {
                *waker = Some(context.waker().clone());
            }
        }
        let shared = &self.0;
        let free = shared.free().or_else(|| {
            shared.is_missed.store(true, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            shared.free()
        });
        // Whoever is at it comes back for what is missed.
        free.map_or(Poll::Pending, |mut future| shared.poll(&mut future))
    }
}

impl<F> Drop for Task<F> {
    fn drop(&mut self) {
        *self.0.future.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::{self, ThreadId};
    use tokio::sync::{mpsc, oneshot};

    /// A task that tells on which thread it takes each of the numbers that come.
    fn told() -> (mpsc::Sender<u32>, mpsc::Receiver<(u32, ThreadId)>, tokio::task::JoinHandle<()>) {
        let (send, mut numbers) = mpsc::channel(4);
        let (tell, told) = mpsc::channel(4);
        let joined = tokio::spawn(task(async move {
            tell.try_send((0, thread::current().id())).expect("somebody listens");
            while let Some(number) = numbers.recv().await {
                assert_ne!(number, 13, "which brings bad luck");
                // The runtime's timers are there on any thread.
                tokio::time::timeout(std::time::Duration::from_secs(60), async {}).await.expect("at once");
                tell.try_send((number, thread::current().id())).expect("somebody listens");
            }
        }));
        (send, told, joined)
    }

    /// On a thread that is none of the runtime's.
    fn elsewhere<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| scope.spawn(work).join().expect("done"))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_task_goes_on_where_it_is_woken() {
        let (send, mut told, joined) = told();
        told.recv().await.expect("it began");
        let here = elsewhere(|| {
            let ((), woken) = after(|| send.try_send(1).expect("it listens"));
            assert!(woken.0.is_some() && told.try_recv().is_err(), "not before it is let");
            woken.here();
            assert_eq!(told.try_recv().expect("it went on"), (1, thread::current().id()));
            // What nobody goes on with is the runtime's, and what is woken at no special time.
            drop(after(|| send.try_send(2).expect("it listens")));
            thread::current().id()
        });
        let (number, thread) = told.recv().await.expect("it went on");
        assert!(number == 2 && thread != here);
        send.try_send(3).expect("it listens");
        assert_eq!(told.recv().await.expect("it went on").0, 3);
        let failed = elsewhere(|| {
            catch_unwind(AssertUnwindSafe(|| {
                after(|| {
                    send.try_send(4).expect("it listens");
                    panic!("after it was woken");
                })
            }))
            .is_err()
        });
        assert!(failed && told.recv().await.expect("it went on all the same").0 == 4);
        let (_, nothing) = after(|| ());
        assert!(nothing.0.is_none());
        elsewhere(|| after(|| drop(send)).1.here());
        joined.await.expect("it is over");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_fails_here_is_the_tasks_end_and_nobody_elses() {
        let (send, mut told, joined) = told();
        told.recv().await.expect("it began");
        elsewhere(|| after(|| send.try_send(13).expect("it listens")).1.here());
        joined.await.expect("the runtime knows that it is over");
        assert!(send.is_closed(), "and what it had is gone");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_task_that_somebody_is_at_is_left_to_them() {
        let (began, begin) = oneshot::channel();
        let (let_on, wait) = std::sync::mpsc::channel::<()>();
        let (send, mut numbers) = mpsc::channel(4);
        let joined = tokio::spawn(task(async move {
            assert_eq!(numbers.recv().await, Some(1));
            began.send(()).expect("somebody waits");
            // As long as the other one likes.
            let _ = wait.recv();
            assert_eq!(numbers.recv().await, Some(2));
        }));
        send.try_send(1).expect("it listens");
        begin.await.expect("it is at it");
        elsewhere(|| drop(after(|| send.try_send(2).expect("it listens")).1.here()));
        let_on.send(()).expect("it waits");
        joined.await.expect("it saw the second, too");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn the_runtime_does_not_wait_for_whoever_is_at_a_task() {
        let ((listens, listening), (began, begin)) = (oneshot::channel(), oneshot::channel());
        let (let_on, wait) = std::sync::mpsc::channel::<()>();
        let (mut listens, mut began, mut wait) = (Some(listens), Some(began), Some(wait));
        let joined = tokio::spawn(task(poll_fn(move |context| {
            if let Some(listens) = listens.take() {
                listens.send(context.waker().clone()).expect("somebody waits");
                return Poll::Pending;
            }
            if let Some((began, wait)) = began.take().zip(wait.take()) {
                began.send(()).expect("somebody waits");
                let _ = wait.recv();
                return Poll::Pending;
            }
            Poll::Ready(())
        })));
        let waker = listening.await.expect("it begins");
        let other = waker.clone();
        let elsewhere = thread::spawn(move || drop(after(|| other.wake()).1.here()));
        begin.await.expect("somebody is at it");
        // The runtime's only thread is told, too, and has time for something else.
        waker.wake();
        tokio::spawn(async {}).await.expect("done");
        let_on.send(()).expect("it waits");
        elsewhere.join().expect("no panic");
        joined.await.expect("it went on once more");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_task_does_as_much_at_a_time_as_it_likes() {
        // The runtime lets a task take 128 of what it has, and wakes it for the rest.
        const NUMBERS: usize = 1000;
        let (send, mut numbers) = mpsc::channel(NUMBERS);
        let (listens, listening) = oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let joined = tokio::spawn(task(async move {
            listens.send(()).expect("somebody waits");
            while let Some(number) = numbers.recv().await {
                tell.send((number, thread::current().id())).expect("somebody listens");
            }
        }));
        listening.await.expect("it begins");
        let here = elsewhere(|| {
            let woken = after(|| (0..NUMBERS).for_each(|number| send.try_send(number).expect("room"))).1;
            drop(woken.here());
            thread::current().id()
        });
        drop(send);
        joined.await.expect("it took all of them");
        assert!(told.iter().all(|(_, thread)| thread == here));
    }

    #[test]
    fn a_thread_stays_awake_when_work_came_soon_after_the_last() {
        let listens = |idle_since: Option<Instant>| {
            let mut pace = Pace { idle_since, is_quick: false };
            pace.begin();
            pace.end(Some(Listener::new(Waker::noop()))).is_some()
        };
        let (now, minute) = (Instant::now(), Duration::from_secs(60));
        assert!(!listens(None) && !listens(now.checked_sub(minute)) && listens(Some(now + minute)));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn an_aborted_task_is_gone_whoever_still_wakes_it() {
        let (send, mut told, joined) = told();
        told.recv().await.expect("it began");
        joined.abort();
        joined.await.expect_err("aborted");
        assert!(send.try_send(1).is_err(), "it listens no more");
        assert!(told.recv().await.is_none());
    }
}
