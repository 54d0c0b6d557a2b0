//! The numeric operations on a real agent: results against NumPy's, refusals with their fields, runs that stop.

use std::time::Duration;

use serde_json::Value;
use tonic::Request;
use vaccel_client::proto::error::Detail;
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::run_request::Op;
use vaccel_client::proto::v1::{
    FpgaArraycopyRequest, FpgaMmultRequest, FpgaParallelRequest, FpgaVectoraddRequest, MbenchRequest,
    MinmaxRequest, OpencvRequest, RunRequest, SgemmRequest, TorchSgemmRequest,
};
use vaccel_client::{
    CallOptions, Client, DType, Error, NamedTensor, Reason, Session, SessionOptions, Sgemm, Tensor, named,
};

use crate::support::{Agent, repository, until};

/// Of sums of some dozen products of numbers below 2.
const TOLERANCE: f64 = 1e-4;

/// The sizes of a product that takes a few hundred milliseconds, about the longest that a message can carry.
const LONG: [i64; 3] = [2890, 2890, 1446];

fn cases() -> Value {
    let text = std::fs::read_to_string(repository().join("agent/tests/data/compute.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn floats(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn ints(list: &Value) -> Vec<i64> {
    list.as_array().unwrap().iter().map(|number| number.as_i64().unwrap()).collect()
}

#[allow(clippy::cast_possible_truncation, reason = "written from numbers of 32 bits")]
fn f32s(list: &Value, shape: &[i64]) -> Tensor {
    let numbers: Vec<f32> = floats(list).into_iter().map(|number| number as f32).collect();
    Tensor::new(shape, &numbers).unwrap()
}

/// All elements as f64.
fn elements(tensor: &Tensor) -> Vec<f64> {
    match tensor.dtype() {
        DType::U8 => tensor.data.iter().map(|byte| f64::from(*byte)).collect(),
        DType::I16 => tensor.elements::<i16>().unwrap().iter().map(|number| f64::from(*number)).collect(),
        DType::F32 => tensor.elements::<f32>().unwrap().iter().map(|number| f64::from(*number)).collect(),
        _ => tensor.elements::<f64>().unwrap().to_vec(),
    }
}

#[track_caller]
fn close(what: &str, found: &Tensor, expected: &[f64], tolerance: f64) {
    let found = elements(found);
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance, "{what}[{index}]: {found} for {expected}");
    }
}

fn filled(shape: &[i64], number: f32) -> Tensor {
    let count = usize::try_from(shape.iter().product::<i64>()).unwrap();
    Tensor::new(shape, &vec![number; count]).unwrap()
}

#[tokio::test]
async fn products_equal_numpys() {
    let agent = Agent::start(&["unix://{}/s", "tcp://127.0.0.1:0"], &[]);
    for address in 0..2 {
        let client = agent.guest(address).await;
        let session = client.open_session(SessionOptions::default()).await.unwrap();
        for case in cases()["sgemm"].as_array().unwrap() {
            let flat = |name: &str| f32s(&case[name], &[i64::try_from(floats(&case[name]).len()).unwrap()]);
            let size = |name: &str| case[name].as_i64().unwrap();
            #[allow(clippy::cast_possible_truncation, reason = "small factors")]
            let factor = |name: &str| case[name].as_f64().unwrap() as f32;
            let product = Sgemm {
                m: size("m"),
                n: size("n"),
                k: size("k"),
                alpha: factor("alpha"),
                a: flat("a"),
                lda: size("lda"),
                b: flat("b"),
                ldb: size("ldb"),
                beta: factor("beta"),
                c: Some(flat("c")),
                ldc: size("ldc"),
            };
            let c = session.sgemm(product).await.unwrap();
            assert_eq!(c.shape, [size("m"), size("n")]);
            close("sgemm", &c, &floats(&case["expected"]), TOLERANCE);
        }
    }
}

