//! Products of f32 matrices: the agent's kernels called directly, through an agent in another process over unix and
//! TCP sockets, and OpenBLAS on the same cores.
//!
//! `cargo bench --bench sgemm` prints a table and writes `target/bench-sgemm.json`. Rounds interleave all ways of a
//! size, so that a change of the machine's mood meets them alike; a figure is the median of the rounds, a ratio the
//! median of the rounds' ratios. Every way's result is compared with OpenBLAS's first. `-- --test` runs one short
//! round of the small sizes, to see that it works.
//!
//! OpenBLAS is Debian's, by dlopen, and chooses its kernels itself: what the environment says about them is left out.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used, reason = "a program for people")]
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "sizes of a table")]
#![allow(unsafe_code, reason = "OpenBLAS is a C library")]

use std::ffi::{CStr, OsString, c_char, c_int};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Instant;

use vaccel_agent::Direct;
use vaccel_agent::config::EngineConfig;
use vaccel_client::proto::v1::SgemmRequest;
use vaccel_client::{Client, Session, SessionOptions, Sgemm, Tensor, named};

/// m, n, k. Two matrices of 2048² are more than one message of 32 MiB: they go in pieces.
const SIZES: [[usize; 3]; 6] = [[64; 3], [1000, 37, 513], [256; 3], [1024; 3], [2000; 3], [2048; 3]];

/// Seconds of each way in a round, so that short products are repeated.
const SECONDS: f64 = 0.2;

const WAYS: [&str; 4] = ["OpenBLAS", "direct", "unix", "tcp"];

const LIBRARIES: [&str; 2] = ["libopenblas.so.0", "libopenblas.so"];

/// Row-major, not transposed.
const ROW_MAJOR: c_int = 101;
const NOT_TRANSPOSED: c_int = 111;

type CblasSgemm = unsafe extern "C" fn(
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    f32,
    *const f32,
    c_int,
    *const f32,
    c_int,
    f32,
    *mut f32,
    c_int,
);

struct OpenBlas {
    sgemm: CblasSgemm,
    description: String,
    _library: libloading::Library,
}

impl OpenBlas {
    fn load(threads: usize) -> Result<Self, libloading::Error> {
        let mut found = LIBRARIES.iter().map(|name| {
            // SAFETY: loading it starts its threads and nothing else; it stays loaded as long as its functions.
            unsafe { libloading::Library::new(*name) }
        });
        let library = found.next().unwrap().or_else(|_| found.next().unwrap())?;
        // SAFETY: the functions have these types in OpenBLAS's cblas.h, and the text they return lives as long as the
        // library.
        unsafe {
            let sgemm = *library.get::<CblasSgemm>(b"cblas_sgemm")?;
            library.get::<unsafe extern "C" fn(c_int)>(b"openblas_set_num_threads")?(threads as c_int);
            let text = |name: &[u8]| -> Result<String, libloading::Error> {
                let say = library.get::<unsafe extern "C" fn() -> *const c_char>(name)?;
                Ok(CStr::from_ptr(say()).to_string_lossy().into_owned())
            };
            let config = text(b"openblas_get_config")?;
            let version: Vec<&str> = config.split_whitespace().take(2).collect();
            let description =
                format!("{}, kernels for {}", version.join(" "), text(b"openblas_get_corename")?);
            Ok(Self { sgemm, description, _library: library })
        }
    }

    fn multiply(&self, [m, n, k]: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32]) {
        assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n);
        let [m, n, k] = [m, n, k].map(|size| size as c_int);
        // SAFETY: the three matrices are dense and as large as their sizes say.
        unsafe {
            (self.sgemm)(
                ROW_MAJOR,
                NOT_TRANSPOSED,
                NOT_TRANSPOSED,
                m,
                n,
                k,
                1.0,
                a.as_ptr(),
                k,
                b.as_ptr(),
                n,
                0.0,
                c.as_mut_ptr(),
                n,
            );
        }
    }
}

/// One size with its matrices.
struct Case {
    size: [usize; 3],
    a: Tensor,
    b: Tensor,
    c: Vec<f32>,
    request: SgemmRequest,
}

impl Case {
    fn new(size: [usize; 3]) -> Self {
        let [m, n, k] = size;
        let matrix = |rows: usize, columns: usize| {
            let numbers: Vec<f32> =
                (0..rows * columns).map(|index| (index * 7919 % 1009) as f32 / 504.5 - 1.0).collect();
            Tensor::new(&[rows as i64, columns as i64], &numbers).unwrap()
        };
        let (a, b) = (matrix(m, k), matrix(k, n));
        let matrices = vec![named("a", a.clone()), named("b", b.clone())];
        let [rows, columns, depth] = size.map(|size| size as i64);
        let request =
            SgemmRequest { m: rows, n: columns, k: depth, alpha: 1.0, matrices, ..SgemmRequest::default() };
        Self { size, a, b, c: vec![0.0; m * n], request }
    }

    fn operations(&self) -> f64 {
        2.0 * self.size.iter().map(|size| *size as f64).product::<f64>()
    }
}

/// All ways to multiply.
struct Ways {
    openblas: OpenBlas,
    direct: Direct,
    sessions: Vec<Session>,
}

impl Ways {
    async fn multiply(&self, way: usize, case: &mut Case) -> Option<Tensor> {
        match way {
            0 => {
                let (a, b) = (case.a.elements::<f32>().unwrap(), case.b.elements::<f32>().unwrap());
                self.openblas.multiply(case.size, &a, &b, &mut case.c);
                None
            }
            1 => self.direct.sgemm(&case.request).unwrap().matrices.remove(0).tensor,
            way => {
                let product = Sgemm::new(case.a.clone(), case.b.clone()).unwrap();
                Some(self.sessions[way - 2].sgemm(product).await.unwrap())
            }
        }
    }

