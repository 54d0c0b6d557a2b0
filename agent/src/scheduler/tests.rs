//! The scheduler with lanes of its own, and its queue with a clock made up.

mod awake;
mod beside;
mod home;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::queue::{FairQueue, Job};
use super::*;
use crate::config::TenantLimits;
use crate::identity::Tenant;
use crate::quota::{ABANDONED_RUNS_MAX, Accounts, Unit};

fn accounts(weights: &'static [(&'static str, u32)]) -> Accounts {
    let limits = TenantLimits {
        connections: 1,
        sessions: 1,
        calls: 9,
        resource_bytes: 1,
        in_flight_bytes: 1,
        shared_bytes: 1,
        device_bytes: 0,
    };
    Accounts::new(limits, move |tenant| {
        weights.iter().find(|(name, _)| *name == tenant.as_str()).map_or(1, |(_, weight)| *weight)
    })
}

fn account() -> Arc<Account> {
    accounts(&[]).of(&Tenant::new("a"))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn asker(account: &Arc<Account>) -> Asker {
    Asker::new(account, soon())
}

fn within(account: &Arc<Account>, time: Duration) -> Asker {
    Asker::new(account, Instant::now() + time)
}

/// Takes the only lane until it is told to go on.
async fn hold(scheduler: &Arc<Scheduler>, account: &Arc<Account>) -> mpsc::Sender<()> {
    let (release, released) = mpsc::channel::<()>();
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let (scheduler, asker) = (Arc::clone(scheduler), asker(account));
    tokio::spawn(async move {
        let work = move |_: &Cancel| {
            begun.send(()).expect("the test waits");
            let _ = released.recv();
            Ok(())
        };
        scheduler.run(&asker, work).await
    });
    has_begun.await.expect("the lane is taken");
    release
}

#[tokio::test]
async fn a_panic_is_one_calls_error() {
    let scheduler = Scheduler::new(1).expect("threads");
    let account = account();
    let failed = scheduler.run::<()>(&asker(&account), |_| panic!("broken kernel")).await;
    assert_eq!(failed.expect_err("panicked").reason(), Reason::BackendFailed);
    let next = scheduler.run(&asker(&account), |_| Ok(1)).await;
    assert_eq!(next.expect("the lane is there").value, 1);
    assert_eq!(account.used(Unit::AbandonedRuns), 0);
}

#[tokio::test]
async fn a_deadline_stops_the_run_and_frees_the_lane() {
    let scheduler = Scheduler::new(1).expect("threads");
    let account = account();
    let (stopped, was_stopped) = mpsc::channel();
    let asker = within(&account, Duration::from_millis(20));
    let late = scheduler.run(&asker, move |cancel| {
        while !cancel.is_set() {
            std::thread::yield_now();
        }
        stopped.send(()).expect("the test waits");
        Ok(())
    });
    let refusal = late.await.expect_err("too late");
    assert_eq!(refusal.reason(), Reason::Deadline);
    assert!(refusal.message().contains("running"), "{refusal}");
    was_stopped.recv().expect("it was told to stop");
    scheduler.run(&self::asker(&account), |_| Ok(())).await.expect("the lane is free");
}

#[tokio::test]
async fn a_queued_call_past_its_deadline_never_runs() {
    let scheduler = Arc::new(Scheduler::new(1).expect("threads"));
    let account = account();
    let release = hold(&scheduler, &account).await;
    let asker = within(&account, Duration::from_millis(10));
    let late = scheduler.run::<()>(&asker, |_| unreachable!("it was queued")).await;
    assert!(late.expect_err("queued").message().contains("queued"));
    release.send(()).expect("still running");
    scheduler.run(&self::asker(&account), |_| Ok(())).await.expect("served");
}

#[tokio::test]
async fn runs_that_do_not_stop_are_counted_and_bounded() {
    let scheduler = Scheduler::new(1).expect("threads");
    let account = account();
    let mut releases = Vec::new();
    for _ in 0..ABANDONED_RUNS_MAX {
        let (release, released) = mpsc::channel::<()>();
        releases.push(release);
        let asker = within(&account, Duration::from_millis(5));
        let stubborn = scheduler.run(&asker, move |_| {
            let _ = released.recv();
            Ok(())
        });
        assert_eq!(stubborn.await.expect_err("late").reason(), Reason::Deadline);
    }
    let refusal = scheduler.run(&asker(&account), |_| Ok(())).await.expect_err("too many left behind");
    assert_eq!(refusal.reason(), Reason::QuotaExceeded);
    drop(releases);
    while account.used(Unit::AbandonedRuns) > 0 {
        tokio::task::yield_now().await;
    }
    scheduler.run(&asker(&account), |_| Ok(())).await.expect("they ended");
}

/// Adds one to each number, and notes how many rows its runs had.
#[derive(Default)]
struct AddOne {
    runs: Mutex<Vec<usize>>,
    /// A run with this number fails.
    poison: Option<u8>,
    /// Outputs have one row, whatever the inputs had.
    sums: bool,
}

impl Runner for AddOne {
    fn run(&self, inputs: Vec<Tensor>, _: &[usize], _: u64, _: &Cancel) -> Result<Vec<Tensor>, Error> {
        let rows = usize::try_from(inputs[0].shape[0]).expect("small");
        self.runs.lock().expect("not poisoned").push(rows);
        if self.poison.is_some_and(|poison| inputs[0].data.contains(&poison)) {
            return Err(Error::new(Reason::BackendFailed, "poisoned"));
        }
        let numbers: Vec<u8> = inputs[0].data.iter().map(|number| number + 1).collect();
        if self.sums {
            return Ok(vec![Tensor::new(&[1], &[numbers.iter().sum::<u8>()])?]);
        }
        Ok(vec![Tensor::from_bytes(DType::U8, &inputs[0].shape, Bytes::from(numbers))])
    }
}

fn alone(parallel: usize) -> Batching {
    Batching { parallel, rows_max: 0, sizes_are_dear: false, mixes_tenants: false, delay: Duration::ZERO }
}

fn batching(rows_max: usize) -> Batching {
    Batching { rows_max, ..alone(usize::MAX) }
}

fn call(numbers: &[u8]) -> Call {
    let rows = i64::try_from(numbers.len()).expect("small");
    Call {
        inputs: vec![Tensor::new(&[rows, 1], numbers).expect("valid")],
        outputs: vec![0],
        reply_bytes_max: 1 << 20,
    }
}

/// Lets a bucket know that rows together are cheap, up to 8.
fn teach(batcher: &Batcher) {
    let (bucket, _) = batcher.bucket(&call(&[0]));
    for rows in [1, 2, 4, 8] {
        for _ in 0..3 {
            bucket.ran(rows, Duration::from_millis(1), Instant::now());
        }
    }
}

/// Calls that wait together while the lane is taken, and their results in order.
async fn together(
    runner: &Arc<AddOne>,
    batching: Batching,
    calls: &[(&str, &[u8])],
) -> Vec<Result<Timed<Vec<Tensor>>, Error>> {
    let accounts = accounts(&[]);
    let scheduler = Arc::new(Scheduler::new(1).expect("threads"));
    let holder = accounts.of(&Tenant::new("holder"));
    let release = hold(&scheduler, &holder).await;
    let batcher = Arc::new(Batcher::new(Arc::clone(runner) as Arc<dyn Runner>, batching));
    teach(&batcher);
    let running: Vec<_> = calls
        .iter()
        .map(|(tenant, numbers)| {
            let (scheduler, batcher) = (Arc::clone(&scheduler), Arc::clone(&batcher));
            let (asker, call) = (asker(&accounts.of(&Tenant::new(tenant))), call(numbers));
            tokio::spawn(async move { scheduler.run_model(&asker, &batcher, call).await })
        })
        .collect();
    while scheduler.lanes.at_work().0 < calls.len() {
        tokio::task::yield_now().await;
    }
    release.send(()).expect("still running");
    let mut results = Vec::new();
    for one in running {
        results.push(one.await.expect("no panic"));
    }
    results
}

fn sorted(runner: &AddOne) -> Vec<usize> {
    let mut runs = runner.runs.lock().expect("not poisoned").clone();
    runs.sort_unstable();
    runs
}

#[tokio::test]
async fn calls_that_wait_run_together_and_get_their_own_rows() {
    let runner = Arc::new(AddOne::default());
    let results = together(&runner, batching(8), &[("a", &[1]), ("a", &[2, 3]), ("a", &[4])]).await;
    let values: Vec<(Bytes, Vec<i64>, usize)> = results
        .into_iter()
        .map(|result| {
            let mut done = result.expect("served");
            let output = done.value.remove(0);
            (output.data, output.shape, done.spans.rows)
        })
        .collect();
    assert_eq!(values[0], (Bytes::from_static(&[2]), vec![1, 1], 4));
    assert_eq!(values[1], (Bytes::from_static(&[3, 4]), vec![2, 1], 4));
    assert_eq!(values[2], (Bytes::from_static(&[5]), vec![1, 1], 4));
    assert_eq!(sorted(&runner), [4]);
}

#[tokio::test]
async fn tenants_share_a_run_only_where_the_owner_said_so() {
    let calls: &[(&str, &[u8])] = &[("a", &[1]), ("b", &[2]), ("a", &[3]), ("b", &[4])];
    let runner = Arc::new(AddOne::default());
    together(&runner, batching(8), calls).await.into_iter().for_each(|result| drop(result.expect("served")));
    assert_eq!(sorted(&runner), [2, 2]);
    let runner = Arc::new(AddOne::default());
    let mixing = Batching { mixes_tenants: true, ..batching(8) };
    together(&runner, mixing, calls).await.into_iter().for_each(|result| drop(result.expect("served")));
    assert_eq!(sorted(&runner), [4]);
}

#[tokio::test]
async fn a_call_that_fails_takes_no_other_with_it() {
    let runner = Arc::new(AddOne { poison: Some(9), ..AddOne::default() });
    let results = together(&runner, batching(8), &[("a", &[1]), ("a", &[9]), ("a", &[3])]).await;
    assert!(results[0].is_ok() && results[2].is_ok());
    assert_eq!(results[1].as_ref().expect_err("poisoned").message(), "poisoned");
    assert_eq!(sorted(&runner), [1, 1, 1, 3]);
}

#[tokio::test]
async fn outputs_that_are_not_rows_come_from_runs_of_one_call() {
    let runner = Arc::new(AddOne { sums: true, ..AddOne::default() });
    let results = together(&runner, batching(8), &[("a", &[1]), ("a", &[5]), ("a", &[3])]).await;
    let sums: Vec<u8> = results.into_iter().map(|result| result.expect("served").value[0].data[0]).collect();
    assert_eq!(sums, [2, 6, 4]);
}

#[tokio::test]
async fn sizes_that_are_dear_are_powers_of_two() {
    let runner = Arc::new(AddOne::default());
    let dear = Batching { sizes_are_dear: true, ..batching(8) };
    together(&runner, dear, &[("a", &[1][..]); 7])
        .await
        .into_iter()
        .for_each(|result| drop(result.expect("served")));
    assert_eq!(sorted(&runner), [1, 2, 4]);
}

#[tokio::test]
async fn a_model_runs_as_often_at_once_as_it_can() {
    #[derive(Default)]
    struct Counting {
        now: AtomicUsize,
        most: AtomicUsize,
    }
    impl Runner for Counting {
        fn run(&self, inputs: Vec<Tensor>, _: &[usize], _: u64, _: &Cancel) -> Result<Vec<Tensor>, Error> {
            let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(now, Ordering::SeqCst);
            for _ in 0..1000 {
                std::thread::yield_now();
            }
            self.now.fetch_sub(1, Ordering::SeqCst);
            Ok(inputs)
        }
    }
    let runner = Arc::new(Counting::default());
    let scheduler = Arc::new(Scheduler::new(4).expect("threads"));
    let batcher = Arc::new(Batcher::new(Arc::clone(&runner) as Arc<dyn Runner>, alone(2)));
    let account = account();
    let calls: Vec<_> = (0..16)
        .map(|_| {
            let (scheduler, batcher, asker) = (Arc::clone(&scheduler), Arc::clone(&batcher), asker(&account));
            tokio::spawn(async move { scheduler.run_model(&asker, &batcher, call(&[1])).await })
        })
        .collect();
    for call in calls {
        call.await.expect("no panic").expect("served");
    }
    assert!(runner.most.load(Ordering::SeqCst) <= 2, "{:?}", runner.most);
}

#[tokio::test]
async fn what_a_model_takes_before_it_is_prepared_is_not_remembered() {
    struct Preparing(AtomicUsize);
    impl Runner for Preparing {
        fn run(&self, inputs: Vec<Tensor>, _: &[usize], _: u64, _: &Cancel) -> Result<Vec<Tensor>, Error> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(inputs)
        }

        fn is_prepared(&self, _: &[Tensor]) -> bool {
            self.0.load(Ordering::SeqCst) >= 2
        }
    }
    let (scheduler, account) = (Scheduler::new(1).expect("threads"), account());
    let batcher = Batcher::new(Arc::new(Preparing(AtomicUsize::new(0))), alone(1));
    let (bucket, _) = batcher.bucket(&call(&[1]));
    for is_known in [false, false, true] {
        scheduler.run_model(&asker(&account), &batcher, call(&[1])).await.expect("served");
        // What a run took is noted before the next one begins.
        scheduler.run(&asker(&account), |_| Ok(())).await.expect("served");
        assert_eq!(bucket.row_cost().is_some(), is_known);
    }
}

