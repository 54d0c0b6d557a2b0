//! What ONNX Runtime's CUDA provider needs beside the driver. The loader takes what is loaded already under the same
//! name, so that loading these first lets the folders of the configuration count for the provider, too.

use std::path::PathBuf;

use super::library::{Library, Sought, Wanted};

/// In the order in which they need each other.
const WANTED: &[Wanted] = &[
    Wanted { purpose: "the CUDA runtime", names: &["libcudart.so.13", "libcudart.so.12"] },
    Wanted { purpose: "cuBLASLt", names: &["libcublasLt.so.13", "libcublasLt.so.12"] },
    Wanted { purpose: "cuRAND", names: &["libcurand.so.10"] },
    Wanted { purpose: "cuFFT", names: &["libcufft.so.12", "libcufft.so.11"] },
    Wanted { purpose: "the CUDA compiler", names: &["libnvrtc.so.13", "libnvrtc.so.12"] },
    Wanted { purpose: "cuDNN", names: &["libcudnn.so.9"] },
];

/// The libraries, as far as they are there.
pub(super) struct Toolkit {
    _loaded: Vec<Library>,
    pub(super) sought: Vec<Sought>,
}

impl Toolkit {
    pub(super) fn load(folders: &[PathBuf]) -> Self {
        let (loaded, sought): (Vec<_>, _) =
            WANTED.iter().map(|wanted| Library::look(*wanted, folders)).unzip();
        Self { _loaded: loaded.into_iter().flatten().collect(), sought }
    }
}
