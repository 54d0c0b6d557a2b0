//! Models on a device: what carries, keeps and launches, on the driver of the tests, whose "device memory" the library
//! of the processor can read. What cannot be had here is CUDA's own part of the library.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::task::Waker;
use std::time::Duration;

use tokio::time::Instant;
use vaccel_proto::v1::Tensor;

use super::super::cuda::Ledger;
use super::super::{Asked, Choice, Engines, Origin, RunRules, fake_cuda};
use super::*;
use crate::config::{Config, DeviceConfig, EngineConfig, Settings, TenantLimits};
use crate::identity::Tenant;
use crate::onward::Listener;
use crate::quota::{Accounts, Unit};
use crate::scheduler::{Asker, Batcher, Batching, Call, Scheduler};
use crate::shared::Mapping;

#[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "shared with other tests")]
#[path = "../../../tests/it/support/onnx.rs"]
mod onnx;

/// What a model's memory is counted as.
const CHARGE: u64 = 1000;

fn library() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/onnxruntime/libonnxruntime.so");
    assert!(path.is_file(), "no ONNX Runtime at {}: run ./test once, it installs it", path.display());
    path
}

fn engine() -> OnnxRuntime {
    OnnxRuntime::load(&library(), Share { threads: 1, bytes: 1 << 30 }).expect("the library is there")
}

fn cuda(folder: &Path, bytes_max: Option<u64>) -> Arc<Cuda> {
    let libraries = vec![fake_cuda::build(folder, &[])];
    Arc::new(Cuda::find(&DeviceConfig { libraries, bytes_max, ..DeviceConfig::default() }))
}

/// The program of a model on the first device.
fn program(cuda: &Arc<Cuda>, model: Bytes) -> Result<DeviceProgram, Error> {
    program_of(cuda, model, None)
}

fn program_of(
    cuda: &Arc<Cuda>,
    model: Bytes,
    account: Option<&Arc<Account>>,
) -> Result<DeviceProgram, Error> {
    let file = ModelFile::scan(&[("model.onnx", model)], Origin::Guest)?;
    let ledger: Arc<Ledger> = Arc::clone(&cuda.devices()[0].ledger);
    let (bytes, owner, counted) = (file.bytes.clone(), account.cloned(), Arc::default());
    let of_model = Arc::clone(&counted);
    let load: Load = Arc::new(move |cancel| {
        let session = engine().session(&bytes, cancel).expect("a session");
        Ok(Loaded { session, charge: ledger.charge(owner.as_ref(), CHARGE)?.of(&of_model) })
    });
    let first = load(&Cancel::default())?;
    let again = device::fits_a_graph(&file.operators).then_some(load);
    let (cuda, account) = (Arc::clone(cuda), account.cloned());
    let place = Where { cuda, device: 0, account, bytes: CHARGE, counted, memory: AllocationDevice::CPU };
    DeviceProgram::new(first, place, again, [&file.inputs, &file.outputs])
}

fn run(program: &DeviceProgram, inputs: Vec<Tensor>) -> Result<Vec<Tensor>, Error> {
    program.run(inputs, &[0], u64::MAX, &Cancel::default())
}

fn rows(count: i64, first: f32) -> Tensor {
    let numbers: Vec<f32> = (0..2 * count).map(|_| first).collect();
    Tensor::new(&[count, 2], &numbers).expect("valid")
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.elements::<f32>().expect("numbers").to_vec()
}

#[test]
fn every_run_has_its_own_numbers_at_places_that_stay() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), None);
    let program = program(&cuda, onnx::add()).expect("loaded");
    // The first run of a shape tells sizes, the second has memory.
    for round in 1..u8::try_from(device::RUNS_MIN).expect("few") {
        for count in [1, 3, 0, 2] {
            let first = f32::from(round) * 10.0;
            let outputs = run(&program, vec![rows(count, first)]).expect("ran");
            assert_eq!(outputs[0].shape, [count, 2]);
            let expected = [first + 1.0, first + 2.0].repeat(usize::try_from(count).expect("small"));
            assert_eq!(numbers(&outputs[0]), expected, "round {round}, {count} rows");
        }
    }
    let ledger = Arc::clone(&cuda.devices()[0].ledger);
    // In and out of 1, 3, 0 and 2 rows of 8 bytes.
    assert_eq!(ledger.used(), CHARGE + 2 * (1 + 3 + 2) * 8);
    drop(program);
    Cuda::await_ends();
    assert_eq!(ledger.used(), 0, "all given back");
}

