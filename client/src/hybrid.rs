//! Hybrid vsock, from the host into a guest: the `CONNECT` line of Firecracker, Cloud Hypervisor and
//! vhost-device-vsock.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest answer line that is read, in bytes. Real ones are `OK` and a number of up to ten digits.
const ANSWER_BYTES_MAX: usize = 32;

/// Asks the VMM for a port of its guest.
///
/// The answer is read byte by byte: the agent's first HTTP/2 frame may follow it in the same segment and
/// belongs to whoever reads next. Its number is not interpreted, since VMMs do not agree on what it says.
///
/// # Errors
/// `ConnectionRefused` when the VMM closes without an answer, which is how it says that nobody listens on the
/// port; `InvalidData` for any other answer.
pub(crate) async fn connect<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, port: u32) -> io::Result<()> {
    let nobody = |_| {
        let text = format!("the VMM closed the connection: nobody listens on port {port} in the guest");
        io::Error::new(io::ErrorKind::ConnectionRefused, text)
    };
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.map_err(nobody)?;
    stream.flush().await.map_err(nobody)?;
    let mut answer = Vec::with_capacity(ANSWER_BYTES_MAX);
    while answer.last() != Some(&b'\n') {
        if answer.len() == ANSWER_BYTES_MAX {
            return Err(unexpected(&answer));
        }
        answer.push(stream.read_u8().await.map_err(nobody)?);
    }
    match answer.get(..3) {
        Some(start) if start.eq_ignore_ascii_case(b"OK ") => Ok(()),
        _ => Err(unexpected(&answer)),
    }
}

fn unexpected(answer: &[u8]) -> io::Error {
    let text = format!(
        "the answer to CONNECT was \"{}\", expected \"OK NUMBER\"; is this the socket of a VMM?",
        answer.escape_ascii()
    );
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: &[u8] = b"\0\0\0\x04\0\0\0\0\0";

    /// Plays a VMM that answers with these pieces, each in its own write, then closes. Returns the outcome of
    /// the handshake and the bytes left for the next reader.
    async fn answered(pieces: &[&[u8]]) -> (io::Result<()>, Vec<u8>) {
        let (mut stream, mut vmm) = tokio::net::UnixStream::pair().unwrap();
        let pieces: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.to_vec()).collect();
        let vmm = async move {
            let mut request = vec![0; "CONNECT 2048\n".len()];
            vmm.read_exact(&mut request).await.unwrap();
            assert_eq!(request, b"CONNECT 2048\n");
            for piece in pieces {
                vmm.write_all(&piece).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let guest = async {
            let outcome = connect(&mut stream, 2048).await;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
            (outcome, rest)
        };
        tokio::join!(guest, vmm).0
    }

    #[tokio::test]
    async fn bytes_behind_the_answer_are_not_lost() {
        let one_write = [b"OK 1073741824\n", FRAME].concat();
        let byte_by_byte: Vec<&[u8]> = one_write.chunks(1).collect();
        for pieces in [&[&one_write[..]][..], &byte_by_byte] {
            let (outcome, rest) = answered(pieces).await;
            outcome.unwrap();
            assert_eq!(rest, FRAME);
        }
    }

    #[tokio::test]
    async fn any_number_and_any_case_will_do() {
        for answer in ["OK 52\n", "ok 2048\n", "Ok what\n"] {
            let (outcome, rest) = answered(&[answer.as_bytes(), FRAME]).await;
            outcome.unwrap();
            assert_eq!(rest, FRAME, "{answer:?}");
        }
    }

    #[tokio::test]
    async fn no_answer_means_nobody_listens() {
        for pieces in [&[][..], &[&b"OK 10"[..]]] {
            let (outcome, _) = answered(pieces).await;
            let error = outcome.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
            assert!(error.to_string().contains("nobody listens on port 2048"), "{error}");
        }
    }

    #[tokio::test]
    async fn garbage_is_refused_and_bounded() {
        let (outcome, rest) = answered(&[&[b'x'; 33]]).await;
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(rest.len(), 1, "not one byte beyond the limit is read");
        for answer in [&b"\n"[..], b"OK\n", b"NO 1\n", b"HTTP/1.1 400\r\n"] {
            let (outcome, _) = answered(&[answer]).await;
            let error = outcome.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{answer:?}");
            assert!(error.to_string().contains("CONNECT"), "{error}");
        }
    }
}
