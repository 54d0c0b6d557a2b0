//! Requests and replies longer than a message may be: the same bytes, in pieces.

use bytes::{Bytes, BytesMut};
use prost::Message;
use tonic::codegen::tokio_stream::{self, StreamExt};
use tonic::{Response, Status, Streaming};
use vaccel_proto::limits::CHUNK_BYTES_MAX;
use vaccel_proto::tensor::GRPC_HEADER_BYTES;
use vaccel_proto::v1::operations_client::OperationsClient;
use vaccel_proto::v1::{RunPiece, RunReply, RunRequest};
use vaccel_proto::{Error, Reason};

use crate::client::timed;
use crate::wire::Wire;

/// Room that a reply gets before its bytes are there: what an agent claims is believed so far.
const CLAIM_BYTES_MAX: usize = 256 << 20;

/// A request as it is encoded, cut into pieces when it is sent.
pub(crate) struct Encoded(Bytes);

impl Encoded {
    pub(crate) fn new(request: &RunRequest) -> Self {
        Self(request.encode_to_vec().into())
    }

    /// Sends it and gathers what comes back.
    ///
    /// # Errors
    /// The agent's status, or `BACKEND_FAILED` for pieces that are no reply.
    pub(crate) async fn run(
        &self,
        wire: Wire,
        time: std::time::Duration,
    ) -> Result<Response<RunReply>, Status> {
        let (mut total, mut rest) = (self.0.len() as u64, self.0.clone());
        let pieces = std::iter::from_fn(move || {
            let data = rest.split_to(rest.len().min(CHUNK_BYTES_MAX));
            // The first piece alone says how many bytes there are.
            (!data.is_empty()).then(|| RunPiece { total: std::mem::take(&mut total), data })
        });
        let request = timed(tokio_stream::iter(pieces), time);
        let reply = OperationsClient::new(wire).run_large(request).await?;
        let (metadata, mut pieces, extensions) = reply.into_parts();
        let reply = gather(&mut pieces).await?;
        Ok(Response::from_parts(metadata, reply, extensions))
    }
}

async fn gather(pieces: &mut Streaming<RunPiece>) -> Result<RunReply, Status> {
    let broken = |why: &str| -> Status {
        Error::new(Reason::BackendFailed, format!("the agent's reply in pieces {why}")).into()
    };
    let Some(first) = pieces.next().await.transpose()? else { return Err(broken("has none")) };
    let length = usize::try_from(first.total).map_err(|_| broken("is longer than memory"))?;
    // Tensors then lie as in a message that came whole.
    let mut whole = BytesMut::with_capacity(length.min(CLAIM_BYTES_MAX) + GRPC_HEADER_BYTES);
    whole.extend_from_slice(&[0; GRPC_HEADER_BYTES]);
    let mut piece = Some(first);
    while let Some(RunPiece { data, .. }) = piece {
        if whole.len() + data.len() > length.saturating_add(GRPC_HEADER_BYTES) {
            return Err(broken("is longer than it said"));
        }
        whole.extend_from_slice(&data);
        piece = pieces.next().await.transpose()?;
    }
    let whole = whole.freeze().slice(GRPC_HEADER_BYTES..);
    if whole.len() < length {
        return Err(broken("is shorter than it said"));
    }
    RunReply::decode(whole).map_err(|_| broken("is no reply"))
}