#[tokio::test]
async fn what_would_wait_too_long_is_refused_at_once_with_when_to_come_back() {
    let scheduler = Arc::new(Scheduler::new(1).expect("threads"));
    let account = account();
    let batcher = Arc::new(Batcher::new(Arc::new(AddOne::default()), alone(usize::MAX)));
    let (bucket, _) = batcher.bucket(&call(&[1]));
    bucket.ran(1, Duration::from_secs(10), Instant::now());
    let release = hold(&scheduler, &account).await;
    let spawn = |time| {
        let (scheduler, batcher, asker) =
            (Arc::clone(&scheduler), Arc::clone(&batcher), within(&account, time));
        tokio::spawn(async move { scheduler.run_model(&asker, &batcher, call(&[1])).await })
    };
    let first = spawn(Duration::from_secs(1));
    while scheduler.lanes.at_work().0 == 0 {
        tokio::task::yield_now().await;
    }
    let refusal = spawn(Duration::from_secs(5)).await.expect("no panic").expect_err("10 s are before it");
    assert_eq!(refusal.reason(), Reason::Overloaded);
    assert!(matches!(refusal.detail(), Detail::RetryAfter(_)), "{refusal:?}");
    let patient = spawn(Duration::from_secs(60));
    while scheduler.lanes.at_work().0 < 2 {
        tokio::task::yield_now().await;
    }
    release.send(()).expect("still running");
    first.await.expect("no panic").expect("nobody was before it");
    patient.await.expect("no panic").expect("served");
}

