//! Messages in gzip, for lines on which bytes cost more than processors.

use std::io::{Read, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use tonic::Status;
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::tensor::GRPC_HEADER_BYTES;
use vaccel_proto::{Error, Reason};

use crate::unary::broken;

/// What gRPC calls it.
pub(crate) const NAME: &str = "gzip";

/// Shorter messages get no shorter.
const WORTH_IT_BYTES: usize = 1024;

/// A message in gRPC's framing, compressed if that is worth it.
///
/// # Errors
/// The runtime stops.
pub(crate) async fn shrink(mut pieces: Vec<Bytes>) -> Result<Vec<Bytes>, Status> {
    let length: usize = pieces.iter().map(Bytes::len).sum();
    if length < GRPC_HEADER_BYTES + WORTH_IT_BYTES {
        return Ok(pieces);
    }
    // The framing is in the first piece, with what is no tensor.
    if let Some(first) = pieces.first_mut() {
        *first = first.slice(GRPC_HEADER_BYTES.min(first.len())..);
    }
    on_a_thread(move || {
        let mut writer = GzEncoder::new(vec![1, 0, 0, 0, 0], Compression::fast());
        let written =
            pieces.iter().try_for_each(|piece| writer.write_all(piece)).and_then(|()| writer.finish());
        let mut framed = written
            .map_err(|_| Error::new(Reason::BackendFailed, "the request cannot be compressed").to_status())?;
        let length = u32::try_from(framed.len() - GRPC_HEADER_BYTES).unwrap_or(u32::MAX);
        framed[1..GRPC_HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
        Ok(vec![framed.into()])
    })
    .await
}

/// The message that is compressed behind its framing, where its tensors lie as in one that came as it is.
///
/// # Errors
/// `BACKEND_FAILED` for something else, or more than one message may be.
pub(crate) async fn expand(framed: Bytes) -> Result<Bytes, Status> {
    on_a_thread(move || {
        let mut message = vec![0; GRPC_HEADER_BYTES];
        let reader = GzDecoder::new(&framed[GRPC_HEADER_BYTES..]);
        let read = reader.take(MESSAGE_BYTES_MAX as u64 + 1).read_to_end(&mut message);
        read.map_err(|_| broken("is not in gzip, as it says"))?;
        if message.len() > GRPC_HEADER_BYTES + MESSAGE_BYTES_MAX {
            return Err(broken("is longer than a message may be"));
        }
        Ok(Bytes::from(message).slice(GRPC_HEADER_BYTES..))
    })
    .await
}

/// Work that takes its time, where it holds nobody up.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let stopping = |_| Error::new(Reason::Cancelled, "the program's runtime stops").to_status();
    tokio::task::spawn_blocking(work).await.map_err(stopping)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_compressed_comes_back_and_bombs_do_not() {
        let message = [7; 100_000];
        let framed = [&[0, 0, 1, 0x86, 0xa0][..], &message].concat();
        let shrunk = shrink(vec![framed[..50].to_vec().into(), framed[50..].to_vec().into()]).await.unwrap();
        assert!(shrunk[0].len() < 1000 && shrunk.len() == 1);
        assert_eq!(shrunk[0][..1], [1]);
        assert_eq!(expand(shrunk[0].clone()).await.unwrap(), message[..]);
        let short = vec![Bytes::from_static(&[0, 0, 0, 0, 1, 9])];
        assert_eq!(shrink(short.clone()).await.unwrap(), short);

        let bomb = vec![0; GRPC_HEADER_BYTES + MESSAGE_BYTES_MAX + 1];
        let bomb = shrink(vec![bomb.into()]).await.unwrap().remove(0);
        for (framed, why) in [(bomb, "longer"), (Bytes::from_static(&[1, 0, 0, 0, 1, 9]), "not in gzip")] {
            let refusal = expand(framed).await.unwrap_err();
            assert!(refusal.message().contains(why), "{refusal}");
        }
    }
}