#[tokio::test]
async fn arrays_and_bounds_equal_numpys() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let cases = cases();

    let case = &cases["minmax"];
    let shape = ints(&case["shape"]);
    let data = Tensor::new(&shape, &floats(&case["data"])).unwrap();
    let [low, high] = ["low", "high"].map(|name| i32::try_from(case[name].as_i64().unwrap()).unwrap());
    let found = session.minmax(data, low, high).await.unwrap();
    assert_eq!([Some(found.min), Some(found.max)], [case["min"].as_f64(), case["max"].as_f64()]);
    assert_eq!(found.out.shape, shape);
    close("minmax", &found.out, &floats(&case["out"]), 0.0);

    let case = &cases["pair"];
    let shape = ints(&case["shape"]);
    let [a, b] = ["a", "b"].map(|name| f32s(&case[name], &shape));
    let both = session.fpga_parallel(a.clone(), b.clone()).await.unwrap();
    assert_eq!([&both.add.shape, &both.mult.shape], [&shape, &shape]);
    close("add", &both.add, &floats(&case["add"]), 1e-6);
    close("mult", &both.mult, &floats(&case["mult"]), 1e-6);
    assert_eq!(session.fpga_vectoradd(a.clone(), b.clone()).await.unwrap(), both.add);

    let case = &cases["mmult"];
    for shape in [&[49][..], &[7, 7]] {
        let [a, b] = ["a", "b"].map(|name| f32s(&case[name], shape));
        let c = session.fpga_mmult(a.clone(), b.clone()).await.unwrap();
        assert_eq!(c.shape, shape);
        close("mmult", &c, &floats(&case["c"]), TOLERANCE);
        if shape.len() == 2 {
            let sum = session.torch_sgemm(a, b, filled(shape, 0.5)).await.unwrap();
            let expected: Vec<f64> = floats(&case["c"]).iter().map(|number| number + 0.5).collect();
            close("torch_sgemm", &sum, &expected, TOLERANCE);
        }
    }

    let array = Tensor::new(&[2, 3], &[1_i32, -2, i32::MIN, i32::MAX, 0, 7]).unwrap();
    let copy = session.fpga_arraycopy(array.clone()).await.unwrap();
    assert_eq!((copy.shape, copy.data), (array.shape, array.data));
    let nothing = Tensor::new::<f32>(&[0], &[]).unwrap();
    let sum = session.fpga_vectoradd(nothing.clone(), nothing.clone()).await.unwrap();
    assert_eq!((sum.shape, sum.data.len()), (vec![0], 0));
    assert_eq!(session.fpga_mmult(nothing.clone(), nothing).await.unwrap().shape, [0]);
}

#[tokio::test]
async fn images_equal_numpys() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    for case in cases()["opencv"].as_array().unwrap() {
        let bytes: Vec<u8> =
            ints(&case["image"]).into_iter().map(|byte| u8::try_from(byte).unwrap()).collect();
        let image = Tensor::new(&ints(&case["shape"]), &bytes).unwrap();
        let parameters: Vec<(&str, f64)> = case["parameters"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_f64().unwrap()))
            .collect();
        let function = case["function"].as_str().unwrap();
        let what = format!("{function} {parameters:?} of {:?}", image.shape);
        let result = session.opencv(function, &parameters, image).await.unwrap();
        assert_eq!(result.shape, ints(&case["expected_shape"]), "{what}");
        // Two ways to sum in f64 can round a half to either side.
        let tolerance = if ["resize", "GaussianBlur"].contains(&function) { 1.0 } else { 0.0 };
        let expected = floats(&case["expected"]);
        close(&what, &result, &expected, tolerance);
        let off = elements(&result).iter().zip(&expected).filter(|(a, b)| a != b).count();
        assert!(off * 20 <= expected.len(), "{what}: {off} of {} differ", expected.len());
    }
}