#[test]
fn what_callers_share_goes_up_from_where_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), None);
    let program = program(&cuda, onnx::add()).expect("loaded");
    let file = tempfile::tempfile().expect("a file");
    file.set_len(4096).expect("long enough");
    let memory = Mapping::new(&file, 4096).expect("mapped");
    assert!(program.takes_from(&memory));
    for first in [1.0_f32, 7.0, -3.0] {
        assert!(memory.write(64, bytemuck::cast_slice(&[first, first, first, first])));
        let data = memory.view(64..80).expect("within");
        assert!(cuda.held(&cuda.devices()[0], std::ptr::NonNull::from(&*data)).is_some());
        let outputs = run(&program, vec![Tensor::from_bytes(DType::F32, &[2, 2], data)]).expect("ran");
        assert_eq!(numbers(&outputs[0]), [first + 1.0, first + 2.0].repeat(2));
    }
}

#[test]
fn shapes_that_come_often_get_a_session_of_their_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), None);
    let ledger = Arc::clone(&cuda.devices()[0].ledger);
    let program = program(&cuda, onnx::add()).expect("loaded");
    let check = |count: i64, round: u32| {
        let first = f32::from(u16::try_from(round).expect("small"));
        let outputs = run(&program, vec![rows(count, first)]).expect("ran");
        let expected = [first + 1.0, first + 2.0].repeat(usize::try_from(count).expect("small"));
        assert_eq!(numbers(&outputs[0]), expected, "round {round}, {count} rows");
    };
    let places = |counts: &[u64]| 2 * 8 * counts.iter().sum::<u64>();
    for round in 1..device::RUNS_MIN {
        check(3, round);
        program.settle();
    }
    assert_eq!(ledger.used(), CHARGE + places(&[3]));
    assert!(!program.is_prepared(&[rows(3, 0.0)]));
    check(3, 0);
    program.settle();
    assert!(program.is_prepared(&[rows(3, 0.0)]) && !program.is_prepared(&[rows(4, 0.0)]));
    assert_eq!(ledger.used(), 2 * CHARGE + places(&[3]));
    // The other one takes all other shapes.
    for round in 1..device::RUNS_MIN {
        check(3, round);
        check(2, round);
    }
    assert_eq!(ledger.used(), 2 * CHARGE + places(&[2, 3]));
    assert_eq!(program.device_bytes(), ledger.used(), "what the model has is all that is counted");
    // As many as there may be, and then no more.
    for count in 4..14 {
        for round in 0..device::RUNS_MIN + 3 {
            check(count, round);
            program.settle();
        }
    }
    assert!(ledger.used() <= 9 * CHARGE + 2 * places(&[14; 8]), "{}", ledger.used());
    drop(program);
    Cuda::await_ends();
    assert_eq!(ledger.used(), 0, "all given back");
}

#[test]
fn without_memory_for_another_session_calls_go_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), Some(2 * CHARGE + 64));
    let program = program(&cuda, onnx::add()).expect("loaded");
    for round in 0..device::RUNS_MIN + 3 {
        // Two numbers each way.
        run(&program, vec![rows(1, 1.0)]).unwrap_or_else(|error| panic!("round {round}: {error}"));
        program.settle();
    }
    assert_eq!(cuda.devices()[0].ledger.used(), 2 * CHARGE + 16);
    // Its memory is worth less than a call.
    for _ in 0..3 {
        run(&program, vec![rows(12, 1.0)]).expect("with the memory of the other");
    }
    assert!(cuda.devices()[0].ledger.used() <= CHARGE + 2 * 12 * 8);
}

