//! What this guest has an agent do, each in a session of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vaccel_guest::{DType, File, Guest, ITEMS_MAX, Input, Label, Output, Posix, ResourceId, ResourceKind};

use crate::{Failure, say};

const IMAGES: &str = "/images";

/// A model that returns its input, and one that never ends; `x` goes in, `y` comes out.
const ECHO: &str = "/models/echo.onnx";
const ENDLESS: &str = "/models/endless.onnx";

/// Bytes of the tensor that comes back as it went.
const ECHO_BYTES: usize = 8 << 20;

/// Other guests of this machine, programs of their own: `examples/guest-c` and `examples/guest-rust`.
pub(crate) const GUEST_IN_C: &str = "/bin/classify";
pub(crate) const GUEST_IN_RUST: &str = "/bin/guest-rust";

/// Has such a program say what every image shows, and says it as [`Caller::classify`] does.
pub(crate) fn have_classified(program: &str, address: &str) -> Result<(), Failure> {
    let output = Command::new(program).arg(address).args(images()?).output()?;
    for line in String::from_utf8(output.stdout)?.lines() {
        let (path, seen) = line.split_once(": ").ok_or("expected a line FILE: CLASS PROBABILITY")?;
        let image = Path::new(path).file_name().unwrap_or_default().display();
        say(&format!("image {image} {seen}"));
    }
    if output.status.success() { Ok(()) } else { Err(String::from_utf8(output.stderr)?.into()) }
}

fn images() -> std::io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(IMAGES)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    Ok(paths)
}

/// A guest of the agent at one address.
pub(crate) struct Caller {
    // Some 27 KiB that are better not moved.
    guest: Box<Guest<Posix>>,
}

impl Caller {
    pub(crate) fn new(address: &str, deadline_ms: u32) -> Result<Self, Failure> {
        let mut guest = Box::new(Guest::new(address.parse()?));
        guest.set_deadline_ms(deadline_ms);
        Ok(Self { guest })
    }

    /// Says who the agent takes this machine for.
    pub(crate) fn info(&mut self) -> Result<(), Failure> {
        let info = self.guest.info().map_err(|error| self.told(error))?;
        say(&format!("tenant {}", info.tenant.as_str()));
        Ok(())
    }

    /// Says what every image of the initramfs shows.
    pub(crate) fn classify(&mut self) -> Result<(), Failure> {
        for batch in images()?.chunks(ITEMS_MAX) {
            let files: Vec<Vec<u8>> = batch.iter().map(fs::read).collect::<std::io::Result<_>>()?;
            let images: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
            let mut labels = vec![Label::default(); images.len()];
            self.guest.classify(None, &images, &mut labels).map_err(|error| self.told(error))?;
            for (path, label) in batch.iter().zip(labels) {
                let image = path.file_name().unwrap_or_default().display();
                say(&format!("image {image} {} {}", label.name.as_str(), label.probability));
            }
        }
        self.close()
    }

    /// Sends a tensor through the model that returns it, and says whether every byte came back.
    pub(crate) fn echo(&mut self) -> Result<(), Failure> {
        let model = self.register(ECHO)?;
        // No two pages of it are alike.
        let words = (0..).map(|word: u32| word.wrapping_mul(2_654_435_761).to_le_bytes());
        let sent: Vec<u8> = words.flatten().take(ECHO_BYTES).collect();
        let mut came = vec![0; ECHO_BYTES];
        let length = self.run(&model, &[i64::try_from(ECHO_BYTES / 4)?], &sent, &mut came)?;
        let same = length == ECHO_BYTES && came == sent;
        say(&format!("{length} bytes came back {}", if same { "as they went" } else { "changed" }));
        self.close()
    }

    /// Runs the model that never ends.
    pub(crate) fn endless(&mut self) -> Result<(), Failure> {
        let model = self.register(ENDLESS)?;
        self.run(&model, &[1, 1], &[0; 4], &mut [])?;
        Ok(())
    }

    /// Registers a model and keeps its session.
    pub(crate) fn hold(mut self) -> Result<Self, Failure> {
        self.register(ECHO)?;
        Ok(self)
    }

    /// Runs a model that this guest does not hold any more: whoever else holds the same one is somebody else.
    pub(crate) fn borrow(&mut self) -> Result<(), Failure> {
        let model = self.register(ECHO)?;
        self.guest.unregister(&model).map_err(|error| self.told(error))?;
        self.run(&model, &[1], &[0; 4], &mut [0; 4])?;
        self.close()
    }

    fn close(&mut self) -> Result<(), Failure> {
        self.guest.close().map_err(|error| self.told(error))
    }

    fn register(&mut self, path: &str) -> Result<ResourceId, Failure> {
        let content = fs::read(path)?;
        let files = [File { name: "model.onnx", content: &content }];
        self.guest.register(ResourceKind::Model, &files).map_err(|error| self.told(error))
    }

    fn run(
        &mut self,
        model: &ResourceId,
        shape: &[i64],
        data: &[u8],
        place: &mut [u8],
    ) -> Result<usize, Failure> {
        let input = Input { name: "x", dtype: DType::F32, shape, data };
        let mut outputs = [Output::new(place)];
        self.guest.run(model, &[input], &["y"], &mut outputs).map_err(|error| self.told(error))?;
        Ok(outputs[0].length)
    }

    /// The reason, for programs, and the text, for people.
    fn told(&self, error: vaccel_guest::Error) -> Failure {
        format!("{}: {}", error.reason.name(), self.guest.message()).into()
    }
}

impl std::fmt::Debug for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caller").finish_non_exhaustive()
    }
}