#[tokio::test]
async fn what_is_no_number_spreads_as_in_blas() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let nan = || filled(&[2, 2], f32::NAN);
    let product = |alpha, beta, a, c| {
        let sized = Sgemm::new(a, filled(&[2, 2], 3.0)).unwrap();
        session.sgemm(Sgemm { alpha, beta, c: Some(c), ..sized })
    };
    let one = || filled(&[2, 2], 1.0);
    assert_eq!(elements(&product(1.0, 0.0, one(), nan()).await.unwrap()), [6.0; 4]);
    assert_eq!(elements(&product(0.0, 2.0, nan(), one()).await.unwrap()), [2.0; 4]);
    assert!(elements(&product(1.0, 1.0, one(), nan()).await.unwrap()).iter().all(|number| number.is_nan()));
    assert!(elements(&product(1.0, 0.0, nan(), one()).await.unwrap()).iter().all(|number| number.is_nan()));
    let empty = Sgemm::new(filled(&[2, 0], 0.0), filled(&[0, 3], 0.0)).unwrap();
    let scaled = Sgemm { beta: -1.0, c: Some(filled(&[2, 3], 4.0)), ..empty };
    assert_eq!(elements(&session.sgemm(scaled).await.unwrap()), [-4.0; 6]);
    let data = Tensor::new(&[4], &[f64::NAN, 2.0, f64::INFINITY, -3.0]).unwrap();
    let found = session.minmax(data, -1, 1).await.unwrap();
    assert_eq!([found.min, found.max], [-3.0, f64::INFINITY]);
    assert!(elements(&found.out)[0].is_nan());
    assert_eq!(elements(&found.out)[1..], [1.0, 1.0, -1.0]);
}

#[tokio::test]
async fn the_noop_engine_answers_as_vaccels_noop_plugin() {
    let agent = Agent::unix(&[]);
    let client = agent.guest(0).await;
    let options = SessionOptions { engine: "noop".into(), ..SessionOptions::default() };
    let session = client.open_session(options).await.unwrap();
    let (a, b) = (filled(&[5], 1.5), filled(&[5], 2.0));
    assert_eq!(elements(&session.fpga_mmult(a.clone(), b.clone()).await.unwrap()), [f64::from(9.1_f32); 5]);
    assert_eq!(elements(&session.fpga_vectoradd(a.clone(), b.clone()).await.unwrap()), [3.5; 5]);
    let both = session.fpga_parallel(a, b).await.unwrap();
    assert_eq!([elements(&both.add), elements(&both.mult)], [[3.5; 5], [1.0; 5]]);
    let data = Tensor::new(&[2], &[7.0_f64, 8.0]).unwrap();
    let found = session.minmax(data.clone(), 0, 1).await.unwrap();
    assert_eq!((found.min, found.max, found.out.data), (-1.0, 10000.0, data.data));
    let copy = Tensor::new(&[2], &[7_i32, 8]).unwrap();
    assert_eq!(session.fpga_arraycopy(copy.clone()).await.unwrap().data, copy.data);
    let square = || filled(&[2, 2], 5.0);
    let product =
        Sgemm { beta: 3.0, c: Some(filled(&[7], 4.0)), ldc: 5, ..Sgemm::new(square(), square()).unwrap() };
    assert_eq!(elements(&session.sgemm(product).await.unwrap()), [4.0; 4]);
    assert_eq!(elements(&session.sgemm(Sgemm::new(square(), square()).unwrap()).await.unwrap()), [0.0; 4]);
    let sum = session.torch_sgemm(square(), square(), filled(&[2, 2], 4.0)).await.unwrap();
    assert_eq!(elements(&sum), [4.0; 4]);
    let image = Tensor::new(&[4, 7], &[9_u8; 28]).unwrap();
    let blurred = session.opencv("blur", &[("ksize", 3.0)], image).await.unwrap();
    assert_eq!(blurred.data[..9], [7, 0, 0, 0, 0, 0, 0, 0, 0]);
    session.mbench(Duration::from_millis(300_000)).await.unwrap();
}

/// Sends an operation as it is, past the client's checks.
async fn send(client: &Client, session: &Session, op: Op) -> Result<(), Error> {
    let request = RunRequest { session: session.id(), op: Some(op), ..RunRequest::default() };
    let reply = OperationsClient::new(client.link().clone()).run(Request::new(request)).await;
    reply.map(drop).map_err(|status| Error::from_status(&status))
}

fn flat(name: &str, count: i64) -> NamedTensor {
    named(name, filled(&[count], 1.0))
}