#[test]
fn calls_at_the_same_time_keep_apart() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), None);
    let program = program(&cuda, onnx::add()).expect("loaded");
    std::thread::scope(|scope| {
        for thread in 0..3_u8 {
            let program = &program;
            scope.spawn(move || {
                for round in 0..40_u8 {
                    let first = f32::from(thread) * 100.0 + f32::from(round);
                    let outputs = run(program, vec![rows(5, first)]).expect("ran");
                    assert_eq!(numbers(&outputs[0]), [first + 1.0, first + 2.0].repeat(5));
                }
            });
        }
    });
}

#[test]
fn the_thread_of_a_session_can_be_a_lane() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), None);
    let program = Arc::new(program(&cuda, onnx::add()).expect("loaded"));
    let home = program.home(&[rows(2, 0.0)]).expect("a thread");
    // It stays awake for what may come, and is there for it at any time.
    home.expect(Listener::new(Waker::noop()));
    assert!(home.reserve() && !home.reserve(), "it is somebody's");
    home.expect(Listener::new(Waker::noop()));
    let (own, (tell, told)) = (Arc::clone(&program), channel());
    let (leave, left) = channel::<()>();
    home.give(Box::new(move || {
        // Until these runs have given their shapes a session, with a thread, of their own.
        for round in 0..device::RUNS_MIN + 2 {
            let first = f32::from(u8::try_from(round).expect("small"));
            let outputs = run(&own, vec![rows(2, first)]).expect("ran");
            own.settle();
            tell.send((first, numbers(&outputs[0]))).expect("the test listens");
        }
        drop(tell);
        left.recv().expect("the others left");
        // The last that has the model lets it go, on its own thread.
        drop(own);
        None
    }));
    for (first, found) in told {
        assert_eq!(found, [first + 1.0, first + 2.0].repeat(2));
    }
    drop((program, home));
    leave.send(()).expect("it waits");
    while cuda.devices()[0].ledger.used() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn who_lets_a_model_go_waits_for_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), None);
    let program = program(&cuda, onnx::add()).expect("loaded");
    for round in 0..=device::RUNS_MIN {
        run(&program, vec![rows(2, f32::from(u8::try_from(round).expect("few")))]).expect("ran");
    }
    // Its threads end when nobody is alone any more, who may wait for whoever lets it go.
    let alone = Device::alone();
    drop(program);
    drop(alone);
    Cuda::await_ends();
    assert_eq!(cuda.devices()[0].ledger.used(), 0);
}

#[test]
fn who_lets_a_model_go_does_not_wait_for_a_device_that_does_not_come_back() {
    let folder = tempfile::tempdir().expect("a folder");
    // What 5 rows take.
    let libraries = vec![fake_cuda::build(folder.path(), &["-DFREE_HANGS_AT=40"])];
    let cuda = Arc::new(Cuda::find(&DeviceConfig { libraries, ..DeviceConfig::default() }));
    let program = program(&cuda, onnx::add()).expect("loaded");
    run(&program, vec![rows(5, 1.0)]).expect("ran");
    drop(program);
    assert!(cuda.devices()[0].ledger.used() >= 40, "nobody else gets it");
}

#[test]
fn shapes_beyond_what_is_kept_take_the_place_of_the_oldest() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), None);
    let program = program(&cuda, onnx::add()).expect("loaded");
    for count in (1..=40).chain([1, 40]) {
        let outputs = run(&program, vec![rows(count, 1.0)]).expect("ran");
        assert_eq!(outputs[0].shape, [count, 2]);
    }
    // At most 8 of them, and one more while it ran.
    assert!(cuda.devices()[0].ledger.used() <= CHARGE + 9 * 2 * 40 * 8);
}

