//! Devices: what is found is used and compared with the processor, what is missing is named, and no error is silent.
//! The driver is one of the tests' own.

#[path = "../fake_cuda/mod.rs"]
mod fake_cuda;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use vaccel_client::hints;
use vaccel_client::{
    CallOptions, Client, Error, Reason, ResourceFiles, Session, SessionOptions, Sgemm, Tensor, named,
};

use crate::support::{Agent, onnx, onnxruntime, output_text, socket_path};

/// No device could be had (`EX_UNAVAILABLE`).
const EXIT_ABSENT: i32 = 69;

fn self_test(flags: &[&str], libraries: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
    command.arg("self-test").args(flags).arg("--cuda-libraries").arg(libraries);
    command.env_remove("ORT_DYLIB_PATH").output().unwrap()
}

fn record(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output_text(output)))
}

fn rows<'a>(record: &'a Value, of: &str) -> &'a Vec<Value> {
    record[of].as_array().unwrap()
}

#[test]
fn a_self_test_that_needs_a_gpu_says_what_is_missing_and_where_it_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let output = self_test(&["--gpu", "--json"], folder.path());
    assert_eq!(output.status.code(), Some(EXIT_ABSENT), "{}", output_text(&output));
    let record = record(&output);
    let missing: Vec<&str> =
        rows(&record["accelerators"], "missing").iter().map(|why| why.as_str().unwrap()).collect();
    for library in ["libcuda.so.1", "libcublas.so.13", "libcudart.so.13", "libcudnn.so.9", "libcurand.so.10"]
    {
        let path = folder.path().join(library).display().to_string();
        assert!(missing.iter().any(|why| why.contains(&path)), "{path}: {missing:?}");
    }
    assert!(missing.iter().any(|why| why.contains("libonnxruntime.so")), "{missing:?}");
    assert!(rows(&record, "sgemm").is_empty(), "nothing else is measured");

    let output = self_test(&["--gpu"], folder.path());
    assert_eq!(output.status.code(), Some(EXIT_ABSENT));
    let text = output_text(&output);
    assert!(text.contains("missing  the CUDA driver (libcuda.so.1)"), "{text}");

    // Half of it is not enough, either.
    fake_cuda::build(folder.path(), &[]);
    let library = onnxruntime();
    let output = self_test(&["--gpu", "--onnxruntime", library.to_str().unwrap()], folder.path());
    assert_eq!(output.status.code(), Some(EXIT_ABSENT));
    let text = output_text(&output);
    assert!(text.contains("libonnxruntime_providers_cuda.so is not there"), "{text}");
    assert!(text.contains("device   cuda:0: Fake 0"), "{text}");
    assert!(!text.contains("missing  the CUDA driver"), "{text}");
}

#[test]
fn a_self_test_yields_the_whole_record_without_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let library = onnxruntime();
    let flags = ["--quick", "--json", "--onnxruntime", library.to_str().unwrap()];
    let output = self_test(&flags, folder.path());
    assert!(output.status.success(), "{}", output_text(&output));
    let record = record(&output);
    assert!(record["machine"]["cores"].as_u64().unwrap() > 0);
    assert_eq!(rows(&record, "empty_calls").len(), 2, "unix and tcp");
    assert_eq!(rows(&record, "transfers").len(), 1);
    assert_eq!(rows(&record, "sgemm").len(), 1);
    let models = rows(&record, "models");
    let of = |engine: &str| models.iter().filter(|model| model["engine"] == engine).count();
    assert_eq!((of("tract"), of("onnxruntime")), (2, 2));
    for model in models {
        assert!(model["direct_ms"].as_f64().unwrap() > 0.0 && model["unix_ms"].as_f64().unwrap() > 0.0);
    }
    assert!(record["batching"][0]["on_calls_per_s"].as_f64().unwrap() > 0.0);
    let checks = rows(&record, "checks");
    assert_eq!(checks.len(), 3, "a product, and two batches of the second engine to the first");
    assert!(checks.iter().all(|check| check["passed"] == true), "{checks:?}");
    assert!(rows(&record, "goals").is_empty(), "they are for devices");
}

#[test]
fn a_self_test_measures_what_it_finds_and_sees_a_device_fail() {
    let folder = tempfile::tempdir().unwrap();
    fake_cuda::build(folder.path(), &[]);
    let output = self_test(&["--quick"], folder.path());
    let text = output_text(&output);
    assert!(output.status.success(), "{text}");
    for told in
        ["cuda:0, 256 cubed", "ok       cuda:0 without room: memory of device cuda:0 is used up", "passed"]
    {
        assert!(text.contains(told), "{told}: {text}");
    }
    let broken = tempfile::tempdir().unwrap();
    fake_cuda::build(broken.path(), &["-DFAILS_AFTER=4"]);
    let output = self_test(&["--quick"], broken.path());
    assert_eq!(output.status.code(), Some(1), "{}", output_text(&output));
    assert!(output_text(&output).contains("device cuda:0 failed"), "{}", output_text(&output));
}