/// Requests that are wrong, each with the field that is.
fn wrong() -> Vec<(Op, &'static str)> {
    let sgemm = |sizes: [i64; 3], strides: [i64; 3], beta: f32, matrices: Vec<NamedTensor>| {
        let ([m, n, k], [lda, ldb, ldc]) = (sizes, strides);
        Op::Sgemm(SgemmRequest { m, n, k, alpha: 1.0, lda, ldb, beta, ldc, matrices })
    };
    let pair = |a: i64, b: i64| vec![flat("", a), flat("", b)];
    let halves = || Tensor::from_bytes(DType::F16, &[4], vec![0; 8].into());
    let torn = || Tensor::from_bytes(DType::F32, &[4], vec![0; 15].into());
    let bounds = |low_threshold, high_threshold, tensors| {
        Op::Minmax(MinmaxRequest { low_threshold, high_threshold, tensors })
    };
    let doubles = || vec![named("data", Tensor::new(&[1], &[1.0_f64]).unwrap())];
    let image = |shape: &[i64]| {
        let count = usize::try_from(shape.iter().product::<i64>()).unwrap();
        vec![named("image", Tensor::new(shape, &vec![1_u8; count]).unwrap())]
    };
    let opencv = |function: &str, parameters: &[(&str, f64)], tensors| {
        let parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        Op::Opencv(OpencvRequest { function: function.into(), parameters, tensors })
    };
    let max = i64::MAX;
    vec![
        (sgemm([-1, 2, 2], [0; 3], 0.0, pair(4, 4)), "m"),
        (sgemm([2, 2, 3], [0; 3], 0.0, pair(4, 4)), "matrices[0].data"),
        (sgemm([2, 2, 2], [1, 0, 0], 0.0, pair(4, 4)), "lda"),
        (sgemm([2, 2, 2], [0, max, 0], 0.0, pair(4, 4)), "matrices[1].data"),
        (sgemm([2, 2, max], [max; 3], 0.0, pair(4, 4)), "matrices[0].data"),
        (sgemm([2, 2, 2], [0, 0, -1], 0.0, pair(4, 4)), "ldc"),
        (sgemm([2, 2, 2], [0; 3], 1.0, pair(4, 4)), "matrices"),
        (sgemm([2, 2, 2], [0; 3], 0.0, vec![flat("a", 4), flat("B", 4)]), "matrices[1].name"),
        (sgemm([2, 2, 2], [0; 3], 0.0, vec![flat("a", 4), flat("a", 4)]), "matrices[1].name"),
        (sgemm([2, 2, 2], [0; 3], 0.0, vec![flat("", 4), named("", halves())]), "matrices[1].dtype"),
        (sgemm([2, 2, 2], [0; 3], 0.0, vec![flat("", 4), named("", torn())]), "matrices[1].data"),
        (Op::TorchSgemm(TorchSgemmRequest { tensors: pair(4, 4) }), "tensors"),
        (
            Op::TorchSgemm(TorchSgemmRequest { tensors: [pair(4, 4), vec![flat("", 4)]].concat() }),
            "tensors[0].shape",
        ),
        (bounds(2, 1, doubles()), "low_threshold"),
        (bounds(0, 1, vec![flat("data", 1)]), "tensors[0].dtype"),
        (bounds(0, 1, vec![]), "tensors"),
        (Op::FpgaArraycopy(FpgaArraycopyRequest { tensors: vec![flat("", 4)] }), "tensors[0].dtype"),
        (Op::FpgaMmult(FpgaMmultRequest { tensors: pair(5, 5) }), "tensors[0].shape"),
        (Op::FpgaMmult(FpgaMmultRequest { tensors: pair(4, 9) }), "tensors[1].shape"),
        (Op::FpgaParallel(FpgaParallelRequest { tensors: pair(4, 5) }), "tensors[1].shape"),
        (Op::FpgaVectoradd(FpgaVectoraddRequest { tensors: pair(5, 4) }), "tensors[1].shape"),
        (opencv("erode", &[], image(&[2, 2])), "function"),
        (opencv("blur", &[("ksize", 2.0)], image(&[2, 2])), "parameters.ksize"),
        (opencv("blur", &[("size", 3.0)], image(&[2, 2])), "parameters"),
        (opencv("cvtColor", &[("code", 6.0)], image(&[2, 2])), "tensors[0].shape"),
        (opencv("flip", &[("code", 0.0)], vec![flat("image", 4)]), "tensors[0].dtype"),
        (Op::Mbench(MbenchRequest { milliseconds: 300_001 }), "milliseconds"),
    ]
}

