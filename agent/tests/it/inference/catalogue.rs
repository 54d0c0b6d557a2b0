//! What callers are told when something is wrong, word by word: clients of this protocol look for these texts.

use bytes::Bytes;
use tonic::Code;
use vaccel_client::proto::inference::infer_parameter::ParameterChoice;
use vaccel_client::proto::inference::model_infer_request::InferRequestedOutputTensor;
use vaccel_client::proto::inference::{
    CudaSharedMemoryRegisterRequest, InferParameter, InferTensorContents, ModelInferRequest,
    ModelReadyRequest, ModelStatisticsRequest, RepositoryIndexRequest, RepositoryModelLoadRequest,
    RepositoryModelUnloadRequest, SystemSharedMemoryRegisterRequest,
};

use super::{floats, inference, numbers, request, start, tensor};

const UNKNOWN: &str = "[request id: <id_unknown>] ";

/// A run that is served.
fn good() -> ModelInferRequest {
    request("addone", tensor("input", "FP32", &[1, 16]), floats(&[1.0; 16]))
}

fn with(change: impl FnOnce(&mut ModelInferRequest)) -> ModelInferRequest {
    let mut request = good();
    change(&mut request);
    request
}

fn parameter(choice: ParameterChoice) -> InferParameter {
    InferParameter { parameter_choice: Some(choice) }
}

