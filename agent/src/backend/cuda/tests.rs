//! Products on a driver of the tests' own, which does what a stream is told only when somebody waits for it.

use std::path::Path;

use super::*;
use crate::backend::fake_cuda;
use crate::config::{Config, Settings};
use crate::identity::Tenant;
use crate::quota::{Account, Accounts};

/// CUDA on the driver in a folder, built with these settings.
fn cuda(folder: &Path, settings: &[&str], bytes_max: Option<u64>) -> Cuda {
    let libraries = vec![fake_cuda::build(folder, settings)];
    Cuda::find(&DeviceConfig { libraries, bytes_max, ..DeviceConfig::default() })
}

fn account(device_bytes: u64) -> Arc<Account> {
    let limits = Config::new(Settings::default()).expect("valid").tenant;
    let limits = crate::config::TenantLimits { device_bytes, ..limits };
    Accounts::new(limits, |_| 1).of(&Tenant::new("a"))
}

/// Small integers, whose products are the same in any order.
fn number(index: usize, factor: usize) -> f32 {
    f32::from(u8::try_from(index * factor % 13).expect("small")) - 6.0
}

fn numbers(count: usize, factor: usize) -> Vec<f32> {
    (0..count).map(|index| number(index, factor)).collect()
}

fn copy(part: Factor<'_>, stage: &mut [f32]) {
    let rows = part.numbers.chunks(part.layout.stride);
    for (to, from) in stage.chunks_mut(part.layout.columns).zip(rows) {
        to.copy_from_slice(&from[..to.len()]);
    }
}

/// What sums are before.
const BEFORE: usize = 3;

/// `2 a b + beta c` of these sizes, with gaps between the rows of the factors, and the cell that is asked for.
struct Case {
    sizes: [usize; 3],
    a: Vec<f32>,
    b: Vec<f32>,
    beta: f32,
}

impl Case {
    const GAPS: [usize; 2] = [3, 1];

    fn new(sizes: [usize; 3], beta: f32) -> Self {
        let [m, n, k] = sizes;
        Self { sizes, a: numbers(m * (k + Self::GAPS[0]), 7), b: numbers(k * (n + Self::GAPS[1]), 5), beta }
    }

    fn factors(&self) -> Factors<'_> {
        let [m, n, k] = self.sizes;
        let a =
            Factor { numbers: &self.a, layout: Layout { rows: m, columns: k, stride: k + Self::GAPS[0] } };
        let b =
            Factor { numbers: &self.b, layout: Layout { rows: k, columns: n, stride: n + Self::GAPS[1] } };
        Factors { a, b, alpha: 2.0, beta: self.beta }
    }

    fn expected(&self, row: usize, column: usize) -> f32 {
        let [_, n, k] = self.sizes;
        let term = |depth: usize| {
            let a = self.a[row * (k + Self::GAPS[0]) + depth];
            f64::from(a) * f64::from(self.b[depth * (n + Self::GAPS[1]) + column])
        };
        let own = if self.beta == 0.0 { 0.0 } else { self.beta * number(row * n + column, BEFORE) };
        #[allow(clippy::cast_possible_truncation, reason = "as the result is rounded")]
        let product = (2.0 * (0..k).map(term).sum::<f64>()) as f32;
        product + own
    }

    fn run(&self, cuda: &Cuda, account: &Arc<Account>, cancel: &Cancel) -> Result<Vec<f32>, Error> {
        let count = self.sizes[0] * self.sizes[1];
        let mut sum = if self.beta == 0.0 { vec![f32::NAN; count] } else { numbers(count, BEFORE) };
        let asked = Asked { account: Some(account), gather: &copy, cancel };
        cuda.multiply(cuda.device("cuda:0")?, Sum::Here(&mut sum), &self.factors(), &asked)?;
        Ok(sum)
    }
}

