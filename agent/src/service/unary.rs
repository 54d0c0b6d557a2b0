//! The calls that are made most, without the routes of all others: one message in, one out.
//!
//! Their message came whole and is read where it lies; their reply leaves as pieces, tensors from where they are.
//! What they do is `dispatch`'s, as for every call, and the wire is gRPC's as everywhere.

use std::pin::Pin;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Body;
use prost::Message;
use vaccel_proto::carrier::Aligned;
use vaccel_proto::inference::ModelInferRequest;
use vaccel_proto::tensor::GRPC_HEADER_BYTES;
use vaccel_proto::v1::RunRequest;
use vaccel_proto::{Error, codec, gather};

use super::GRPC_STATUS;
use super::body::{HeldBytes, Kept, KeptBody, check_flag};
use super::compression::{self, Coding, GRPC_ENCODING};
use crate::dispatch::{Caller, Dispatch};
use crate::http2::{Blocks, is_grpc};

/// What every reply says that is not compressed.
static BLOCKS: LazyLock<Blocks> = LazyLock::new(|| Blocks::new(&head(), &trailers()));

fn head() -> HeaderMap {
    HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/grpc"))])
}

fn trailers() -> HeaderMap {
    HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from_static("0"))])
}

/// The calls.
#[derive(Clone, Copy, Debug)]
pub(super) enum Call {
    Run,
    ModelInfer,
}

impl Call {
    /// The call that a request makes, if it is one of these.
    pub(super) fn of<B>(request: &Request<B>) -> Option<Self> {
        let call = match request.uri().path() {
            "/vaccel.v1.Operations/Run" => Self::Run,
            "/inference.GRPCInferenceService/ModelInfer" => Self::ModelInfer,
            _ => return None,
        };
        // What is said to unknown codings, to other methods and to bodies of anything, is the routes' business.
        let headers = request.headers();
        let is_plain = headers.get(GRPC_ENCODING).is_none_or(|encoding| encoding == "identity");
        let is_known = is_plain || Coding::of_messages(headers).is_some();
        Some(call).filter(|_| is_known && is_grpc(headers) && request.method() == http::Method::POST)
    }

    /// Whether its tensors are the end of its message, and nothing before them says where they begin. Their lengths are
    /// multiples of 16 bytes more often than not.
    pub(super) fn ends_with_tensors(self) -> bool {
        matches!(self, Self::ModelInfer)
    }

    /// Makes it, and answers in a coding if one is given.
    pub(super) async fn answer(
        self,
        dispatch: Arc<Dispatch>,
        caller: Caller,
        held: Arc<HeldBytes>,
        body: impl Body<Data = Bytes, Error = Error> + Unpin,
        coding: Option<Coding>,
    ) -> Response<KeptBody> {
        let answered = async {
            let pieces = self.pieces(&dispatch, &caller, &held, body).await?;
            match coding {
                Some(coding) => compression::shrink_message(coding, pieces, &held).await,
                None => Ok(pieces),
            }
        };
        let pieces = match answered.await {
            Ok(pieces) => pieces,
            Err(error) => {
                let kept = Some(Kept { _caller: caller, _bytes: held });
                return super::grpc_refusal(&error).map(|body| KeptBody::new(body, kept));
            }
        };
        let kept = Kept { _caller: caller, _bytes: held };
        let Some(coding) = coding else {
            return Response::new(KeptBody::message_between(&BLOCKS, pieces, kept));
        };
        let mut response = Response::new(KeptBody::message(pieces, trailers(), kept));
        *response.headers_mut() = head();
        response.headers_mut().insert(GRPC_ENCODING, HeaderValue::from_static(coding.name()));
        response
    }

    async fn pieces(
        self,
        dispatch: &Dispatch,
        caller: &Caller,
        held: &HeldBytes,
        body: impl Body<Data = Bytes, Error = Error> + Unpin,
    ) -> Result<Vec<Bytes>, Error> {
        let message = message(body).await?;
        match self {
            Self::Run => {
                let mut reply = dispatch.run(caller, codec::decode::<RunRequest>(message)?).await?;
                reply.align();
                pieces(&reply, held)
            }
            Self::ModelInfer => {
                // In a place of its own: calls of the other kind are a quarter of its size.
                let infer = Box::pin(dispatch.infer(caller, codec::decode::<ModelInferRequest>(message)?));
                pieces(&infer.await?, held)
            }
        }
    }
}

/// The one message of a request.
async fn message(mut body: impl Body<Data = Bytes, Error = Error> + Unpin) -> Result<Bytes, Error> {
    let frame = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
    let framed = frame.transpose()?.and_then(|frame| frame.into_data().ok());
    let framed = framed.ok_or_else(|| Error::field("message", "one message", "none"))?;
    check_flag(&framed)?;
    // It came whole, with what is before it.
    Ok(framed.slice(GRPC_HEADER_BYTES..))
}

fn pieces(reply: &impl Message, held: &HeldBytes) -> Result<Vec<Bytes>, Error> {
    let pieces = gather::framed(reply)?;
    held.grow(pieces.iter().map(|piece| piece.len() as u64).sum())?;
    Ok(pieces)
}
