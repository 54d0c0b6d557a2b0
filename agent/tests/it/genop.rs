//! vAccel's generic operation: numbers and arguments of both schemes, and what is refused of them.

use vaccel_client::proto::error::Detail;
use vaccel_client::proto::v1::GenopRequest;
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::run_reply::Outcome;
use vaccel_client::proto::v1::{RunRequest, run_request::Op};
use vaccel_client::{
    Arg, ArgType, ClassifyOptions, Client, Error, Reason, ResourceFiles, Session, arg, room,
};

use crate::support::{Agent, digits, onnx, read};

fn number(number: u8) -> Arg {
    arg(ArgType::Uint8, vec![number])
}

fn int64(value: i64) -> Arg {
    arg(ArgType::Int64, value.to_le_bytes().to_vec())
}

fn int32(value: i32) -> Arg {
    arg(ArgType::Int32, value.to_le_bytes().to_vec())
}

fn float32(value: f32) -> Arg {
    arg(ArgType::Float32, value.to_le_bytes().to_vec())
}

fn f32s(values: &[f32]) -> Arg {
    arg(ArgType::Float32Array, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}

fn text(text: &str) -> Arg {
    arg(ArgType::String, format!("{text}\0").into_bytes())
}

/// The name of the class that the first digit shows, with its NUL.
async fn shown(session: &Session) -> Vec<u8> {
    let image = read(&digits("png")[0].0);
    let labels = session.classify([image], ClassifyOptions::default()).await.unwrap();
    format!("{}\0", labels[0][0].name).into_bytes()
}

fn of_f32s(arg: &Arg) -> Vec<f32> {
    arg.data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn of_f64s(arg: &Arg) -> Vec<f64> {
    arg.data.chunks_exact(8).map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// Reads and writes of `c = 2 a b + 3 c` with rows of `c` 3 apart.
fn sgemm() -> (Vec<Arg>, Vec<Arg>) {
    let (a, b) = (f32s(&[1.0, 2.0, 3.0, 4.0]), f32s(&[5.0, 6.0, 7.0, 8.0]));
    let sizes = [number(17), int64(2), int64(2), int64(2), float32(2.0)];
    let read = sizes.into_iter().chain([a, int64(2), b, int64(0), float32(3.0), int64(3)]);
    (read.collect(), vec![f32s(&[1.0, 1.0, -1.0, 1.0, 1.0])])
}

#[tokio::test]
async fn operations_are_called_by_number_with_vaccels_arguments() {
    let agent = Agent::unix(&[]);
    let (_, session) = agent.session().await;
    let call = async |read: Vec<Arg>, write: Vec<Arg>| session.genop(read, write).await.unwrap().0;
    assert!(call(vec![number(0)], vec![]).await.is_empty());

    let (read_args, write) = sgemm();
    let written = call(read_args, write).await;
    assert_eq!(of_f32s(&written[0]), [41.0, 47.0, -1.0, 89.0, 103.0], "what lies between the rows stays");

    let ints = arg(ArgType::Int32Array, [7_i32, -8].map(i32::to_le_bytes).concat());
    let written = call(vec![number(18), ints.clone()], vec![room(ArgType::Int32Array, 8)]).await;
    assert_eq!(written[0].data, ints.data);
    let (a, b) = (f32s(&[1.0, 2.0, 3.0, 4.0]), f32s(&[5.0, 6.0, 7.0, 8.0]));
    let space = || room(ArgType::Float32Array, 16);
    let written = call(vec![number(19), a.clone(), b.clone()], vec![space()]).await;
    assert_eq!(of_f32s(&written[0]), [19.0, 22.0, 43.0, 50.0]);
    let written = call(vec![number(20), a.clone(), b.clone()], vec![space(), space()]).await;
    assert_eq!(of_f32s(&written[0]), [6.0, 8.0, 10.0, 12.0]);
    assert_eq!(of_f32s(&written[1]), [5.0, 12.0, 21.0, 32.0]);
    let written = call(vec![number(21), a, b], vec![space()]).await;
    assert_eq!(of_f32s(&written[0]), [6.0, 8.0, 10.0, 12.0]);

    let data = arg(ArgType::Float64Array, [5.0_f64, -3.0, 20.0].map(f64::to_le_bytes).concat());
    let rooms = [24, 8, 8].map(|bytes| room(ArgType::Float64Array, bytes)).to_vec();
    let written = call(vec![number(22), data, int32(3), int32(0), int32(10)], rooms).await;
    assert_eq!(of_f64s(&written[0]), [5.0, 0.0, 10.0]);
    assert_eq!((of_f64s(&written[1]), of_f64s(&written[2])), (vec![-3.0], vec![20.0]));

    let image = arg(ArgType::Buffer, read(&digits("png")[0].0));
    let rooms = vec![room(ArgType::UcharArray, 64), room(ArgType::UcharArray, 64)];
    let written = call(vec![number(3), image.clone()], rooms).await;
    assert_eq!(&written[0].data[..], b"\0", "there is no image of it");
    assert_eq!(written[1].data, shown(&session).await);
    let rooms = vec![room(ArgType::UcharArray, 1), room(ArgType::UcharArray, 3)];
    let written = call(vec![number(3), image], rooms).await;
    assert_eq!((written[0].data.len(), written[1].data.len()), (1, 3), "texts are cut to their room");

    // The profile has them by their own names.
    let profile = session.profile().await.unwrap();
    let count = |name: &str| profile.iter().find(|calls| calls.name == name).unwrap().call.unwrap().count;
    assert_eq!((count("sgemm"), count("image_classification"), count("noop")), (1, 3, 1));
}

/// A request of the scheme before vAccel 0.6, where arguments have no types.
async fn legacy(
    client: &Client,
    session: &Session,
    read: Vec<Arg>,
    write: Vec<Arg>,
) -> Result<Vec<Arg>, Error> {
    let op = Some(Op::Genop(GenopRequest { legacy: false, read, write }));
    let request = RunRequest { session: session.id(), op, ..RunRequest::default() };
    let reply = OperationsClient::new(client.link().clone()).run(request).await;
    match reply.map_err(|status| Error::from_status(&status))?.into_inner().outcome {
        Some(Outcome::Genop(genop)) => Ok(genop.write),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn numbers_and_arguments_before_0_6_are_understood() {
    let agent = Agent::unix(&[]);
    let (client, session) = agent.session().await;
    let raw = |mut args: Vec<Arg>| {
        args.iter_mut().for_each(|arg| arg.kind = ArgType::Raw.into());
        args
    };
    let old = |number: u32| arg(ArgType::Raw, number.to_le_bytes().to_vec());
    let (mut read_args, mut write) = sgemm();
    read_args[0] = old(1);
    // Without the distances between rows.
    for index in [10, 8, 6] {
        read_args.remove(index);
    }
    write[0] = f32s(&[1.0; 4]);
    let written = legacy(&client, &session, raw(read_args), raw(write)).await.unwrap();
    assert_eq!(of_f32s(&written[0]), [41.0, 47.0, 89.0, 103.0]);
    let image = arg(ArgType::Raw, read(&digits("png")[0].0));
    let rooms = vec![room(ArgType::Raw, 64), room(ArgType::Raw, 64)];
    let written = legacy(&client, &session, vec![old(2), image], rooms).await.unwrap();
    assert_eq!(written[0].data, shown(&session).await, "the text comes first");
    let (a, b) = (f32s(&[1.0]), f32s(&[2.0]));
    let rooms = vec![room(ArgType::Raw, 4)];
    let written = legacy(&client, &session, raw(vec![old(19), a, b]), rooms).await.unwrap();
    assert_eq!(of_f32s(&written[0]), [3.0]);
    for (number, reason) in
        [(27, Reason::UnknownOperation), (7, Reason::BadArgument), (9, Reason::UnknownOperation)]
    {
        let refusal = legacy(&client, &session, vec![old(number)], vec![]).await.unwrap_err();
        assert_eq!(refusal.reason(), reason, "{number}: {refusal}");
    }
}

#[tokio::test]
async fn arguments_that_are_not_the_operations_are_refused_by_their_place() {
    let agent = Agent::unix(&[]);
    let (_, session) = agent.session().await;
    let changed = |change: &dyn Fn(&mut Vec<Arg>, &mut Vec<Arg>)| {
        let (mut read_args, mut write) = sgemm();
        change(&mut read_args, &mut write);
        (read_args, write)
    };
    for (what, (read_args, write), field) in [
        ("nothing", (vec![], vec![]), "read[0]"),
        ("a number of 2 bytes", (vec![arg(ArgType::Uint16, vec![0, 0])], vec![]), "read[0]"),
        ("another type", changed(&|read, _| read[1] = float32(2.0)), "read[1]"),
        ("an unknown type", changed(&|read, _| read[1].kind = 99), "read[1]"),
        ("too few bytes", changed(&|read, _| read[1].data.truncate(4)), "read[1]"),
        ("half a number", changed(&|read, _| read[5].data.truncate(15)), "read[5]"),
        ("one too few", changed(&|read, _| drop(read.pop())), "read[10]"),
        ("one too many", changed(&|read, _| read.push(int64(0))), "read"),
        ("no room", changed(&|_, write| write.clear()), "read[0]"),
        ("two rooms", changed(&|_, write| write.push(write[0].clone())), "write"),
        ("rows that do not fit", changed(&|_, write| write[0].data.truncate(16)), "matrices[2].data"),
        ("a text that is none", (vec![number(1), arg(ArgType::String, vec![0xff])], vec![]), "read[1]"),
        ("endless", (vec![number(1); 257], vec![]), "read"),
    ] {
        let refusal = session.genop(read_args, write).await.expect_err(what);
        assert_eq!(refusal.reason(), Reason::BadArgument, "{what}: {refusal}");
        assert_eq!(refusal.detail(), &Detail::Field(field.into()), "{what}: {refusal}");
    }
    let small = session.genop(vec![number(18), int32s()], vec![room(ArgType::Int32Array, 7)]).await;
    assert!(small.unwrap_err().message().contains("room for 8 bytes"));
    for (wrong, named) in [(24, "0 to 23"), (255, "0 to 23"), (10, "tf_model_run"), (16, "torch_sgemm")] {
        let refusal = session.genop(vec![number(wrong)], vec![]).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::UnknownOperation, "{refusal}");
        assert!(refusal.message().contains(named), "{refusal}");
    }
    for sight in 4..=7 {
        let read_args = vec![number(sight), arg(ArgType::Buffer, vec![1])];
        let refusal = session.genop(read_args, vec![room(ArgType::UcharArray, 65)]).await.unwrap_err();
        assert_eq!(refusal.detail(), &Detail::Field("model".into()), "the session has none: {refusal}");
    }
    for library in [1, 2] {
        let refusal = session.genop(vec![number(library), text("a"), text("b")], vec![]).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::Disabled, "{refusal}");
    }
}

fn int32s() -> Arg {
    arg(ArgType::Int32Array, [7_i32, -8].map(i32::to_le_bytes).concat())
}

#[tokio::test]
async fn the_noop_engine_writes_what_vaccels_plugin_writes() {
    let agent = Agent::unix(&["--engine", "noop"]);
    let (_, session) = agent.session().await;
    let call = async |read: Vec<Arg>, write: Vec<Arg>| session.genop(read, write).await.unwrap().0;
    let (read_args, write) = sgemm();
    let before = write[0].data.clone();
    assert_eq!(call(read_args, write).await[0].data, before, "c stays");
    let image = || arg(ArgType::Buffer, vec![1, 2, 3]);
    let space = || room(ArgType::UcharArray, 64);
    let name = &b"This is a dummy imgname!\0"[..];
    let written = call(vec![number(3), image()], vec![space(), space()]).await;
    assert_eq!(written[0].data, name);
    assert_eq!(written[1].data, &b"This is a dummy classification tag!\0"[..]);
    for operation in 4..=7 {
        assert_eq!(call(vec![number(operation), image()], vec![space()]).await[0].data, name);
    }
    let exec = [number(1), text("libmytestlib.so"), text("mytest"), int32(5)].to_vec();
    let written = call(exec.clone(), vec![room(ArgType::Int32, 4)]).await;
    assert_eq!(written[0].data, 5_i32.to_le_bytes().to_vec(), "the first argument read");
    let written = call(exec, vec![room(ArgType::Int32, 8)]).await;
    assert!(written[0].data.is_empty(), "of another size it stays");
    let library =
        ResourceFiles::new(vaccel_client::ResourceKind::Library, vec![("l.so".into(), onnx::echo())]);
    let library = session.register(library).await.unwrap();
    let exec = [number(2), text(library.id()), text("mytest"), int32(6)].to_vec();
    assert_eq!(call(exec, vec![room(ArgType::Int32, 4)]).await[0].data, 6_i32.to_le_bytes().to_vec());
}