#[test]
fn products_pass_through_both_streams_and_equal_the_processors() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &["-DDEVICES=2"], None);
    assert_eq!(cuda.names(), ["cuda:0", "cuda:1"]);
    assert_eq!(cuda.missing(), Vec::<String>::new());
    assert_eq!((cuda.driver_version(), cuda.cublas_version()), (Some("13.0"), Some("13.1.0")));
    let account = account(u64::MAX);
    // Rows of a third of a stage and more, so that there are panels enough for both streams to come round twice.
    const WIDE: usize = ROW_NUMBERS_MAX / 3;
    for (sizes, beta) in [
        ([1, 1, 1], 0.0),
        ([3, 5, 7], 1.0),
        ([64, 33, 65], -0.5),
        ([13, WIDE, 2], 0.0),
        ([13, WIDE, 2], 3.0),
        ([11, 2, WIDE], 0.0),
        ([5, 1, ROW_NUMBERS_MAX], 1.0),
        // A second factor of three parts, whose second goes up on the stream that computes nothing.
        ([3, 2048, 4200], 0.0),
    ] {
        let case = Case::new(sizes, beta);
        let found = case.run(&cuda, &account, &Cancel::default()).expect("computed");
        let [m, n, _] = sizes;
        for row in 0..m {
            for column in (0..n).step_by(1 + n / 50) {
                assert_eq!(
                    found[row * n + column],
                    case.expected(row, column),
                    "{sizes:?} {beta} {row} {column}"
                );
            }
        }
    }
    assert_eq!(account.used(crate::quota::Unit::DeviceBytes), 0, "all given back");
}

#[test]
fn products_of_several_threads_take_turns() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &[], None);
    let account = account(u64::MAX);
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let (cuda, account) = (&cuda, &account);
            scope.spawn(move || {
                for round in 0..20 {
                    let case = Case::new([20 + seed, 30 + round, 40], 1.0);
                    let found = case.run(cuda, account, &Cancel::default()).expect("computed");
                    assert_eq!(found[0], case.expected(0, 0));
                    assert_eq!(*found.last().expect("some"), case.expected(19 + seed, 29 + round));
                }
            });
        }
    });
    let free = cuda.devices()[0].ledger.used();
    assert!(free <= BENCHES as u64 * Bench::BYTES, "what the benches have for good, and no more");
}

/// What was made on the driver in a folder and not given back. It is the file that the agent has loaded: a process has
/// it once.
struct Open(libloading::Library);

impl Open {
    #[allow(unsafe_code, reason = "what the driver counts")]
    fn of(folder: &Path) -> Self {
        // SAFETY: the library is the one of `cuda.c`.
        Self(unsafe { libloading::Library::new(folder.join("libcuda.so.1")) }.expect("loaded"))
    }

    fn count(&self) -> i32 {
        self.told(b"fake_open")
    }

    /// How often NVML was asked.
    fn asked(&self) -> i32 {
        self.told(b"fake_asked")
    }

    #[allow(unsafe_code, reason = "what the driver counts")]
    fn told(&self, name: &[u8]) -> i32 {
        // SAFETY: the functions of these names take nothing and return an int.
        unsafe { self.0.get::<unsafe extern "C" fn() -> i32>(name).expect("there")() }
    }
}

/// Memory as callers share it with the agent.
fn mapping(bytes: usize) -> Arc<Mapping> {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(bytes as u64).expect("long enough");
    Mapping::new(&file, bytes).expect("mapped")
}

#[test]
fn matrices_in_shared_memory_pass_through_no_stage() {
    // A panel more than both streams have, the last one shorter.
    const ROWS: usize = 5;
    const DEPTH: usize = 3;
    const WIDE: usize = ROW_NUMBERS_MAX / 2 + 1;
    for (settings, is_reached) in [(&[][..], true), (&["-DNO_REGISTERING"], false)] {
        let folder = tempfile::tempdir().expect("a folder");
        let cuda = cuda(folder.path(), settings, None);
        assert_eq!(cuda.missing(), Vec::<String>::new());
        let open = Open::of(folder.path());
        let before = open.count();
        let memory = mapping(1 << 28);
        cuda.offer(&memory);
        cuda.offer(&memory);
        let (a, b) = (numbers(ROWS * DEPTH, 7), numbers(DEPTH * WIDE, 5));
        let [a_at, b_at, sum_at] = [64, 1 << 16, 1 << 27];
        assert!(memory.write(a_at, bytemuck::cast_slice(&a)) && memory.write(b_at, bytemuck::cast_slice(&b)));
        let part = |at: usize, numbers: usize| memory.view(at..at + 4 * numbers).expect("within");
        let (a_there, b_there) = (part(a_at, a.len()), part(b_at, b.len()));
        let factor = |bytes, rows, columns| Factor {
            numbers: bytemuck::cast_slice::<u8, f32>(bytes),
            layout: Layout::dense(rows, columns),
        };
        let factors = Factors {
            a: factor(&a_there, ROWS, DEPTH),
            b: factor(&b_there, DEPTH, WIDE),
            alpha: 1.0,
            beta: 0.0,
        };
        let device = cuda.device("cuda:0").expect("there");
        let place = memory.pointer(&(sum_at..sum_at + 4 * ROWS * WIDE)).expect("within");
        let held = cuda.held(device, place);
        assert_eq!(held.is_some(), is_reached);
        let (tenant, cancel) = (account(u64::MAX), Cancel::default());
        let unused = |_: Factor<'_>, _: &mut [f32]| panic!("nothing is staged");
        let gather: product::Gather<'_> = if is_reached { &unused } else { &copy };
        let asked = Asked { account: Some(&tenant), gather, cancel: &cancel };
        let mut own = vec![f32::NAN; ROWS * WIDE];
        let sum = held.map_or(Sum::Here(&mut own), Sum::There);
        cuda.multiply(device, sum, &factors, &asked).expect("computed");
        let there = part(sum_at, ROWS * WIDE);
        let found: &[f32] = if is_reached { bytemuck::cast_slice(&there) } else { &own };
        for index in (0..ROWS * WIDE).step_by(1 << 10).chain([ROWS * WIDE - 1]) {
            let (row, column) = (index / WIDE, index % WIDE);
            let terms = (0..DEPTH).map(|depth| a[row * DEPTH + depth] * b[depth * WIDE + column]);
            assert_eq!(found[index], terms.sum::<f32>(), "row {row}, column {column}");
        }
        assert_eq!(open.count() - before, i32::from(is_reached), "one pin");
        drop((memory, a_there, b_there, there));
        assert_eq!(open.count(), before, "it ends with the memory");
    }
}