#[tokio::test]
async fn wrong_requests_are_refused_with_their_field_by_both_engines() {
    let agent = Agent::unix(&[]);
    let client = agent.guest(0).await;
    for engine in ["tract", "noop"] {
        let options = SessionOptions { engine: engine.into(), ..SessionOptions::default() };
        let session = client.open_session(options).await.unwrap();
        for (op, field) in wrong() {
            let told = format!("{engine}, {field}: {op:?}");
            // The noop plugin's product of arrays needs no square.
            if engine == "noop" && matches!(&op, Op::FpgaMmult(_)) && field == "tensors[0].shape" {
                continue;
            }
            let refusal = send(&client, &session, op).await.expect_err(&told);
            assert_eq!(refusal.reason(), Reason::BadArgument, "{told}: {refusal:?}");
            assert_eq!(refusal.detail(), &Detail::Field(field.into()), "{told}: {refusal:?}");
        }
    }
}

#[tokio::test]
async fn a_result_that_no_reply_could_carry_is_refused_before_it_has_memory() {
    let agent = Agent::unix(&[]);
    let (client, session) = agent.session().await;
    session.sgemm(Sgemm::new(filled(&[1, 1], 1.0), filled(&[1, 1], 1.0)).unwrap()).await.unwrap();
    let before = agent.peak();
    let column = |count: i64| vec![flat("a", count), flat("b", count)];
    let image = vec![named("image", Tensor::new(&[1, 1], &[1_u8]).unwrap())];
    let sides = [("width", 32768.0), ("height", 32768.0), ("interpolation", 0.0)];
    let parameters = sides.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    let wide = [filled(&[20_000, 1], 1.0), filled(&[1, 20_000], 1.0)].map(|tensor| named("", tensor));
    for op in [
        Op::Sgemm(SgemmRequest {
            m: 1 << 16,
            n: 1 << 16,
            k: 1,
            matrices: column(1 << 16),
            ..SgemmRequest::default()
        }),
        Op::Sgemm(SgemmRequest { m: i64::MAX, n: i64::MAX, matrices: column(0), ..SgemmRequest::default() }),
        Op::Opencv(OpencvRequest { function: "resize".into(), parameters, tensors: image }),
    ] {
        let refusal = send(&client, &session, op).await.expect_err("too large");
        assert_eq!(refusal.reason(), Reason::MessageTooLarge, "{refusal:?}");
        assert!(matches!(refusal.detail(), Detail::Limit { .. }), "{refusal:?}");
    }
    let [a, b] = wide;
    let torch = Op::TorchSgemm(TorchSgemmRequest { tensors: vec![a, b, flat("", 1)] });
    let refusal = send(&client, &session, torch).await.expect_err("c would be too large to come");
    assert_eq!(refusal.detail(), &Detail::Field("tensors[2].shape".into()));
    assert!(agent.peak() < before + (16 << 20), "{} bytes more", agent.peak() - before);
}

fn long() -> Sgemm {
    let [m, n, k] = LONG;
    Sgemm::new(filled(&[m, k], 0.5), filled(&[k, n], 0.25)).unwrap()
}

/// The agent computes nothing any more, and serves both tenants.
async fn rests(agent: &Agent, sessions: [&Session; 2]) {
    until("the end of the computation", async || !agent.computes()).await;
    for session in sessions {
        let small = Sgemm::new(filled(&[2, 2], 1.0), filled(&[2, 2], 1.0)).unwrap();
        assert_eq!(elements(&session.sgemm(small).await.unwrap()), [2.0; 4]);
    }
}

#[tokio::test]
async fn runs_that_nobody_waits_for_stop_and_leave_their_lane() {
    let agent = Agent::start(&["unix://{}/a", "unix://{}/b"], &["--lanes", "1"]);
    let clients = [agent.guest(0).await, agent.guest(1).await];
    let session = clients[0].open_session(SessionOptions::default()).await.unwrap();
    let neighbour = clients[1].open_session(SessionOptions::default()).await.unwrap();
    // More runs than a tenant may leave behind: every one of them ends.
    for milliseconds in [20, 35, 50, 65, 80, 95] {
        let deadline = Some(Duration::from_millis(milliseconds));
        let hurried = session.with(CallOptions { deadline, ..CallOptions::default() });
        let late = hurried.mbench(Duration::from_secs(300)).await.expect_err("300 s are longer");
        assert_eq!(late.reason(), Reason::Deadline, "{late:?}");
        // A fast machine may be done in the longest of these times.
        if let Err(late) = hurried.sgemm(long()).await {
            assert_eq!(late.reason(), Reason::Deadline, "{late:?}");
        }
        until("the end of the computation", async || !agent.computes()).await;
    }
    rests(&agent, [&session, &neighbour]).await;

    // Callers that leave while their run has the only lane.
    for long_run in [true, false] {
        let own = session.clone();
        let left = tokio::spawn(async move {
            if long_run {
                own.mbench(Duration::from_secs(300)).await
            } else {
                own.sgemm(long()).await.map(drop)
            }
        });
        until("the run", async || agent.computes()).await;
        left.abort();
        rests(&agent, [&neighbour, &session]).await;
    }
}