#[test]
fn outputs_whose_size_depends_on_numbers_come_as_they_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), None);
    let nodes = vec![onnx::node("NonZero", &["x"], &["y"])];
    let (x, y) = (onnx::port("x", onnx::F32, &[4]), onnx::port("y", onnx::I64, &[1, -1]));
    let program = program(&cuda, onnx::model(nodes, vec![], vec![x], vec![y])).expect("loaded");
    for (given, expected) in [
        ([1.0, 0.0, 0.0, 1.0], vec![0_i64, 3]),
        ([1.0, 0.0, 1.0, 0.0], vec![0, 2]),
        ([0.0, 0.0, 0.0, 1.0], vec![3]),
        ([1.0, 1.0, 1.0, 1.0], vec![0, 1, 2, 3]),
        ([0.0_f32; 4], vec![]),
    ] {
        let outputs = run(&program, vec![Tensor::new(&[4], &given).expect("valid")]).expect("ran");
        assert_eq!(outputs[0].elements::<i64>().expect("indices").as_ref(), expected);
    }
    // When they have been of one size for long they are believed to stay so.
    let before = cuda.devices()[0].ledger.used();
    let mut runs = 0;
    while cuda.devices()[0].ledger.used() == before {
        let outputs = run(&program, vec![Tensor::new(&[4], &[1.0_f32; 4]).expect("valid")]).expect("ran");
        assert_eq!(outputs[0].elements::<i64>().expect("indices").as_ref(), [0, 1, 2, 3]);
        runs += 1;
        assert!(runs < 1000, "outputs that stay the same come to their place");
    }
    assert_eq!(cuda.devices()[0].ledger.used(), before + 4 * 8);
    let outputs = run(&program, vec![Tensor::new(&[4], &[0.0_f32, 0.0, 2.0, 0.0]).expect("valid")]);
    assert_eq!(outputs.expect("ran")[0].elements::<i64>().expect("indices").as_ref(), [2], "and were not");
    assert_eq!(cuda.devices()[0].ledger.used(), before);
}

#[test]
fn a_call_that_ends_after_its_session_was_let_go_keeps_nothing_of_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), Some(2 * CHARGE + 64));
    let ledger = Arc::clone(&cuda.devices()[0].ledger);
    let program = program(&cuda, onnx::add()).expect("loaded");
    for _ in 0..device::RUNS_MIN + 1 {
        run(&program, vec![rows(1, 1.0)]).expect("ran");
        program.settle();
    }
    assert_eq!(ledger.used(), 2 * CHARGE + 16, "a session of its own, with a place");
    program.during_a_call(&[rows(1, 1.0)], || {
        let refusal = run(&program, vec![rows(12, 1.0)]).expect_err("the other one has its memory still");
        assert_eq!(refusal.reason(), Reason::QuotaExceeded);
    });
    Cuda::await_ends();
    assert_eq!(ledger.used(), CHARGE);
    assert_eq!(program.device_bytes(), CHARGE);
}

#[test]
fn what_a_model_has_no_part_in_is_not_held_against_it() {
    const MIB: u64 = 1 << 20;
    const BREAKS_AT: usize = 12_345;
    let folder = tempfile::tempdir().expect("a folder");
    let settings = ["-DMEMORY_MIB=64".to_owned(), format!("-DBREAKS_AT={BREAKS_AT}")];
    let libraries = vec![fake_cuda::build(folder.path(), &settings.each_ref().map(String::as_str))];
    let cuda = Arc::new(Cuda::find(&DeviceConfig { libraries, ..DeviceConfig::default() }));
    let beside = tempfile::tempdir().expect("a folder");
    let copy = fake_cuda::copy_onnxruntime(&library(), beside.path());
    let engine =
        OnnxRuntime::load(&copy, Share { threads: 1, bytes: 1 << 30 }).expect("the library is there");
    let device = &cuda.devices()[0];
    let refused = |bytes, text: &str| device::load_refusal(&cuda, device, bytes, &ort::Error::new(text));
    assert_eq!(refused(65 * MIB, "no operator called Memory").reason(), Reason::ModelRejected);
    let larger = refused(MIB, "Available memory of 1048576 is smaller than requested bytes of 2097152");
    assert_eq!(larger.reason(), Reason::QuotaExceeded);
    assert!(!device.ledger.is_full(&larger) && larger.message().contains("1048576 bytes"), "{larger}");
    let full = refused(65 * MIB, "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc");
    assert!(device.ledger.is_full(&full), "others have 0, and there is too little: {full}");
    let file = ModelFile::scan(&[("model.onnx", onnx::add())], Origin::Guest).expect("a model");
    let on = OnDevice { cuda: &cuda, device: "cuda:0", account: None, workspace_bytes: MIB };
    let load = || engine.load_on(&on, &file, &Cancel::default()).map(drop).expect_err("no provider");
    assert_eq!(load().reason(), Reason::Disabled);
    drop(cuda.buffer(device, None, BREAKS_AT).expect("memory"));
    for _ in 0..2 {
        let failed = load();
        assert_eq!(failed.reason(), Reason::BackendFailed, "{failed}");
        assert!(failed.message().contains("not used until the agent starts again"), "{failed}");
    }
    assert_eq!(refused(MIB, "no operator called Memory").reason(), Reason::BackendFailed);
    assert_eq!(device.ledger.used(), 0);
}