#[test]
fn only_what_was_offered_is_reached_and_nothing_beyond_its_end() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &[], None);
    let device = cuda.device("cuda:0").expect("there");
    let (memory, other) = (mapping(1 << 16), mapping(1 << 16));
    let whole = |memory: &Mapping| memory.pointer(&(0..memory.bytes())).expect("all of it");
    assert!(cuda.held(device, whole(&memory)).is_none());
    cuda.offer(&memory);
    assert_eq!(cuda.held(device, whole(&memory)).expect("offered").bytes(), 1 << 16);
    assert!(cuda.held(device, whole(&other)).is_none());
    let beyond = NonNull::slice_from_raw_parts(whole(&memory).cast::<u8>(), (1 << 16) + 1);
    assert!(cuda.held(device, beyond).is_none());
    assert!(cuda.held(device, NonNull::from(&[0_u8; 8][..])).is_none());
    // What is held keeps the memory, whoever else lets it go.
    let open = Open::of(folder.path());
    let pinned = open.count();
    let held = cuda.held(device, whole(&memory));
    drop(memory);
    assert_eq!(open.count(), pinned);
    drop(held);
    assert_eq!(open.count(), pinned - 1);
}

#[test]
fn nothing_stays_on_the_device_when_its_owner_goes() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &[], None);
    let account = account(u64::MAX);
    let open = Open::of(folder.path());
    for beta in [0.0, 1.0] {
        Case::new([9, 8, 7], beta).run(&cuda, &account, &Cancel::default()).expect("computed");
    }
    assert!(open.count() > 0);
    drop(cuda);
    assert_eq!(open.count(), 0);
}

#[test]
fn memory_that_comes_down_is_not_filled_before_it_has() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &[], None);
    let context = cuda.context(&cuda.devices()[0]).expect("there");
    let memory = || driver::Memory::new(context, 8).expect("room");
    let (one, other) = (memory(), memory());
    let mut stream = Stream::new(context, 8).expect("room");
    let bytes = |byte: u8| {
        move |stage: &mut [u8]| {
            stage.fill(byte);
            stage.len()
        }
    };
    stream.upload(&one, 0, bytes(1)).expect("started");
    stream.download(&one, 0, 8).expect("started");
    stream.upload_result(&other, bytes(2)).expect("started");
    stream.download(&other, 0, 8).expect("started");
    assert_eq!(stream.downloaded().expect("done"), [2; 8]);
}

#[test]
fn a_cancelled_product_stops() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &[], None);
    let cancel = Cancel::default();
    cancel.set();
    let refusal = Case::new([4, 4, 4], 0.0).run(&cuda, &account(u64::MAX), &cancel);
    assert_eq!(refusal.expect_err("cancelled").reason(), Reason::Cancelled);
}

