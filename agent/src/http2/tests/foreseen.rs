//! Calls that are like the last one, and calls that only begin like it.

use std::cell::Cell;
use std::task::{Waker, ready};

use super::*;

thread_local! {
    /// Reads that brought something to both places.
    static AT_ONCE: Cell<usize> = const { Cell::new(0) };
}

/// Reads as sockets do.
impl Wire for DuplexStream {
    fn reads_two(&self) -> bool {
        true
    }

    fn poll_read_two(
        &mut self,
        context: &mut Context<'_>,
        first: &mut [u8],
        second: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(input::poll_read(context, self, first))?;
        if count < first.len() {
            return Poll::Ready(Ok(count));
        }
        match input::poll_read(&mut Context::from_waker(Waker::noop()), self, second)? {
            Poll::Ready(more) => {
                AT_ONCE.set(AT_ONCE.get() + 1);
                Poll::Ready(Ok(count + more))
            }
            Poll::Pending => Poll::Ready(Ok(count)),
        }
    }
}

/// Bytes of the message that is foreseen, with its prefix.
const WHOLE: usize = 20_000;

const GRPC: (&str, &str) = ("content-type", "application/grpc");

fn frame(kind: u8, flags: u8, stream: u32, content: &[u8]) -> Vec<u8> {
    [&Header { length: content.len(), kind, flags, stream }.encode()[..], content].concat()
}

fn head(stream: u32, more: &[(&str, &str)]) -> Vec<u8> {
    frame(frame::HEADERS, frame::END_HEADERS, stream, &fields("/echo", more))
}

fn data(stream: u32, content: &[u8]) -> Vec<u8> {
    frame(frame::DATA, frame::END_STREAM, stream, content)
}

/// A message that takes so many bytes with its prefix.
fn body(bytes: usize, seed: u32) -> Vec<u8> {
    let content: Vec<u8> = (seed..).map(|number| number.to_le_bytes()[0]).take(bytes - 5).collect();
    message(&content)
}

impl Peer {
    /// A peer to which any number of replies can be sent.
    async fn patient() -> Self {
        let mut peer = Self::new().await;
        peer.send(frame::WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes()).await;
        peer
    }

    /// Sends bytes with pauses, in which the agent reads.
    async fn send_cut(&mut self, bytes: &[u8], cut: usize) {
        let (first, rest) = bytes.split_at(cut.min(bytes.len()));
        for part in [first, rest] {
            self.io.write_all(part).await.expect("it reads");
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Makes a call as it is foreseen after the first such.
    async fn as_ever(&mut self, stream: u32) {
        let body = body(WHOLE, stream);
        self.send_cut(&[head(stream, &[GRPC]), data(stream, &body)].concat(), usize::MAX).await;
        assert!(self.reply(stream).await.data == body, "{stream}");
    }
}

/// What comes instead of the call that is foreseen, by name, and what its body is.
fn others(stream: u32) -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let same = body(WHOLE, 77);
    let call = |name, more: &[(&str, &str)], body: &[u8]| {
        (name, [head(stream, more), data(stream, body)].concat(), body.to_vec())
    };
    let (longer, shorter, short) = (body(WHOLE + 900, 1), body(WHOLE - 900, 2), body(300, 3));
    let two = [body(12_000, 4), body(WHOLE - 12_000, 5)].concat();
    let (first, second) = same.split_at(9000);
    let halves = [frame(frame::DATA, 0, stream, first), data(stream, second)].concat();
    let padded =
        frame(frame::DATA, frame::END_STREAM | frame::PADDED, stream, &[&[9][..], &same, &[0; 9]].concat());
    let late = [frame(frame::DATA, 0, stream, &same), data(stream, &[])].concat();
    let ping = frame(frame::PING, frame::ACK, 0, &[7; 8]);
    let grpc = head(stream, &[GRPC]);
    let with = |name, parts: &[&[u8]]| (name, parts.concat(), same.clone());
    vec![
        call("the same", &[GRPC], &same),
        call("a longer head", &[GRPC, ("x", "longer")], &same),
        call("a shorter head", &[("content-type", "application/grpc+")], &same),
        call("a body of anything", &[("content-typo", "application/grpc")], &same),
        call("a longer message", &[GRPC], &longer),
        call("a shorter message", &[GRPC], &shorter),
        call("a short message", &[GRPC], &short),
        call("no message", &[GRPC], &[]),
        call("two messages of its length", &[GRPC], &two),
        with("two frames", &[&grpc, &halves]),
        with("a padded frame", &[&grpc, &padded]),
        with("an end of its own", &[&grpc, &late]),
        with("a frame before", &[&ping, &grpc, &data(stream, &same)]),
        with("a frame between", &[&grpc, &ping, &data(stream, &same)]),
    ]
}

#[tokio::test]
async fn a_call_is_answered_whatever_was_foreseen() {
    let head_bytes = head(1, &[GRPC]).len() + frame::HEADER_BYTES;
    for cut in [
        usize::MAX,
        1,
        9,
        30,
        head_bytes - 1,
        head_bytes,
        head_bytes + 3,
        5000,
        WHOLE,
        WHOLE + head_bytes - 1,
    ] {
        let mut peer = Peer::patient().await;
        let mut stream = 1;
        for index in 0..others(1).len() {
            // What came before the first one, or between, is not what comes before the second.
            peer.as_ever(stream).await;
            peer.as_ever(stream + 2).await;
            let before = AT_ONCE.get();
            peer.as_ever(stream + 4).await;
            assert!(AT_ONCE.get() > before, "the third one is read at once");
            stream += 6;
            let (name, bytes, body) = others(stream).swap_remove(index);
            peer.send_cut(&bytes, cut).await;
            let reply = peer.reply(stream).await;
            assert!(reply.data == body, "{name}, cut at {cut}: {} of {} bytes", reply.data.len(), body.len());
            stream += 2;
        }
        peer.works(stream).await;
    }
}

#[tokio::test]
async fn calls_behind_the_foreseen_one_are_not_lost() {
    let mut peer = Peer::patient().await;
    peer.as_ever(1).await;
    let mut stream = 3;
    for cut in 0..20 {
        let streams = [stream, stream + 2, stream + 4];
        let bodies = streams.map(|stream| body(WHOLE, stream));
        let calls = streams.iter().zip(&bodies);
        let calls: Vec<_> = calls.map(|(id, body)| [head(*id, &[GRPC]), data(*id, body)].concat()).collect();
        peer.send_cut(&calls.concat(), calls[0].len() + cut).await;
        let mut came = [const { Vec::new() }; 3];
        let mut ended = 0;
        while ended < streams.len() {
            let (header, content) = peer.next().await.expect("answers");
            let Some(index) = streams.iter().position(|stream| *stream == header.stream) else { continue };
            ended += usize::from(header.has(frame::END_STREAM));
            if header.kind == frame::DATA {
                came[index].extend(content);
            }
        }
        assert!(came == bodies, "cut {cut} bytes behind the first");
        stream += 6;
    }
}
