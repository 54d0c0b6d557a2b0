//! What comes in pieces: uploads, and requests longer than a message may be.

use std::time::Duration;

use bytes::Bytes;
use vaccel_proto::limits::CHUNK_BYTES_MAX;
use vaccel_proto::tensor::GRPC_HEADER_BYTES;
use vaccel_proto::{Error, Reason};

/// How long one piece of an upload may take to arrive. A whole upload has [`DEADLINE_MAX`].
const UPLOAD_PIECE_DEADLINE: Duration = Duration::from_secs(30);

/// Pieces of an upload as the door hands them on.
pub(crate) trait Pieces: Send {
    /// The next piece; none at the end.
    fn next(&mut self) -> impl Future<Output = Result<Option<Bytes>, Error>> + Send;
}

/// The bytes of all pieces, where tensors lie as in a message that came whole.
pub(super) async fn gather(total: u64, first: Bytes, pieces: &mut impl Pieces) -> Result<Bytes, Error> {
    let wrong = |came: usize| Error::field("data", format!("{total} bytes in all"), came);
    let length = usize::try_from(total).map_err(|_| wrong(0))?;
    let mut whole = Vec::with_capacity(length.saturating_add(GRPC_HEADER_BYTES));
    whole.resize(GRPC_HEADER_BYTES, 0);
    let mut piece = Some(first);
    while let Some(data) = piece {
        check_piece(&data)?;
        if whole.len() + data.len() > length + GRPC_HEADER_BYTES {
            return Err(wrong(whole.len() + data.len() - GRPC_HEADER_BYTES));
        }
        whole.extend_from_slice(&data);
        piece = next_piece(pieces, "the request", "").await?;
    }
    if whole.len() < length + GRPC_HEADER_BYTES {
        return Err(wrong(whole.len() - GRPC_HEADER_BYTES));
    }
    Ok(Bytes::from(whole).slice(GRPC_HEADER_BYTES..))
}

pub(super) fn check_piece(data: &Bytes) -> Result<(), Error> {
    let (limit, length) = (CHUNK_BYTES_MAX as u64, data.len() as u64);
    if length <= limit {
        return Ok(());
    }
    Err(Error::limit(Reason::MessageTooLarge, "chunk", limit, length, "bytes"))
}

/// The next piece, unless it takes too long.
pub(super) async fn next_piece(
    pieces: &mut impl Pieces,
    whole: &str,
    advice: &str,
) -> Result<Option<Bytes>, Error> {
    match tokio::time::timeout(UPLOAD_PIECE_DEADLINE, pieces.next()).await {
        Ok(piece) => piece,
        Err(_) => {
            let waited = UPLOAD_PIECE_DEADLINE.as_secs();
            let message = format!("no piece of {whole} came for {waited} s{advice}");
            Err(Error::new(Reason::Deadline, message))
        }
    }
}