#[test]
fn memory_is_counted_and_what_is_too_much_is_refused_with_figures() {
    let folder = tempfile::tempdir().expect("a folder");
    let limit = Bench::BYTES + (24 << 20);
    let cuda = cuda(folder.path(), &[], Some(limit));
    let tenant = account(1 << 20);
    // 4 MiB of the second factor are beyond the tenant's one.
    let large = Case::new([1, 1024, 1024], 0.0);
    let refusal = large.run(&cuda, &tenant, &Cancel::default()).expect_err("refused");
    assert_eq!(refusal.reason(), Reason::QuotaExceeded);
    assert!(refusal.message().contains("devices' memory of this tenant: at most 1048576 bytes"), "{refusal}");
    large.run(&cuda, &account(u64::MAX), &Cancel::default()).expect("there is room for another tenant's");
    // 64 MiB are beyond what all may have.
    let larger = Case::new([1, 4096, 4096], 0.0);
    let refusal = larger.run(&cuda, &account(u64::MAX), &Cancel::default()).expect_err("refused");
    assert_eq!(refusal.reason(), Reason::QuotaExceeded);
    for named in ["memory of device cuda:0 is used up", &limit.to_string(), "67108864"] {
        assert!(refusal.message().contains(named), "{named}: {refusal}");
    }
    assert!(cuda.devices()[0].ledger.is_full(&refusal));
    Case::new([4, 4, 4], 0.0).run(&cuda, &tenant, &Cancel::default()).expect("others go on");
}

#[test]
fn a_device_that_others_have_filled_is_full_and_recovers() {
    let folder = tempfile::tempdir().expect("a folder");
    // The agent would take more than the device has: as if another process had taken the rest.
    let cuda = cuda(folder.path(), &["-DMEMORY_MIB=192"], None);
    let ledger = Ledger::new("cuda:0", 1 << 40);
    let cuda = Cuda {
        devices: cuda
            .devices
            .into_iter()
            .map(|device| Device { ledger: Arc::clone(&ledger), ..device })
            .collect(),
        ..cuda
    };
    let refusal = Case::new([1, 4096, 6000], 0.0).run(&cuda, &account(u64::MAX), &Cancel::default());
    let refusal = refusal.expect_err("96 MiB beside those of the bench");
    assert_eq!(refusal.reason(), Reason::QuotaExceeded, "{refusal}");
    Case::new([4, 4, 4], 0.0).run(&cuda, &account(u64::MAX), &Cancel::default()).expect("there is room");
    assert_eq!(ledger.used(), Bench::BYTES);
}

#[test]
fn a_device_that_computes_something_else_is_not_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &["-DWRONG"], None);
    assert!(cuda.missing()[0].contains("where the processor has"), "{:?}", cuda.missing());
    let refusal = Case::new([4, 4, 4], 0.0).run(&cuda, &account(u64::MAX), &Cancel::default());
    let refusal = refusal.expect_err("refused");
    assert_eq!(refusal.reason(), Reason::Disabled);
    assert!(refusal.message().contains("cuda:0 was asked for"), "{refusal}");
}

#[test]
fn a_device_that_fails_for_good_is_refused_from_then_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &["-DFAILS_AFTER=1"], None);
    let case = Case::new([4, 4, 4], 0.0);
    assert_eq!(cuda.missing(), Vec::<String>::new(), "the first product is the one it is compared by");
    for _ in 0..2 {
        let refusal = case.run(&cuda, &account(u64::MAX), &Cancel::default()).expect_err("failed");
        assert_eq!(refusal.reason(), Reason::BackendFailed);
        assert!(refusal.message().contains("device cpu is there"), "{refusal}");
    }
}

#[test]
fn a_device_that_could_not_be_had_for_a_moment_is_tried_again() {
    let case = Case::new([4, 4, 4], 0.0);
    let again = |cuda: &Cuda| loop {
        // Not at once: it takes its time to find out.
        if let Ok(found) = case.run(cuda, &account(u64::MAX), &Cancel::default()) {
            break found;
        }
        std::thread::yield_now();
    };
    for (setting, needed) in
        [("-DCONTEXT_REFUSALS=1", CONTEXT_BYTES), ("-DBLAS_REFUSALS=1", Bench::BYTES), ("", Bench::BYTES)]
    {
        let folder = tempfile::tempdir().expect("a folder");
        let cuda = if setting.is_empty() {
            cuda(folder.path(), &[], Some(Bench::BYTES + (1 << 20)))
        } else {
            cuda(folder.path(), &[setting], None)
        };
        let ledger = &cuda.devices()[0].ledger;
        let others = setting.is_empty().then(|| ledger.charge(None, 2 << 20).expect("room"));
        let refusal = case.run(&cuda, &account(u64::MAX), &Cancel::default()).expect_err("no memory");
        assert_eq!(refusal.reason(), Reason::QuotaExceeded, "{refusal}");
        assert!(refusal.message().contains(&needed.to_string()) && ledger.is_full(&refusal), "{refusal}");
        drop(others);
        assert_eq!(again(&cuda)[0], case.expected(0, 0), "{setting}");
        assert_eq!(ledger.used(), Bench::BYTES, "{setting}");
    }
}

