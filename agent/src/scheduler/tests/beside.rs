//! Runs that have had their lanes for long, and tenants that wait for one.

use super::*;

/// Waits until so many calls wait and so many runs go on.
async fn until(scheduler: &Scheduler, at_work: (usize, usize)) {
    while scheduler.lanes.at_work() != at_work {
        tokio::task::yield_now().await;
    }
}

fn queued(
    scheduler: &Arc<Scheduler>,
    account: &Arc<Account>,
) -> tokio::task::JoinHandle<Result<Timed<()>, Error>> {
    let (scheduler, asker) = (Arc::clone(scheduler), asker(account));
    tokio::spawn(async move { scheduler.run(&asker, |_| Ok(())).await })
}

#[tokio::test]
async fn whoever_has_no_lane_runs_beside_those_who_have_them_for_long() {
    let (scheduler, accounts) = (Arc::new(Scheduler::new(2).expect("threads")), accounts(&[]));
    let (greedy, modest) = (accounts.of(&Tenant::new("a")), accounts.of(&Tenant::new("b")));
    let first = hold(&scheduler, &greedy).await;
    let second = hold(&scheduler, &greedy).await;
    let third = queued(&scheduler, &greedy);
    until(&scheduler, (1, 2)).await;
    for _ in 0..3 {
        scheduler.run(&asker(&modest), |_| Ok(())).await.expect("a lane beside");
    }
    // Who has two runs gets no third for it.
    until(&scheduler, (1, 2)).await;
    first.send(()).expect("it goes on");
    third.await.expect("no panic").expect("one of its own has ended");
    second.send(()).expect("it goes on");
    until(&scheduler, (0, 0)).await;
    assert_eq!(greedy.used(Unit::AbandonedRuns), 0);
}

#[tokio::test]
async fn there_are_as_many_lanes_afterwards_as_before() {
    let (scheduler, accounts) = (Arc::new(Scheduler::new(1).expect("threads")), accounts(&[]));
    let (greedy, modest) = (accounts.of(&Tenant::new("a")), accounts.of(&Tenant::new("b")));
    // One that ends by itself, and one whose caller leaves while it goes on beside.
    for is_left in [false, true] {
        let (release, released) = mpsc::channel::<()>();
        let time = if is_left { 2 * LANE_TIME_MAX } else { Duration::from_secs(60) };
        let (runs, patient) = (Arc::clone(&scheduler), within(&greedy, time));
        let long = tokio::spawn(async move {
            let work = move |_: &Cancel| {
                let _ = released.recv();
                Ok(())
            };
            runs.run(&patient, work).await
        });
        until(&scheduler, (0, 1)).await;
        scheduler.run(&asker(&modest), |_| Ok(())).await.expect("a lane beside");
        if is_left {
            let refusal = long.await.expect("no panic").expect_err("too late");
            assert_eq!(refusal.reason(), Reason::Deadline);
            assert_eq!(greedy.used(Unit::AbandonedRuns), 1);
            drop(release);
        } else {
            drop(release);
            long.await.expect("no panic").expect("it ended");
        }
        until(&scheduler, (0, 0)).await;
        assert_eq!(greedy.used(Unit::AbandonedRuns), 0);
        let held = hold(&scheduler, &greedy).await;
        let next = queued(&scheduler, &modest);
        until(&scheduler, (1, 1)).await;
        held.send(()).expect("it runs");
        next.await.expect("no panic").expect("served");
    }
}
