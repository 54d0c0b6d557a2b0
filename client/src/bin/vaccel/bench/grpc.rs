//! The protocol over gRPC.

use std::time::Duration;

use tonic::{Request, Response, Status};
use vaccel_client::proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use vaccel_client::proto::inference::model_infer_request::InferInputTensor;
use vaccel_client::proto::inference::{
    ModelConfigRequest, ModelInferRequest, ModelMetadataRequest, ModelStatisticsRequest,
};
use vaccel_client::{Error, Link, Reason};

use super::counters::Counters;
use super::inputs::{Description, Input, Port};

/// Calls over one connection, which clones share.
#[derive(Clone)]
pub(crate) struct Grpc {
    link: Link,
    client: GrpcInferenceServiceClient<Link>,
}

impl Grpc {
    pub(crate) fn new(link: Link) -> Self {
        let client = GrpcInferenceServiceClient::new(link.clone());
        Self { link, client }
    }

    pub(crate) async fn describe(&mut self, model: &str, time: Duration) -> Result<Description, Error> {
        let (name, version) = (model.to_owned(), String::new());
        let asked = ModelMetadataRequest { name: name.clone(), version: version.clone() };
        let metadata = answer(self.client.model_metadata(timed(asked, time)).await)?;
        let inputs = metadata.inputs.into_iter();
        let inputs =
            inputs.map(|input| Port { name: input.name, datatype: input.datatype, shape: input.shape });
        let asked = self.client.model_config(timed(ModelConfigRequest { name, version }, time)).await;
        let config = if_served(answer(asked))?.and_then(|reply| reply.config);
        let rows_max = config.map(|config| i64::from(config.max_batch_size));
        Ok(Description { inputs: inputs.collect(), rows_max })
    }

    pub(crate) async fn counters(&mut self, model: &str, time: Duration) -> Result<Option<Counters>, Error> {
        let asked = ModelStatisticsRequest { name: model.to_owned(), version: String::new() };
        let reply = if_served(answer(self.client.model_statistics(timed(asked, time)).await))?;
        Ok(reply.map(|reply| Counters::of(&reply.model_stats)))
    }

    pub(crate) async fn infer(&self, call: &ModelInferRequest, time: Duration) -> Result<(), Error> {
        self.link.infer(call, time).await.map(drop)
    }
}

/// The call that is made again and again.
pub(crate) fn call(model: &str, inputs: &[Input]) -> ModelInferRequest {
    let mut call = ModelInferRequest { model_name: model.into(), ..ModelInferRequest::default() };
    for Input { name, datatype, shape, data } in inputs.iter().cloned() {
        call.inputs.push(InferInputTensor { name, datatype, shape, ..InferInputTensor::default() });
        call.raw_input_contents.push(data);
    }
    call
}

fn timed<M>(message: M, time: Duration) -> Request<M> {
    let mut request = Request::new(message);
    request.set_timeout(time);
    request
}

fn answer<M>(reply: Result<Response<M>, Status>) -> Result<M, Error> {
    reply.map(Response::into_inner).map_err(|status| Error::from_status(&status))
}

/// None from a server that has only the protocol itself and not this extension.
fn if_served<M>(answer: Result<M, Error>) -> Result<Option<M>, Error> {
    match answer {
        Err(error) if error.reason() == Reason::UnknownOperation => Ok(None),
        answer => answer.map(Some),
    }
}