#[tokio::test]
async fn callers_that_leave_leave_nothing_behind() {
    let scheduler = Arc::new(Scheduler::new(2).expect("threads"));
    let accounts = accounts(&[]);
    let batcher = Arc::new(Batcher::new(Arc::new(AddOne::default()), batching(8)));
    let mut calls = Vec::new();
    for index in 0..2000_u32 {
        let account = accounts.of(&Tenant::new(["a", "b", "c"][index as usize % 3]));
        let (scheduler, batcher, asker) = (Arc::clone(&scheduler), Arc::clone(&batcher), asker(&account));
        let call = tokio::spawn(async move { scheduler.run_model(&asker, &batcher, call(&[1])).await });
        for _ in 0..index % 5 {
            tokio::task::yield_now().await;
        }
        if index % 2 == 0 {
            call.abort();
        }
        calls.push(call);
    }
    for call in calls {
        if let Ok(result) = call.await
            && let Err(error) = result
        {
            assert_eq!(error.reason(), Reason::QuotaExceeded, "{error}");
        }
    }
    scheduler.run(&asker(&account()), |_| Ok(())).await.expect("lanes are there");
    while scheduler.lanes.at_work() != (0, 0) {
        tokio::task::yield_now().await;
    }
    let (bucket, _) = batcher.bucket(&call(&[1]));
    assert_eq!(bucket.waiting_rows(), 0);
    assert!(bucket.may_run());
}