    /// Multiplies in every way and compares.
    async fn check(&self, case: &mut Case) {
        self.multiply(0, case).await;
        for (way, name) in WAYS.iter().enumerate().skip(1) {
            let found = self.multiply(way, case).await.unwrap();
            let pairs = found.elements::<f32>().unwrap();
            let error = pairs.iter().zip(&case.c).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 1e-2, "{name} of {:?} is off by {error}", case.size);
        }
    }

    /// GFLOP/s of a way in one round.
    async fn time(&self, way: usize, case: &mut Case, seconds: f64) -> f64 {
        let (begun, mut count) = (Instant::now(), 0.0);
        while count == 0.0 || begun.elapsed().as_secs_f64() < seconds {
            std::hint::black_box(self.multiply(way, case).await);
            count += 1.0;
        }
        count * case.operations() / begun.elapsed().as_secs_f64() / 1e9
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let_openblas_choose();
    let smoke = std::env::args().any(|argument| argument == "--test");
    let (rounds, sizes) = if smoke { (1, &SIZES[..3]) } else { (9, &SIZES[..]) };
    let threads = EngineConfig::default().threads;
    let openblas = match OpenBlas::load(threads) {
        Ok(openblas) => openblas,
        Err(why) => {
            eprintln!(
                "no OpenBLAS to compare with ({why}); install it: apt-get install libopenblas0-pthread"
            );
            return ExitCode::FAILURE;
        }
    };
    let folder = tempfile::tempdir().unwrap();
    let (agent, sessions) = agent(folder.path()).await;
    let config = EngineConfig { engine: "tract".into(), ..EngineConfig::default() };
    let ways = Ways { openblas, direct: Direct::new(&config).unwrap(), sessions };
    println!("{}, {threads} threads each\n{}\n", heading(rounds), ways.openblas.description);
    println!(
        "{:<15} {:>9} {:>9} {:>9} {:>9}   ratios to OpenBLAS",
        "GFLOP/s", WAYS[0], WAYS[1], WAYS[2], WAYS[3]
    );
    let mut rows = Vec::new();
    for size in sizes {
        let mut case = Case::new(*size);
        ways.check(&mut case).await;
        let mut figures = vec![Vec::new(); WAYS.len()];
        for _ in 0..rounds {
            for (way, figures) in figures.iter_mut().enumerate() {
                figures.push(ways.time(way, &mut case, if smoke { 0.0 } else { SECONDS }).await);
            }
        }
        rows.push(report(size, &figures));
    }
    let document = serde_json::json!({
        "machine": machine(), "commit": said("git", &["describe", "--always", "--dirty"]), "threads": threads,
        "openblas": ways.openblas.description, "rows": rows,
    });
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench-sgemm.json");
    std::fs::write(path, format!("{document:#}\n")).unwrap();
    drop(agent);
    ExitCode::SUCCESS
}

/// OpenBLAS takes kernels and block sizes from its environment when it is loaded, so the program starts again without.
fn let_openblas_choose() {
    let chosen = |name: &OsString| name.as_encoded_bytes().starts_with(b"OPENBLAS_");
    let names: Vec<OsString> = std::env::vars_os().map(|(name, _)| name).filter(chosen).collect();
    if names.is_empty() {
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(std::env::args_os().skip(1));
    for name in names {
        command.env_remove(name);
    }
    panic!("{}", command.exec());
}

/// Ended with its agent, also when a comparison fails.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn agent(folder: &std::path::Path) -> (Agent, Vec<Session>) {
    let socket = format!("unix://{}/s", folder.display());
    let agent = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"))
        .args(["--engine", "tract", "--address", &socket, "--address", "tcp://127.0.0.1:0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut agent = Agent(agent);
    let lines = BufReader::new(agent.0.stdout.take().unwrap()).lines().take(2);
    let mut sessions = Vec::new();
    for line in lines {
        let line = line.unwrap();
        let address = line.strip_prefix("listening on ").unwrap();
        let client = Client::builder(address.parse().unwrap()).connect().await.unwrap();
        sessions.push(client.open_session(SessionOptions::default()).await.unwrap());
    }
    (agent, sessions)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report([m, n, k]: &[usize; 3], figures: &[Vec<f64>]) -> serde_json::Value {
    let ratio = |way: &Vec<f64>| median(way.iter().zip(&figures[0]).map(|(own, base)| own / base).collect());
    print!("{:<15}", format!("{m} x {n} x {k}"));
    for way in 0..WAYS.len() {
        match figures.get(way) {
            Some(way) => print!(" {:>9.1}", median(way.clone())),
            None => print!(" {:>9}", "-"),
        }
    }
    let ratios: Vec<String> = figures[1..].iter().map(|way| format!("{:.2}", ratio(way))).collect();
    println!("   {}", ratios.join("  "));
    let ways: Vec<_> = WAYS
        .iter()
        .zip(figures)
        .map(|(name, way)| {
            serde_json::json!({
                "way": name, "gflops": median(way.clone()), "to_openblas": ratio(way), "rounds": way,
            })
        })
        .collect();
    serde_json::json!({ "m": m, "n": n, "k": k, "ways": ways })
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = |line: &str| Some(line.strip_prefix("model name")?.split_once(": ")?.1.to_owned());
    let cpu = cpuinfo.lines().find_map(named).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{cores} cores of {cpu}, {}", said("uname", &["-sr"]))
}

fn heading(rounds: usize) -> String {
    let commit = said("git", &["describe", "--always", "--dirty"]);
    format!("{}\ncommit {commit}; {rounds} interleaved rounds, medians", machine())
}
