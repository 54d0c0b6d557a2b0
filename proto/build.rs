//! Compiles the contract with protox, so that no system `protoc` is needed.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "vaccel/v1/vaccel.proto",
        "vaccel/v1/ops.proto",
        "inference/inference.proto",
        "inference/model_config.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    let all = std::path::Path::new(&std::env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(all, descriptors.encode_to_vec())?;
    let mut names = tonic_prost_build::Config::new();
    names.enable_type_names();
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::codec::Bounded")
        .build_transport(false)
        .compile_fds_with_config(descriptors, names)?;
    Ok(())
}