#[test]
fn a_self_test_that_needs_a_gpu_is_content_with_one_that_works_and_tells_of_the_other() {
    let folder = tempfile::tempdir().unwrap();
    fake_cuda::build(folder.path(), &["-DDEVICES=2", "-DBAD_DEVICE=0"]);
    // Libraries that nobody calls here.
    for name in ["cudart.so.13", "cublasLt.so.13", "curand.so.10", "cufft.so.12", "nvrtc.so.13", "cudnn.so.9"]
    {
        std::fs::hard_link(folder.path().join("libfake.so"), folder.path().join(format!("lib{name}")))
            .unwrap();
    }
    let library = fake_cuda::copy_onnxruntime(&onnxruntime(), folder.path());
    let flags = ["--gpu", "--quick", "--onnxruntime", library.to_str().unwrap()];
    let output = self_test(&flags, folder.path());
    let text = output_text(&output);
    assert_ne!(output.status.code(), Some(EXIT_ABSENT), "{text}");
    let told = text.lines().find(|line| line.starts_with("device   cuda:0")).unwrap();
    assert!(told.contains("not used: ") && told.contains("CUDA_ERROR_ECC_UNCORRECTABLE"), "{told}");
    assert!(text.contains("ok       sgemm 256 on cuda:1"), "{text}");
    assert!(!text.contains("on cuda:0"), "it is not measured: {text}");
}

#[test]
fn an_agent_for_a_device_that_is_absent_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
    command.args(["--device", "cuda:0", "--address", "tcp://127.0.0.1:0", "--cuda-libraries"]);
    let output = command.arg(folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let path = folder.path().join("libcuda.so.1").display().to_string();
    assert!(output_text(&output).contains(&path), "{}", output_text(&output));
}

async fn on(client: &Client, device: &str) -> Result<Session, Error> {
    client.open_session(SessionOptions { device: device.into(), ..SessionOptions::default() }).await
}

fn matrix(rows: i64, columns: i64, factor: i64) -> Tensor {
    let numbers: Vec<f32> = (0..rows * columns)
        .map(|index| f32::from(u8::try_from(index * factor % 11).unwrap()) - 5.0)
        .collect();
    Tensor::new(&[rows, columns], &numbers).unwrap()
}

async fn multiply(session: &Session, [m, n, k]: [i64; 3]) -> Result<Vec<f32>, Error> {
    let product = session.sgemm(Sgemm::new(matrix(m, k, 7), matrix(k, n, 3))?).await?;
    Ok(product.elements::<f32>()?.to_vec())
}

#[tokio::test]
async fn guests_multiply_on_the_device_they_ask_for() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = fake_cuda::build(folder.path(), &["-DDEVICES=2"]);
    let agent = Agent::unix(&["--cuda-libraries", libraries.to_str().unwrap(), "--tenant-device-mib", "2"]);
    let client = agent.guest(0).await;
    let cpu = on(&client, "cpu").await.unwrap();
    for device in ["cuda:0", "cuda:1", "cuda", ""] {
        let session = on(&client, device).await.unwrap();
        for sizes in [[1, 1, 1], [33, 70, 129], [300, 200, 100]] {
            assert_eq!(
                multiply(&session, sizes).await.unwrap(),
                multiply(&cpu, sizes).await.unwrap(),
                "{device}"
            );
        }
    }
    let gpus = SessionOptions { hints: hints::GPU, ..SessionOptions::default() };
    let session = client.open_session(gpus).await.unwrap();
    assert_eq!(multiply(&session, [2, 2, 2]).await.unwrap(), multiply(&cpu, [2, 2, 2]).await.unwrap());
    // 4 MiB of a matrix, where the tenant may have 2: the device is asked for, so it is an error.
    let refusal = multiply(&session, [1, 1024, 1024]).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::QuotaExceeded);
    assert!(
        refusal.message().contains("devices' memory of this tenant: at most 2097152 bytes"),
        "{refusal:?}"
    );
    assert!(multiply(&session, [2, 2, 2]).await.is_ok(), "the next call goes on");
    assert!(multiply(&cpu, [1, 1024, 1024]).await.is_ok());

    let refusal = on(&client, "cuda:2").await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::Disabled);
    assert!(refusal.message().contains("devices are cuda:0, cuda:1"), "{refusal:?}");
    let tract =
        SessionOptions { device: "cuda:0".into(), engine: "tract".into(), ..SessionOptions::default() };
    assert_eq!(client.open_session(tract).await.unwrap_err().reason(), Reason::Disabled);
}

#[tokio::test]
async fn a_product_that_nobody_asked_a_device_for_survives_its_failure() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = fake_cuda::build(folder.path(), &["-DFAILS_AFTER=1"]);
    let agent = Agent::unix(&["--cuda-libraries", libraries.to_str().unwrap()]);
    let client = agent.guest(0).await;
    let (cpu, any) = (on(&client, "cpu").await.unwrap(), on(&client, "").await.unwrap());
    // Large enough to go to a device by its size.
    let sizes = [512, 512, 512];
    assert_eq!(multiply(&any, sizes).await.unwrap(), multiply(&cpu, sizes).await.unwrap());
    let asked = on(&client, "cuda:0").await.unwrap();
    let refusal = multiply(&asked, [2, 2, 2]).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::BackendFailed);
    assert!(refusal.message().contains("device cuda:0 failed"), "the large one was there: {refusal:?}");
    assert!(!refusal.message().contains("CUDA_ERROR"), "{refusal:?}");
}