#[test]
fn a_device_that_had_failed_before_anybody_used_it_is_not_tried_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &["-DBAD_DEVICE=0"], None);
    let case = Case::new([4, 4, 4], 0.0);
    for _ in 0..2 {
        let refusal = case.run(&cuda, &account(u64::MAX), &Cancel::default()).expect_err("failed");
        assert_eq!(refusal.reason(), Reason::BackendFailed);
        assert!(refusal.message().contains("not used until the agent starts again"), "{refusal}");
    }
    assert!(cuda.missing()[0].contains("CUDA_ERROR_ECC_UNCORRECTABLE"), "{:?}", cuda.missing());
}

#[test]
fn one_device_that_works_is_enough() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &["-DDEVICES=2", "-DBAD_DEVICE=1"], None);
    assert_eq!(cuda.missing(), Vec::<String>::new());
    let [good, bad] = cuda.devices() else { panic!("two devices") };
    assert_eq!(cuda.refusal(good), None);
    assert!(cuda.refusal(bad).expect("failed").contains("CUDA_ERROR_ECC_UNCORRECTABLE"));
}

#[test]
fn what_is_missing_is_told_to_guests_without_paths_and_to_the_operator_with_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let shown = folder.path().display().to_string();
    let libraries = vec![folder.path().to_owned()];
    let nothing = Cuda::find(&DeviceConfig { libraries, ..DeviceConfig::default() });
    let refusal = nothing.device("cuda:0").map(drop).expect_err("absent");
    assert_eq!(refusal.reason(), Reason::Disabled);
    assert!(refusal.message().contains("libcuda.so.1") && !refusal.message().contains(&shown), "{refusal}");
    let missing = nothing.missing();
    assert!(missing[0].contains(&format!("{shown}/libcuda.so.1")), "{missing:?}");
    assert!(missing[1].contains(&format!("{shown}/libcublas.so.13")), "{missing:?}");
    assert_eq!(nothing.figures(), Vec::new());

    fake_cuda::build(folder.path(), &[]);
    std::fs::remove_file(folder.path().join("libcublas.so.13")).expect("there");
    let libraries = vec![folder.path().to_owned()];
    let half = Cuda::find(&DeviceConfig { libraries, ..DeviceConfig::default() });
    assert_eq!(half.missing().len(), 1, "{:?}", half.missing());
    let refusal = Case::new([4, 4, 4], 0.0).run(&half, &account(u64::MAX), &Cancel::default());
    let refusal = refusal.expect_err("no cuBLAS");
    assert!(refusal.message().contains("cuBLAS") && !refusal.message().contains(&shown), "{refusal}");
    assert_eq!(half.device("cuda:1").map(drop).expect_err("one").message().matches("cuda:0").count(), 1);
}

#[test]
fn a_driver_without_devices_is_told_as_such() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &["-DDEVICES=0"], None);
    assert!(cuda.missing()[0].contains("CUDA_ERROR_NO_DEVICE"), "{:?}", cuda.missing());
}

#[test]
fn rows_that_are_too_long_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &[], None);
    let case = Case::new([1, 1, ROW_NUMBERS_MAX + 1], 0.0);
    let refusal = case.run(&cuda, &account(u64::MAX), &Cancel::default()).expect_err("refused");
    assert_eq!(refusal.reason(), Reason::BadArgument);
}

#[test]
fn figures_are_those_that_the_device_tells() {
    let folder = tempfile::tempdir().expect("a folder");
    let figures = cuda(folder.path(), &[], None).figures();
    let expected = Figures {
        uuid: "GPU-fake-0".into(),
        memory_total_bytes: Some(1 << 30),
        memory_used_bytes: Some(0),
        utilization: Some(0.37),
        power_watts: Some(81.5),
        power_limit_watts: Some(700.0),
        energy_joules: None,
    };
    assert_eq!(figures, [expected]);
}

#[test]
fn a_driver_that_does_not_answer_is_asked_once_and_what_it_told_before_is_shown() {
    let folder = tempfile::tempdir().expect("a folder");
    let cuda = cuda(folder.path(), &["-DNVML_HANGS_AFTER=1"], None);
    let told = cuda.figures();
    assert_eq!(told.len(), 1);
    let begun = std::time::Instant::now();
    for _ in 0..20 {
        assert_eq!(cuda.figures(), told);
    }
    assert!(begun.elapsed() < 20 * nvml::WAIT_MAX, "they do not each wait");
    assert_eq!(Open::of(folder.path()).asked(), 2, "the one that told, and the one that waits for ever");
}
