//! The protocol over HTTP/1.1, with JSON and binary tensors behind it.

use bytes::{BufMut, Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use http::{HeaderName, Request, Response, StatusCode};
use serde_json::{Value, json};
use vaccel_client::{Error, Http1, Reason};

use super::counters::{Counters, of_json, whole};
use super::inputs::{Description, Input, Port};

/// Where the tensors begin behind the JSON.
const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// Calls over a connection of its own.
#[derive(Clone)]
pub(crate) struct Http {
    connection: Http1,
}

/// The call that is made again and again.
pub(crate) struct Call {
    request: Request<()>,
    body: Bytes,
}

impl Http {
    pub(crate) fn new(connection: Http1) -> Self {
        Self { connection }
    }

    pub(crate) async fn describe(&mut self, model: &str) -> Result<Description, Error> {
        let metadata = self.get(&path(model, "")).await?.into_document()?;
        let config = self.get(&path(model, "/config")).await?.if_served()?;
        let rows_max = config.map(|config| whole(&config["max_batch_size"]).unwrap_or(0));
        Ok(Description { inputs: ports(&metadata)?, rows_max })
    }

    pub(crate) async fn counters(&mut self, model: &str) -> Result<Option<Counters>, Error> {
        let answer = self.get(&path(model, "/stats")).await?.if_served()?;
        Ok(answer.as_ref().map(of_json))
    }

    pub(crate) async fn infer(&mut self, call: &Call) -> Result<(), Error> {
        let request = call.request.clone().map(|()| call.body.clone());
        let answer = Answer(self.connection.send(request).await?);
        // What is in it is not looked at: reading JSON would be the caller's time, not the server's.
        if answer.0.status().is_success() { Ok(()) } else { Err(answer.refusal()) }
    }

    async fn get(&mut self, path: &str) -> Result<Answer, Error> {
        let request = Request::get(path).body(Bytes::new()).map_err(|error| unspeakable(&error))?;
        Ok(Answer(self.connection.send(request).await?))
    }
}

/// Prepares the call.
pub(crate) fn call(model: &str, inputs: &[Input]) -> Result<Call, Error> {
    let described = |Input { name, datatype, shape, data }: &Input| {
        let parameters = json!({"binary_data_size": data.len()});
        json!({"name": name, "datatype": datatype, "shape": shape, "parameters": parameters})
    };
    let inputs_json: Vec<Value> = inputs.iter().map(described).collect();
    let head = json!({"inputs": inputs_json, "parameters": {"binary_data_output": true}}).to_string();
    let mut body = BytesMut::from(head.as_bytes());
    for input in inputs {
        body.put_slice(&input.data);
    }
    let request = Request::post(path(model, "/infer"))
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(HEADER_LENGTH, head.len())
        .body(())
        .map_err(|error| unspeakable(&error))?;
    Ok(Call { request, body: body.freeze() })
}

struct Answer(Response<Bytes>);

impl Answer {
    fn into_document(self) -> Result<Value, Error> {
        if !self.0.status().is_success() {
            return Err(self.refusal());
        }
        serde_json::from_slice(self.0.body()).map_err(|error| not_the_protocol(&format!("no JSON: {error}")))
    }

    /// None from a server that has only the protocol itself and not this extension. That the model exists is known.
    fn if_served(self) -> Result<Option<Value>, Error> {
        let absent = [StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED, StatusCode::NOT_IMPLEMENTED];
        if absent.contains(&self.0.status()) { Ok(None) } else { self.into_document().map(Some) }
    }

    fn refusal(&self) -> Error {
        let status = self.0.status();
        let document: Value = serde_json::from_slice(self.0.body()).unwrap_or_default();
        let message = match document["error"].as_str() {
            Some(message) => message.to_owned(),
            None => format!("the server answers {status}"),
        };
        Error::new(reason(status), message)
    }
}

fn reason(status: StatusCode) -> Reason {
    match status {
        StatusCode::BAD_REQUEST => Reason::BadArgument,
        StatusCode::UNAUTHORIZED => Reason::Unauthenticated,
        StatusCode::FORBIDDEN => Reason::Denied,
        StatusCode::NOT_FOUND => Reason::NotFound,
        StatusCode::CONFLICT => Reason::Disabled,
        StatusCode::PAYLOAD_TOO_LARGE => Reason::MessageTooLarge,
        StatusCode::TOO_MANY_REQUESTS => Reason::QuotaExceeded,
        StatusCode::NOT_IMPLEMENTED => Reason::UnknownOperation,
        StatusCode::SERVICE_UNAVAILABLE => Reason::Overloaded,
        StatusCode::GATEWAY_TIMEOUT => Reason::Deadline,
        _ => Reason::BackendFailed,
    }
}

fn ports(metadata: &Value) -> Result<Vec<Port>, Error> {
    let port = |input: &Value| {
        let text = |name: &str| input[name].as_str().map(str::to_owned);
        let shape = input["shape"].as_array()?.iter().map(whole).collect::<Option<_>>()?;
        Some(Port { name: text("name")?, datatype: text("datatype")?, shape })
    };
    let inputs = metadata["inputs"].as_array().and_then(|inputs| inputs.iter().map(port).collect());
    inputs.ok_or_else(|| not_the_protocol("metadata without inputs"))
}

fn not_the_protocol(got: &str) -> Error {
    let expected = "expected a server of the Open Inference Protocol";
    Error::new(
        Reason::BackendFailed,
        format!("{expected}, got {got}; is it one, and is this its port for HTTP?"),
    )
}

fn unspeakable(error: &http::Error) -> Error {
    Error::new(Reason::BadArgument, format!("there is no request for this model: {error}"))
}

/// A path of the model, whose name may hold anything.
fn path(model: &str, rest: &str) -> String {
    let mut path = String::from("/v2/models/");
    for byte in model.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("%{byte:02X}"));
        }
    }
    path + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_stand_behind_the_json() {
        let input = |name: &str, data: &'static [u8]| Input {
            name: name.into(),
            datatype: "UINT8".into(),
            shape: vec![1, 3],
            data: Bytes::from_static(data),
        };
        let call = call("a b/ü", &[input("x", &[1, 2, 3]), input("y", &[4, 5, 6])]).unwrap();
        assert_eq!(call.request.uri(), "/v2/models/a%20b%2F%C3%BC/infer");
        let length: usize = call.request.headers()[HEADER_LENGTH].to_str().unwrap().parse().unwrap();
        let head: Value = serde_json::from_slice(&call.body[..length]).unwrap();
        assert_eq!(head["inputs"][1]["parameters"]["binary_data_size"], 3);
        assert_eq!(head["inputs"][0]["shape"], json!([1, 3]));
        assert_eq!(&call.body[length..], [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn metadata_and_refusals_are_read() {
        let metadata = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, "4"]}]});
        assert_eq!(ports(&metadata).unwrap()[0].shape, [-1, 4]);
        for other in [json!({}), json!({"inputs": [{"name": "x"}]}), json!([])] {
            assert!(ports(&other).unwrap_err().message().contains("its port for HTTP"));
        }
        let answer = |status: u16, body: &'static str| {
            Answer(Response::builder().status(status).body(Bytes::from_static(body.as_bytes())).unwrap())
        };
        let refusal = answer(429, r#"{"error": "enough"}"#).refusal();
        assert_eq!((refusal.reason(), refusal.message()), (Reason::QuotaExceeded, "enough"));
        assert!(answer(502, "<html>").into_document().unwrap_err().message().contains("502 Bad Gateway"));
        assert!(answer(200, "<html>").into_document().unwrap_err().message().contains("no JSON"));
        assert!(answer(404, "").if_served().unwrap().is_none());
        assert!(answer(200, "{}").if_served().unwrap().is_some());
        assert!(answer(401, "").if_served().is_err());
    }
}
