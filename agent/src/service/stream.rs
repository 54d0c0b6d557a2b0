//! Runs that are asked for, and answered, on one stream.
//!
//! Answers come in the order of the requests; a few requests run at the same time, so that they can share runs of the
//! model. Each is a call like any other and counts as one. A run that fails is an answer and does not end the stream.

use std::collections::HashMap;
use std::sync::Arc;

use prost::Message;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::codegen::tokio_stream::{Stream, StreamExt};
use tonic::{Status, Streaming};
use vaccel_proto::inference::infer_parameter::ParameterChoice;
use vaccel_proto::inference::{
    InferParameter, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
};
use vaccel_proto::{Error, Reason};

use crate::dispatch::{Caller, Dispatch};
use crate::quota::{Hold, Unit};

/// Requests of one stream that run at the same time.
const AHEAD_MAX: usize = 32;

type Answers = mpsc::Receiver<Result<Pending, Status>>;

/// A run that goes on; dropping it stops it.
struct Pending(JoinHandle<(ModelStreamInferResponse, Option<Counted>)>);

/// What a run is counted as, until its answer is taken.
type Counted = (Hold, Hold);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The answers to a stream of requests.
pub(super) fn runs(
    dispatch: Arc<Dispatch>,
    caller: Caller,
    requests: Streaming<ModelInferRequest>,
) -> impl Stream<Item = Result<ModelStreamInferResponse, Status>> + Send {
    let (sender, answers) = mpsc::channel(AHEAD_MAX);
    let reading = Reading(tokio::spawn(read(dispatch, caller, requests, sender)));
    Ordered(answers, reading).then(|pending| async {
        let mut pending = pending?;
        let failed = |error| Error::new(Reason::BackendFailed, "the run failed").caused_by(error);
        let (answer, _counted) = (&mut pending.0).await.map_err(failed)?;
        Ok(answer)
    })
}

/// Whoever reads the requests; it ends with the answers.
struct Reading(JoinHandle<()>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Ordered(Answers, #[allow(dead_code, reason = "dropped with the answers")] Reading);

impl Stream for Ordered {
    type Item = Result<Pending, Status>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.get_mut().0.poll_recv(context)
    }
}

async fn read(
    dispatch: Arc<Dispatch>,
    caller: Caller,
    mut requests: Streaming<ModelInferRequest>,
    answers: mpsc::Sender<Result<Pending, Status>>,
) {
    loop {
        // Room first: what cannot run yet stays on the wire.
        let Ok(room) = answers.reserve().await else { return };
        match requests.message().await {
            Ok(Some(request)) => room.send(Ok(start(&dispatch, &caller, request))),
            Ok(None) => return,
            Err(status) => return room.send(Err(status)),
        }
    }
}

fn start(dispatch: &Arc<Dispatch>, caller: &Caller, request: ModelInferRequest) -> Pending {
    let (dispatch, caller) = (Arc::clone(dispatch), caller.clone());
    let id = request.id.clone();
    // The stream itself is counted by the gate, and gives its bytes back for each message.
    let bytes = request.encoded_len() as u64;
    let counted = (caller.account().hold(Unit::Calls, 1), caller.account().hold(Unit::InFlightBytes, bytes));
    Pending(tokio::spawn(async move {
        match counted {
            (Ok(call), Ok(mut bytes)) => {
                let ran = dispatch.infer(&caller, request).await;
                let ran =
                    ran.and_then(|response| bytes.grow(response.encoded_len() as u64).map(|()| response));
                (answer(ran, id), Some((call, bytes)))
            }
            (Err(refusal), _) | (_, Err(refusal)) => (answer(Err(refusal), id), None),
        }
    }))
}

fn answer(ran: Result<ModelInferResponse, Error>, id: String) -> ModelStreamInferResponse {
    let last = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(true)) };
    let last = HashMap::from([("triton_final_response".to_owned(), last)]);
    match ran {
        Ok(mut response) => {
            response.parameters.extend(last);
            ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) }
        }
        Err(error) => {
            let response = ModelInferResponse { id, parameters: last, ..ModelInferResponse::default() };
            ModelStreamInferResponse { error_message: error.message().into(), infer_response: Some(response) }
        }
    }
}