/// A made-up day: tenants with so many calls in flight each, whose calls take so long; how many each got done.
fn day(
    tenants: &[(&'static str, usize, u64)],
    weights: &'static [(&'static str, u32)],
    lanes: usize,
    rounds: usize,
) -> HashMap<&'static str, usize> {
    let accounts = accounts(weights);
    let held: HashMap<_, _> =
        tenants.iter().map(|(name, ..)| (*name, accounts.of(&Tenant::new(name)))).collect();
    let begin = Instant::now();
    let mut queue = FairQueue::default();
    let push = |queue: &mut FairQueue<(&'static str, u64)>, name, cost| {
        let job = Job {
            work: (name, cost),
            bucket: None,
            rows: 1,
            priority: 0,
            arrived: begin,
            deadline: begin + Duration::from_secs(3600),
            estimate: 0,
        };
        queue.push(&held[name], job);
    };
    for (name, calls, cost) in tenants {
        for _ in 0..*calls {
            push(&mut queue, *name, *cost);
        }
    }
    let mut done: HashMap<&str, usize> = HashMap::new();
    // When each lane is free, and what it does until then.
    let mut busy: Vec<_> = std::iter::repeat_with(|| (0, None)).take(lanes).collect();
    for _ in 0..rounds {
        let lane = busy
            .iter()
            .enumerate()
            .min_by_key(|(_, (free, _))| *free)
            .map(|(index, _)| index)
            .expect("lanes");
        let (now, finished) = (busy[lane].0, busy[lane].1.take());
        if let Some((picked, (name, cost))) = finished {
            queue.finished(&picked, Duration::from_micros(cost), false);
            *done.entry(name).or_default() += 1;
            // Its caller calls again at once.
            push(&mut queue, name, cost);
        }
        let mut batch = queue.pick(begin, &[], &mut Vec::new()).expect("there is always more");
        let (picked, work) = batch.remove(0);
        busy[lane] = (now + work.1, Some((picked, work)));
    }
    done
}

