//! What a peer gets done at a time, and what it announces.

use std::pin::pin;
use std::sync::atomic::AtomicBool;
use std::task::{Wake, Waker};

use super::*;

/// Never done, and always woken.
pub(super) fn restless(context: &mut Context<'_>) -> Poll<Response<Pieces>> {
    context.waker().wake_by_ref();
    Poll::Pending
}

#[tokio::test]
async fn a_peer_may_say_that_a_call_is_about_to_come() {
    let mut peer = Peer::new().await;
    for stream in [1, 3] {
        peer.send(frame::ALERT, 0, 0, &[]).await;
        // Whatever it has to say about it, and however often.
        peer.send(frame::ALERT, 0xff, 3, b"soon").await;
        peer.works(stream).await;
    }
    assert_eq!(peer.expected.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn many_calls_at_once_leave_time_for_others() {
    const CALLS: usize = 300;
    let (mut io, far) = tokio::io::duplex(1 << 20);
    let service = Echo::default();
    let begun = Arc::clone(&service.2);
    let mut connection = Connection::new(far, service, Pool::default());
    let mut sent = Header { length: 0, kind: frame::SETTINGS, flags: 0, stream: 0 }.encode().to_vec();
    for call in 0..CALLS {
        let (stream, block) = (u32::try_from(2 * call + 1).expect("small"), fields("/others", &[]));
        sent.extend(Header { length: 0, kind: frame::ALERT, flags: 0, stream: 0 }.encode());
        let flags = frame::END_HEADERS | frame::END_STREAM;
        sent.extend(Header { length: block.len(), kind: frame::HEADERS, flags, stream }.encode());
        sent.extend(block);
    }
    io.write_all(&sent).await.expect("there is room");
    let mut running = pin!(connection.run());
    let mut turns = 0;
    while begun.load(Ordering::SeqCst) < CALLS {
        let before = begun.load(Ordering::SeqCst);
        assert!(running.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let calls = begun.load(Ordering::SeqCst) - before;
        assert!(calls <= TURN_CALLS as usize + 1, "{calls} at a time");
        turns += 1;
        assert!(turns < CALLS, "it goes on");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_call_that_wakes_itself_leaves_time_for_others() {
    let (mut io, far) = tokio::io::duplex(1 << 16);
    let mut connection = Connection::new(far, Echo::default(), Pool::default());
    let block = fields("/restless", &[]);
    let mut sent = Header { length: 0, kind: frame::SETTINGS, flags: 0, stream: 0 }.encode().to_vec();
    let flags = frame::END_HEADERS | frame::END_STREAM;
    sent.extend(Header { length: block.len(), kind: frame::HEADERS, flags, stream: 1 }.encode());
    sent.extend(block);
    io.write_all(&sent).await.expect("there is room");
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    assert!(pin!(connection.run()).poll(&mut Context::from_waker(&waker)).is_pending());
    assert!(woken.0.load(Ordering::SeqCst), "it goes on later");
}

/// Whether a task was woken.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}