#[test]
fn what_does_not_fit_is_refused_and_the_next_call_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), Some(CHARGE + 1000));
    let program = program(&cuda, onnx::add()).expect("loaded");
    let refusal = run(&program, vec![rows(200, 1.0)]).expect_err("1600 bytes");
    assert_eq!(refusal.reason(), Reason::QuotaExceeded);
    // Two shapes that fit one at a time: the one that waits gives way.
    for count in [50, 60, 50, 60] {
        assert_eq!(run(&program, vec![rows(count, 1.0)]).expect("fits")[0].shape, [count, 2]);
    }
    // Room for the input alone: the output comes to the host.
    assert_eq!(run(&program, vec![rows(100, 1.0)]).expect("fits")[0].shape, [100, 2]);
    let wrong = run(&program, vec![Tensor::new(&[1, 3], &[0.0_f32; 3]).expect("valid")]);
    assert_eq!(wrong.expect_err("another shape").reason(), Reason::BadArgument);
    for _ in 0..3 {
        let long = program.run(vec![rows(2, 1.0)], &[0], 15, &Cancel::default()).expect_err("16 bytes");
        assert_eq!(long.reason(), Reason::MessageTooLarge);
    }
    let cancel = Cancel::default();
    cancel.set();
    let stopped = program.run(vec![rows(2, 1.0)], &[0], u64::MAX, &cancel);
    assert_eq!(stopped.expect_err("cancelled").reason(), Reason::Cancelled);
}

#[test]
fn what_a_tenants_model_takes_is_the_tenants() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), None);
    let limits = Config::new(Settings::default()).expect("valid").tenant;
    let limits = TenantLimits { device_bytes: CHARGE + 100, ..limits };
    let account = Accounts::new(limits, |_| 1).of(&Tenant::new("a"));
    let used = || account.used(Unit::DeviceBytes);
    let program = program_of(&cuda, onnx::add(), Some(&account)).expect("loaded");
    run(&program, vec![rows(5, 1.0)]).expect("ran");
    assert_eq!(used(), CHARGE + 80, "in and out of 5 rows");
    let refusal = run(&program, vec![rows(20, 1.0)]).expect_err("160 bytes");
    assert!(refusal.message().contains("devices' memory of this tenant: at most 1100 bytes"), "{refusal}");
    let another = program_of(&cuda, onnx::add(), Some(&account)).map(drop).expect_err("twice as much");
    assert_eq!(another.reason(), Reason::QuotaExceeded);
    drop(program);
    Cuda::await_ends();
    assert_eq!(used(), 0);
}

#[test]
fn strings_stay_on_the_host() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), None);
    const STRING: u64 = 8;
    let nodes = vec![onnx::node("Identity", &["x"], &["y"])];
    let ports = ["x", "y"].map(|name| onnx::port(name, STRING, &[-1]));
    let [x, y] = ports;
    let refusal = program(&cuda, onnx::model(nodes, vec![], vec![x], vec![y])).map(drop);
    assert_eq!(refusal.expect_err("strings").reason(), Reason::ModelRejected);
}

