//! Compiles what the peers say to each other, as a user of tonic does; with protox, so that no system `protoc` is
//! needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=speed.proto");
    let descriptors = protox::compile(["speed.proto"], ["."])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