#[test]
fn one_with_hundreds_of_calls_gets_no_more_than_one_with_few() {
    let done = day(&[("greedy", 256, 1000), ("x", 2, 1000), ("y", 2, 1000), ("z", 2, 1000)], &[], 2, 8000);
    for name in ["x", "y", "z"] {
        assert!(done[name] >= 1800, "a quarter of 8000 is 2000: {done:?}");
    }
}

#[test]
fn a_single_call_at_a_time_gets_its_share_too() {
    let done = day(&[("greedy", 256, 1000), ("x", 1, 1000), ("y", 1, 1000), ("z", 1, 1000)], &[], 2, 8000);
    for name in ["x", "y", "z"] {
        assert!(done[name] >= 1800, "a quarter of 8000 is 2000: {done:?}");
    }
}

#[test]
fn shares_are_of_time_and_not_of_calls() {
    let done = day(&[("long", 8, 10_000), ("short", 8, 1000)], &[], 1, 11_000);
    let ratio = done["short"] as f64 / done["long"] as f64;
    assert!((9.0..11.0).contains(&ratio), "{done:?}");
}

#[test]
fn shares_follow_weights() {
    let done = day(&[("paying", 8, 1000), ("other", 8, 1000)], &[("paying", 3)], 2, 8000);
    let ratio = done["paying"] as f64 / done["other"] as f64;
    assert!((2.8..3.2).contains(&ratio), "{done:?}");
}

#[test]
fn nobody_saves_up_while_away() {
    let accounts = accounts(&[]);
    let (here, away) = (accounts.of(&Tenant::new("here")), accounts.of(&Tenant::new("away")));
    let begin = Instant::now();
    let mut queue = FairQueue::default();
    let run = |queue: &mut FairQueue<&'static str>| {
        let mut batch = queue.pick(begin, &[], &mut Vec::new()).expect("somebody waits");
        let (picked, name) = batch.remove(0);
        queue.finished(&picked, Duration::from_millis(1), false);
        name
    };
    let job = |work| Job {
        work,
        bucket: None,
        rows: 1,
        priority: 0,
        arrived: begin,
        deadline: begin + Duration::from_secs(1),
        estimate: 0,
    };
    for _ in 0..1000 {
        queue.push(&here, job("here"));
        run(&mut queue);
    }
    for _ in 0..20 {
        queue.push(&here, job("here"));
        queue.push(&away, job("away"));
    }
    let first: Vec<_> = (0..20).map(|_| run(&mut queue)).collect();
    let from_away = first.iter().filter(|name| **name == "away").count();
    assert!((9..=11).contains(&from_away), "{first:?}");
}

#[test]
fn a_tenants_own_calls_go_by_priority_then_by_arrival() {
    let account = account();
    let begin = Instant::now();
    let mut queue = FairQueue::default();
    for (name, priority) in [("second", 5), ("third", 5), ("first", 1)] {
        let job = Job {
            work: name,
            bucket: None,
            rows: 1,
            priority,
            arrived: begin,
            deadline: begin + Duration::from_secs(1),
            estimate: 0,
        };
        queue.push(&account, job);
    }
    let order: Vec<_> =
        (0..3).map(|_| queue.pick(begin, &[], &mut Vec::new()).expect("waits").remove(0).1).collect();
    assert_eq!(order, ["first", "second", "third"]);
}