#[test]
fn a_library_without_cuda_is_told_as_such_and_nothing_runs_elsewhere() {
    let folder = tempfile::tempdir().expect("a folder");
    let devices =
        DeviceConfig { libraries: vec![fake_cuda::build(folder.path(), &[])], ..DeviceConfig::default() };
    let config = EngineConfig { onnxruntime: Some(library()), devices, ..EngineConfig::default() };
    let engines = Engines::new(&config).expect("the library is there");
    let wish = Choice { engine: String::new(), device: "cuda".into() };
    let choice = engines.choose(wish, 0).expect("a device is there");
    assert_eq!(choice.device, "cuda:0");
    let file = ModelFile::scan(&[("model.onnx", onnx::add())], Origin::Guest).expect("valid");
    let asked = Asked { rules: &RunRules::default(), account: None };
    let refusal = engines.load(&choice, file, &asked, &Cancel::default()).map(drop).expect_err("no provider");
    assert_eq!(refusal.reason(), Reason::Disabled);
    assert!(refusal.message().contains("libonnxruntime_providers_cuda.so"), "{refusal}");
    assert!(!refusal.message().contains("/target/"), "{refusal}");
    let cause = std::error::Error::source(&refusal).expect("for the log").to_string();
    assert!(cause.contains("target/onnxruntime/libonnxruntime_providers_cuda.so"), "{cause}");
    assert_eq!(engines.cuda.devices()[0].ledger.used(), 0);
}

#[test]
fn a_device_that_fails_under_the_library_is_not_used_any_more() {
    /// Somebody wants so many bytes, and something else goes wrong.
    const BREAKS_AT: usize = 12_345;
    let folder = tempfile::tempdir().expect("a folder");
    let libraries = vec![fake_cuda::build(folder.path(), &[&format!("-DBREAKS_AT={BREAKS_AT}")])];
    let cuda = Cuda::find(&DeviceConfig { libraries, ..DeviceConfig::default() });
    let device = &cuda.devices()[0];
    assert!(cuda.failure(device).is_none());
    drop(cuda.buffer(device, None, BREAKS_AT).expect("memory"));
    let failed = cuda.failure(device).expect("lasting");
    assert_eq!(failed.reason(), Reason::BackendFailed);
    let refusal = cuda.upload(device, &[]).expect_err("refused from now on");
    assert!(refusal.message().contains("not used until the agent starts again"), "{refusal}");
}

#[tokio::test]
async fn a_device_that_does_not_come_back_takes_callers_their_deadline_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    const PARALLEL_RUNS: usize = 2;
    // An input of 5 rows.
    let libraries = vec![fake_cuda::build(folder.path(), &["-DHANGS_AT=40"])];
    let cuda = Arc::new(Cuda::find(&DeviceConfig { libraries, ..DeviceConfig::default() }));
    let program = Arc::new(program(&cuda, onnx::add()).expect("loaded"));
    let batching = Batching {
        parallel: PARALLEL_RUNS,
        rows_max: 0,
        sizes_are_dear: true,
        mixes_tenants: false,
        delay: Duration::ZERO,
    };
    let batcher = Batcher::new(program, batching);
    let scheduler = Scheduler::new(1).expect("threads");
    let limits = Config::new(Settings::default()).expect("valid").tenant;
    let account = Accounts::new(limits, |_| 1).of(&Tenant::new("a"));
    let call = |count, within| {
        let asker = Asker::new(&account, Instant::now() + within);
        let call = Call { inputs: vec![rows(count, 1.0)], outputs: vec![0], reply_bytes_max: u64::MAX };
        let (scheduler, batcher) = (&scheduler, &batcher);
        async move { scheduler.run_model(&asker, batcher, call).await }
    };
    const LONG: Duration = Duration::from_secs(60);
    assert_eq!(numbers(&call(2, LONG).await.expect("ran").value[0]), [2.0, 3.0, 2.0, 3.0]);
    let late = async || {
        let late = call(5, Duration::from_millis(50)).await.expect_err("it never comes");
        assert_eq!(late.reason(), Reason::Deadline, "{late}");
        account.used(Unit::AbandonedRuns)
    };
    // Those beyond what a model runs at once wait, and are no runs that somebody left.
    let most = PARALLEL_RUNS as u64;
    while late().await < most {}
    assert_eq!(late().await, most);
    let asker = Asker::new(&account, Instant::now() + LONG);
    scheduler.run(&asker, |_| Ok(())).await.expect("others have the lane");
}

#[test]
fn graphs_are_for_models_that_launch_the_same_every_time() {
    let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    assert!(device::fits_a_graph(&named(&["Conv", "Relu"])));
    assert!(!device::fits_a_graph(&named(&["Conv", "If"])));
}
