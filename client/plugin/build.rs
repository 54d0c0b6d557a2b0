//! Links the plugin so that it stays in the process for good.

fn main() {
    // libvaccel unloads plugins before the process ends, and threads of the client's runtime may be at work then.
    println!("cargo:rustc-link-arg-cdylib=-Wl,-z,nodelete");
    println!("cargo:rerun-if-changed=build.rs");
}