/// What is wrong, the request, and what is answered.
type Row = (&'static str, ModelInferRequest, Code, String);

/// The same with the words before it that say whose request it is.
fn own(text: &str) -> String {
    format!("{UNKNOWN}{text}")
}

fn wrong_names() -> Vec<Row> {
    let wrong = Code::InvalidArgument;
    vec![
        (
            "unknown model",
            with(|request| request.model_name = "nope".into()),
            Code::NotFound,
            "Request for unknown model: 'nope' is not found".into(),
        ),
        (
            "unknown version",
            with(|request| request.model_version = "7".into()),
            Code::NotFound,
            "Request for unknown model: 'addone' version 7 is not found".into(),
        ),
        (
            "a version that is no number",
            with(|request| request.model_version = "abc".into()),
            wrong,
            "failed to get model version from specified version string 'abc' (details: stol), version should be an \
             integral value > 0"
                .into(),
        ),
        (
            "wrong input name",
            with(|request| request.inputs[0].name = "x".into()),
            wrong,
            "unexpected inference input 'x' for model 'addone'".into(),
        ),
        (
            "missing input",
            with(|request| {
                request.inputs.clear();
                request.raw_input_contents.clear();
            }),
            wrong,
            own("expected 1 inputs but got 0 inputs for model 'addone'. Got input(s) [], but missing required \
                 input(s) ['input']. Please provide all required input(s)."),
        ),
        (
            "an input twice",
            with(|request| {
                request.inputs.push(request.inputs[0].clone());
                request.raw_input_contents.push(floats(&[1.0; 16]));
            }),
            wrong,
            own("input 'input' already exists in request"),
        ),
    ]
}

fn wrong_tensors() -> Vec<Row> {
    let wrong = Code::InvalidArgument;
    vec![
        (
            "wrong type",
            with(|request| request.inputs[0].datatype = "INT32".into()),
            wrong,
            own("inference input 'input' data-type is 'INT32', but model 'addone' expects 'FP32'"),
        ),
        (
            "a type that is none",
            with(|request| request.inputs[0].datatype = "FLOAT".into()),
            wrong,
            own("inference input 'input' data-type is '<invalid>', but model 'addone' expects 'FP32'"),
        ),
        (
            "wrong shape",
            with(|request| request.inputs[0].shape = vec![1, 8]),
            wrong,
            own(
                "unexpected shape for input 'input' for model 'addone'. Expected [-1,16], got [1,8]. The first size is \
                 the batch: max_batch_size of this model is not 0",
            ),
        ),
        (
            "a size below 0",
            with(|request| request.inputs[0].shape = vec![-1, 16]),
            wrong,
            own(
                "unexpected shape for input 'input' for model 'addone'. Expected at most 8 sizes of 0 or more, \
                 got [-1,16]",
            ),
        ),
        (
            "too large a batch",
            with(|request| {
                request.inputs[0].shape = vec![17, 16];
                request.raw_input_contents = vec![floats(&[1.0; 17 * 16])];
            }),
            wrong,
            own("inference request batch-size must be <= 16 for 'addone'"),
        ),
        (
            "no rows",
            with(|request| request.inputs[0].shape = vec![0, 16]),
            wrong,
            own("inference request batch-size must be >= 1 for 'addone'"),
        ),
        (
            "too few bytes",
            with(|request| request.raw_input_contents = vec![Bytes::from_static(&[0; 4])]),
            wrong,
            own("input byte size mismatch for input 'input' for model 'addone'. Expected 64, got 4"),
        ),
    ]
}

fn wrong_requests() -> Vec<Row> {
    let wrong = Code::InvalidArgument;
    vec![
        (
            "contents beside raw contents",
            with(|request| request.inputs[0].contents = Some(InferTensorContents::default())),
            wrong,
            "contents field must not be specified when using raw_input_contents for 'input' for model 'addone'".into(),
        ),
        (
            "more raw contents than inputs",
            with(|request| request.raw_input_contents.push(Bytes::new())),
            wrong,
            "expected 1 raw_input_contents for model 'addone', one for each input outside of shared memory, got 2"
                .into(),
        ),
        (
            "an output that is none",
            with(|request| {
                let output = InferRequestedOutputTensor { name: "zz".into(), ..Default::default() };
                request.outputs.push(output);
            }),
            wrong,
            "unexpected inference output 'zz' for model 'addone'".into(),
        ),
        (
            "a reserved parameter",
            with(|request| {
                request.parameters.insert("triton_x".into(), parameter(ParameterChoice::BoolParam(true)));
            }),
            wrong,
            "parameter keys starting with 'triton_' are reserved; 'triton_x' is not known".into(),
        ),
        (
            "shared memory that is none",
            with(|request| {
                let region = parameter(ParameterChoice::StringParam("nor".into()));
                let bytes = parameter(ParameterChoice::Int64Param(64));
                request.inputs[0].parameters.insert("shared_memory_region".into(), region);
                request.inputs[0].parameters.insert("shared_memory_byte_size".into(), bytes);
                request.raw_input_contents.clear();
            }),
            Code::NotFound,
            "Unable to find shared memory region: 'nor'".into(),
        ),
        (
            "the caller's own id",
            with(|request| {
                request.id = "call 7".into();
                request.inputs[0].shape = vec![0, 16];
            }),
            wrong,
            "[request id: call 7] inference request batch-size must be >= 1 for 'addone'".into(),
        ),
    ]
}

#[tokio::test]
async fn runs_that_are_wrong_are_told_so_in_the_words_that_clients_know() {
    let agent = start(|_| {}, &[]);
    let mut client = inference(agent.address()).await;
    for (what, request, code, message) in [wrong_names(), wrong_tensors(), wrong_requests()].concat() {
        let status = client.model_infer(request).await.expect_err(what);
        assert_eq!((status.code(), status.message()), (code, message.as_str()), "{what}");
    }
    // And nothing of it has hurt anybody.
    let reply = client.model_infer(good()).await.unwrap().into_inner();
    assert_eq!(numbers(&reply.raw_output_contents[0]), [1.0; 16]);
}

#[tokio::test]
async fn models_that_are_not_there_are_told_so_in_the_words_that_clients_know() {
    let agent = start(
        |models| {
            models.version("bad", 1, b"\x08\x08\x3a\x02\x0a\x00").config("none", "backend: \"python\"");
        },
        &[],
    );
    let mut client = inference(agent.address()).await;
    let load = |name: &str| RepositoryModelLoadRequest { model_name: name.into(), ..Default::default() };
    let status = client.repository_model_load(load("nope")).await.expect_err("unknown");
    let message = "failed to load 'nope', failed to poll from model repository";
    assert_eq!((status.code(), status.message()), (Code::Internal, message));

    let status = client.repository_model_load(load("bad")).await.expect_err("broken");
    assert_eq!(status.code(), Code::InvalidArgument);
    let begin = "load failed for model 'bad': version 1 is at UNAVAILABLE state: ";
    assert!(status.message().starts_with(begin), "{status:?}");
    let index = client.repository_index(RepositoryIndexRequest::default()).await.unwrap().into_inner();
    let states: Vec<_> =
        index.models.iter().map(|model| (&model.name[..], &model.version[..], &model.state[..])).collect();
    let expected = [("addone", "1", "READY"), ("bad", "1", "UNAVAILABLE"), ("none", "", "UNAVAILABLE")];
    assert_eq!(states, expected);
    assert!(index.models[2].reason.contains("python"), "{:?}", index.models[2]);

    let named = RepositoryModelLoadRequest { repository_name: "r".into(), ..load("addone") };
    let status = client.repository_model_load(named).await.expect_err("one repository");
    let message = "'repository_name' specification is not supported";
    assert_eq!((status.code(), status.message()), (Code::Unimplemented, message));

    let unload = RepositoryModelUnloadRequest { model_name: "addone".into(), ..Default::default() };
    for _ in 0..2 {
        client.repository_model_unload(unload.clone()).await.expect("again is the same");
    }
    let status = client.model_infer(good()).await.expect_err("unloaded");
    let message = "Request for unknown model: 'addone' has no available versions";
    assert_eq!((status.code(), status.message()), (Code::NotFound, message));
    let ready = |name: &str, version: &str| ModelReadyRequest { name: name.into(), version: version.into() };
    for asked in [ready("addone", ""), ready("nope", ""), ready("bad", "1"), ready("bad", "9")] {
        assert!(!client.model_ready(asked).await.unwrap().into_inner().ready);
    }
    client.repository_model_load(load("addone")).await.unwrap();
    assert!(client.model_ready(ready("addone", "1")).await.unwrap().into_inner().ready);

    let asked = ModelStatisticsRequest { name: "nope".into(), ..Default::default() };
    let status = client.model_statistics(asked).await.expect_err("unknown");
    let message = "requested model 'nope' is not available";
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, message));
}

