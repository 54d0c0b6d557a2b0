//! Who may send how much, and when.

use super::*;

#[tokio::test]
async fn a_reply_waits_for_both_windows_and_goes_on() {
    let mut peer = Peer::silent();
    let window = [&frame::INITIAL_WINDOW_SIZE.to_be_bytes()[..], &1000_u32.to_be_bytes()].concat();
    peer.send(frame::SETTINGS, 0, 0, &window).await;
    peer.call(1, "/large", &[]).await;
    peer.call(3, "/early", &[]).await;
    assert_eq!(peer.reply(3).await.data, b"early", "the other stream's window is its own");
    // 1000 bytes came before; a larger window for all streams, and for the one.
    let window = [&frame::INITIAL_WINDOW_SIZE.to_be_bytes()[..], &2500_u32.to_be_bytes()].concat();
    peer.send(frame::SETTINGS, 0, 0, &window).await;
    let (header, _) = peer.wait(frame::DATA).await;
    assert_eq!((header.stream, header.length), (1, 1500));
    peer.send(frame::WINDOW_UPDATE, 0, 1, &(LARGE as u32).to_be_bytes()).await;
    let mut came = 2500;
    while came < 65_535 - b"early".len() {
        came += peer.wait(frame::DATA).await.0.length;
    }
    assert_eq!(came, 65_535 - b"early".len(), "the window of the connection");
    peer.send(frame::WINDOW_UPDATE, 0, 0, &(LARGE as u32).to_be_bytes()).await;
    assert_eq!(peer.reply(1).await.data.len(), LARGE - came);
}

/// What a peer may send, as it is told.
struct Allowed {
    initial: i64,
    stream: i64,
    connection: i64,
}

impl Allowed {
    /// Reads what the agent has said by now.
    async fn listen(&mut self, peer: &mut Peer) {
        peer.send(frame::PING, 0, 0, &[7; 8]).await;
        loop {
            let (header, content) = peer.next().await.expect("the connection goes on");
            let number =
                |content: &[u8]| i64::from(u32::from_be_bytes(content.try_into().expect("four bytes")));
            match (header.kind, header.stream) {
                (frame::PING, _) => return,
                (frame::WINDOW_UPDATE, 0) => self.connection += number(&content),
                (frame::WINDOW_UPDATE, _) => self.stream += number(&content),
                (frame::SETTINGS, _) => {
                    for setting in content.chunks(6) {
                        if setting[..2] == frame::INITIAL_WINDOW_SIZE.to_be_bytes() {
                            let initial = number(&setting[2..]);
                            self.stream += initial - std::mem::replace(&mut self.initial, initial);
                        }
                    }
                }
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn a_message_never_waits_for_a_window() {
    let mut peer = Peer::new().await;
    let window = frame::WINDOW_DEFAULT;
    let mut allowed = Allowed { initial: window, stream: window, connection: window };
    allowed.listen(&mut peer).await;
    assert_eq!(allowed.initial, i64::from(STREAM_WINDOW));
    let piece = vec![3; FRAME_BYTES_MAX];
    for stream in [1, 3, 5, 7] {
        peer.call(stream, "/never", &[("content-type", "application/grpc")]).await;
        allowed.stream = allowed.initial;
        let length = (MESSAGE_BYTES_MAX as u32).to_be_bytes();
        peer.send(frame::DATA, 0, stream, &[&[0][..], &length].concat()).await;
        let mut left = MESSAGE_BYTES_MAX;
        (allowed.stream, allowed.connection) = (allowed.stream - 5, allowed.connection - 5);
        while left > 0 {
            allowed.listen(&mut peer).await;
            let now = left.min(piece.len());
            assert!(allowed.stream >= left as i64 && allowed.connection >= now as i64);
            peer.send(frame::DATA, 0, stream, &piece[..now]).await;
            (allowed.stream, allowed.connection) =
                (allowed.stream - now as i64, allowed.connection - now as i64);
            left -= now;
        }
        peer.send(frame::RST_STREAM, 0, stream, &frame::CANCEL.to_be_bytes()).await;
    }
    assert_eq!(allowed.initial, i64::from(STREAM_WINDOW_MAX));
    peer.works(9).await;
}

#[tokio::test]
async fn a_peer_that_is_far_away_and_waited_for_gets_a_larger_window() {
    let mut peer = Peer::new().await;
    let window = frame::WINDOW_DEFAULT;
    let mut allowed = Allowed { initial: window, stream: window, connection: window };
    allowed.listen(&mut peer).await;
    allowed.stream = allowed.initial;
    peer.call(1, "/echo", &[("content-type", "application/grpc")]).await;
    let piece = message(&[1; 1 << 17]);
    for _ in 0..48 {
        assert!(allowed.stream >= piece.len() as i64, "{}", allowed.stream);
        peer.send(frame::DATA, 0, 1, &piece).await;
        allowed.stream -= piece.len() as i64;
        allowed.listen(&mut peer).await;
        // As long as the way takes.
        let sent = std::time::Instant::now();
        while sent.elapsed() < FAR {
            tokio::task::yield_now().await;
        }
    }
    assert!(allowed.initial >= i64::from(4 * STREAM_WINDOW), "{}", allowed.initial);
}

#[tokio::test]
async fn more_than_a_stream_s_window_ends_the_stream() {
    let mut peer = Peer::new().await;
    // The service takes nothing, so nothing is given back.
    peer.call(1, "/never", &[]).await;
    let piece = vec![0; FRAME_BYTES_MAX];
    for _ in 0..=STREAM_WINDOW as usize / FRAME_BYTES_MAX {
        peer.send(frame::DATA, 0, 1, &piece).await;
    }
    // A stream that is over is given nothing back, either; the service has dropped the body.
    let reset = peer.reply(1).await.reset;
    assert_eq!(reset, Some(frame::FLOW_CONTROL_ERROR));
    peer.works(3).await;
}

#[tokio::test]
async fn a_reply_that_waits_for_its_window_goes_with_the_peer() {
    let mut peer = Peer::new().await;
    peer.call(1, "/talk", &[("content-type", "application/grpc")]).await;
    peer.send(frame::DATA, 0, 1, &message(&[1; 100])).await;
    peer.wait(frame::DATA).await;
    let Peer { io, agent, calls, .. } = peer;
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    drop(io);
    let _ = tokio::time::timeout(Duration::from_secs(60), agent).await.expect("it ends").expect("no panic");
    assert_eq!(calls.load(Ordering::SeqCst), 0);
}