#[tokio::test]
async fn a_device_that_does_not_come_back_takes_callers_their_deadline_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    // The second factor of 64 times 64.
    let libraries = fake_cuda::build(folder.path(), &["-DHANGS_AT=16384"]);
    let agent = Agent::unix(&["--cuda-libraries", libraries.to_str().unwrap()]);
    let client = agent.guest(0).await;
    let (cpu, gpu) = (on(&client, "cpu").await.unwrap(), on(&client, "cuda:0").await.unwrap());
    let expected = multiply(&cpu, [1, 64, 64]).await.unwrap();
    assert_eq!(multiply(&gpu, [1, 32, 32]).await.unwrap(), multiply(&cpu, [1, 32, 32]).await.unwrap());
    let soon = gpu.with(CallOptions { deadline: Some(Duration::from_millis(300)), ..CallOptions::default() });
    let mut refusals = Vec::new();
    // The tenant's runs that nobody waits for are counted until there are too many.
    while refusals.last() != Some(&Reason::QuotaExceeded) {
        if refusals.len() < 2 {
            assert_eq!(multiply(&cpu, [1, 64, 64]).await.unwrap(), expected, "others have the lanes");
        }
        refusals.push(multiply(&soon, [1, 64, 64]).await.unwrap_err().reason());
    }
    assert!(refusals.len() >= 3 && refusals.starts_with(&[Reason::Deadline; 2]), "{refusals:?}");
    let (status, _) = agent.terminate();
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn models_for_a_device_that_the_library_cannot_use_are_an_error_and_run_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = fake_cuda::build(folder.path(), &[]);
    let libraries = libraries.to_str().unwrap();
    let library = onnxruntime();
    for (flags, named) in [
        (vec!["--onnxruntime", library.to_str().unwrap()], "libonnxruntime_providers_cuda.so"),
        (vec![], "no libonnxruntime.so"),
    ] {
        let agent = Agent::unix(&[&["--cuda-libraries", libraries], &flags[..]].concat());
        let client = agent.guest(0).await;
        let session = on(&client, "cuda:0").await.unwrap();
        let model = session.register(ResourceFiles::model("m.onnx", onnx::add())).await.unwrap();
        let input = Tensor::new(&[1, 2], &[1.0_f32, 2.0]).unwrap();
        let refusal = session.run(&model, vec![named_input(&input)], &[]).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::Disabled, "{refusal:?}");
        assert!(refusal.message().contains(named) && refusal.message().contains("cuda:0"), "{refusal:?}");
        assert!(!refusal.message().contains('/'), "no paths of the host: {refusal:?}");
    }
}

fn named_input(tensor: &Tensor) -> vaccel_client::proto::v1::NamedTensor {
    named("x", tensor.clone())
}

/// Metrics as the caller of this address sees them.
fn metrics(address: &str) -> String {
    let mut socket = UnixStream::connect(socket_path(address)).unwrap();
    socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

#[tokio::test]
async fn metrics_of_devices_are_for_operators() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = fake_cuda::build(folder.path(), &[]);
    let config = folder.path().join("agent.toml");
    std::fs::write(&config, "[[policy]]\ntenant = 'unix:*/operator*'\noperator = true\n").unwrap();
    let addresses = ["unix://{}/operator", "unix://{}/guest"];
    let flags = ["--cuda-libraries", libraries.to_str().unwrap(), "--config", config.to_str().unwrap()];
    let agent = Agent::start(&addresses, &flags);
    let client = agent.guest(1).await;
    multiply(&on(&client, "cuda:0").await.unwrap(), [2, 2, 2]).await.unwrap();
    let operators = metrics(&agent.addresses[0]);
    for line in [
        "nv_gpu_utilization{gpu_uuid=\"GPU-fake-0\"} 0.37",
        "nv_gpu_memory_total_bytes{gpu_uuid=\"GPU-fake-0\"} 1073741824",
        "nv_gpu_power_usage{gpu_uuid=\"GPU-fake-0\"} 81.5",
        "# TYPE nv_gpu_memory_used_bytes gauge",
        "vaccel_device_counted_bytes{device=\"cuda:0\"} 134217728",
    ] {
        assert!(operators.lines().any(|found| found == line), "{line}: {operators}");
    }
    assert!(!operators.contains("nv_energy_consumption"), "this device does not tell: {operators}");
    let guests = metrics(&agent.addresses[1]);
    assert!(!guests.contains("nv_gpu") && !guests.contains("vaccel_device_counted"), "{guests}");
    assert!(guests.contains("vaccel_device_bytes 0"), "{guests}");
}