#[tokio::test]
async fn shared_memory_that_cannot_be_is_refused_in_the_words_that_clients_know() {
    let agent = start(|_| {}, &[]);
    let mut client = inference(agent.address()).await;
    let register = |name: &str, key: &str, byte_size| SystemSharedMemoryRegisterRequest {
        name: name.into(),
        key: key.into(),
        offset: 0,
        byte_size,
    };
    for key in ["/nokey", "", "/", "../etc/passwd", "/a/b", "/.."] {
        let status = client.system_shared_memory_register(register("in", key, 64)).await.expect_err(key);
        let message = format!("Unable to open shared memory region: '{key}'");
        assert_eq!((status.code(), status.message()), (Code::Internal, &message[..]));
    }
    let mut far = inference(&agent.addresses[1]).await;
    let status =
        far.system_shared_memory_register(register("in", "/nokey", 64)).await.expect_err("not local");
    assert_eq!(status.code(), Code::PermissionDenied);

    let memory = tempfile::Builder::new().prefix("vaccel-test-").tempfile_in("/dev/shm").unwrap();
    memory.as_file().set_len(256).unwrap();
    let key = format!("/{}", memory.path().file_name().unwrap().to_str().unwrap());
    client.system_shared_memory_register(register("in", &key, 256)).await.unwrap();
    let status = client.system_shared_memory_register(register("in", &key, 64)).await.expect_err("taken");
    let message = "shared memory region 'in' already in manager";
    assert_eq!((status.code(), status.message()), (Code::AlreadyExists, message));
    for bytes in [257, u64::MAX, 0] {
        let status =
            client.system_shared_memory_register(register("other", &key, bytes)).await.expect_err("size");
        let message = "Invalid offset + byte size for shared memory region: 'other'";
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, message));
    }
    let place = |offset, bytes| {
        [
            ("shared_memory_region", ParameterChoice::StringParam("in".into())),
            ("shared_memory_offset", ParameterChoice::Int64Param(offset)),
            ("shared_memory_byte_size", ParameterChoice::Int64Param(bytes)),
        ]
        .map(|(name, choice)| (name.to_owned(), parameter(choice)))
    };
    let outside = with(|request| {
        request.inputs[0].parameters = place(224, 64).into();
        request.raw_input_contents.clear();
    });
    let status = client.model_infer(outside).await.expect_err("outside");
    let message = "Invalid offset + byte size for shared memory region: 'in'";
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, message));
    let output =
        |bytes| InferRequestedOutputTensor { name: "output".into(), parameters: place(64, bytes).into() };
    let status =
        client.model_infer(with(|request| request.outputs = vec![output(16)])).await.expect_err("small");
    let message = "shared memory size specified with the request for output 'output' (16 bytes) should be at least 64 \
                   bytes to hold the results";
    assert_eq!((status.code(), status.message()), (Code::Internal, message));
    client.model_infer(with(|request| request.outputs = vec![output(64)])).await.unwrap();
    assert_eq!(numbers(&std::fs::read(memory.path()).unwrap()[64..128]), [1.0; 16]);
    // A caller that makes it shorter hurts nobody but itself.
    memory.as_file().set_len(32).unwrap();
    let status =
        client.model_infer(with(|request| request.outputs = vec![output(64)])).await.expect_err("shorter");
    assert_eq!(status.code(), Code::InvalidArgument);
    client.model_infer(good()).await.unwrap();

    let register = CudaSharedMemoryRegisterRequest { name: "gpu".into(), ..Default::default() };
    let status = client.cuda_shared_memory_register(register).await.expect_err("no GPU");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().starts_with("failed to register shared memory region: invalid args"),
        "{status:?}"
    );
}