#[tokio::test]
async fn a_guest_that_computes_for_minutes_on_every_lane_has_them_not_for_itself() {
    let agent = Agent::start(&["unix://{}/a", "unix://{}/b"], &["--lanes", "2"]);
    let clients = [agent.guest(0).await, agent.guest(1).await];
    let greedy = clients[0].open_session(SessionOptions::default()).await.unwrap();
    let neighbour = clients[1].open_session(SessionOptions::default()).await.unwrap();
    let calls: Vec<_> = (0..6)
        .map(|_| {
            let session = greedy.clone();
            tokio::spawn(async move { session.mbench(Duration::from_secs(300)).await })
        })
        .collect();
    until("the runs", async || agent.computes()).await;
    let deadline = Some(Duration::from_secs(20));
    let neighbour = neighbour.with(CallOptions { deadline, ..CallOptions::default() });
    for _ in 0..4 {
        neighbour.mbench(Duration::from_millis(1)).await.expect("it has its turn");
    }
    calls.iter().for_each(tokio::task::JoinHandle::abort);
    rests(&agent, [&greedy, &neighbour]).await;
}

#[tokio::test]
async fn a_long_product_is_the_same_with_one_thread_and_with_many_calls_beside_it() {
    let agent = Agent::unix(&["--lanes", "3"]);
    let (_client, session) = agent.session().await;
    let [_, n, k] = LONG;
    let calls = (0..3).map(|_| {
        tokio::spawn({
            let session = session.clone();
            async move { session.sgemm(long()).await }
        })
    });
    let expected = f64::from(i32::try_from(k).unwrap()) * 0.125;
    for call in calls.collect::<Vec<_>>() {
        let c = call.await.unwrap().unwrap();
        assert_eq!(c.shape[1], n);
        assert!(elements(&c).iter().all(|number| (number - expected).abs() < 1e-3));
    }
}

#[tokio::test]
async fn the_client_refuses_before_it_sends() {
    // Nobody listens any more: what is refused never tried to connect.
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    agent.kill();
    let two = || filled(&[2, 2], 1.0);
    let field = |refusal: Error| match refusal.detail() {
        Detail::Field(path) => path.clone(),
        other => panic!("{other:?}: {refusal:?}"),
    };
    let tall = Sgemm::new(two(), filled(&[3, 2], 1.0)).expect_err("2 is not 3");
    assert_eq!(field(tall), "matrices[1].shape");
    let short = Sgemm { lda: 5, ..Sgemm::new(two(), two()).unwrap() };
    assert_eq!(field(session.sgemm(short).await.unwrap_err()), "matrices[0].data");
    let headless = Sgemm { beta: 1.0, ..Sgemm::new(two(), two()).unwrap() };
    assert_eq!(field(session.sgemm(headless).await.unwrap_err()), "matrices");
    assert_eq!(
        field(session.torch_sgemm(two(), two(), filled(&[4], 1.0)).await.unwrap_err()),
        "tensors[2].shape"
    );
    assert_eq!(field(session.minmax(two(), 0, 1).await.unwrap_err()), "tensors[0].dtype");
    assert_eq!(field(session.fpga_arraycopy(two()).await.unwrap_err()), "tensors[0].dtype");
    assert_eq!(
        field(session.fpga_vectoradd(two(), filled(&[4], 1.0)).await.unwrap_err()),
        "tensors[1].shape"
    );
    assert_eq!(field(session.opencv("blur", &[], two()).await.unwrap_err()), "tensors[0].dtype");
    assert_eq!(field(session.mbench(Duration::from_secs(301)).await.unwrap_err()), "milliseconds");
}