/// One call at a time, each of which takes a third of a second; one may wait.
const BUSY: &str = r#"
backend: "identity"
max_batch_size: 1
dynamic_batching { default_queue_policy { POLICY } }
input [ { name: "input" data_type: TYPE_FP32 dims: [ 16 ] } ]
output [ { name: "output" data_type: TYPE_FP32 dims: [ 16 ] } ]
parameters { key: "run_us" value { string_value: "300000" } }
"#;

#[tokio::test]
async fn calls_that_wait_are_told_so_in_the_words_that_clients_know() {
    let agent = start(
        |models| {
            models.config("full", &BUSY.replace("POLICY", "max_queue_size: 1"));
            models.config("late", &BUSY.replace("POLICY", "default_timeout_microseconds: 20000"));
        },
        &[],
    );
    let client = inference(agent.address()).await;
    for (model, words) in [("full", "Exceeds maximum queue size"), ("late", "Request timeout expired")] {
        let calls: Vec<_> = (0..5)
            .map(|_| {
                let (mut client, asked) = (client.clone(), with(|request| request.model_name = model.into()));
                tokio::spawn(async move { client.model_infer(asked).await })
            })
            .collect();
        let mut served = 0;
        for call in calls {
            match call.await.unwrap() {
                Ok(_) => served += 1,
                Err(status) => {
                    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                    assert!(status.message().starts_with(&format!("{UNKNOWN}{words}")), "{status:?}");
                }
            }
        }
        assert!((1..5).contains(&served), "{model}: {served} of 5");
    }
    let mut asked = tonic::Request::new(with(|request| request.model_name = "full".into()));
    asked.set_timeout(std::time::Duration::from_millis(20));
    let status = client.clone().model_infer(asked).await.expect_err("it takes longer");
    assert_eq!(status.code(), Code::DeadlineExceeded);
}
