//! An initramfs, written entry by entry.
//!
//! *Source:* the kernel's Documentation/driver-api/early-userspace/buffer-format.rst, the format "newc".

use std::collections::BTreeSet;
use std::path::Path;

const MODE_FOLDER: u32 = 0o040_755;
const MODE_FILE: u32 = 0o100_755;
const MODE_DEVICE: u32 = 0o020_600;

/// Bytes of the magic and of 13 numbers in 8 hexadecimal digits.
const HEADER_BYTES: usize = 6 + 13 * 8;

/// An archive under way. Folders are made for what is in them.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// Adds a program or a file at an absolute path.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.folders_of(path);
        self.entry(path, MODE_FILE, content, (0, 0));
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.folders_of(path);
        self.entry(path, MODE_DEVICE, &[], (major, minor));
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn folders_of(&mut self, path: &str) {
        let mut folders: Vec<&Path> = Path::new(path).ancestors().skip(1).collect();
        folders.reverse();
        for folder in folders {
            let folder = folder.to_str().unwrap();
            if folder != "/" && self.folders.insert(folder.into()) {
                self.entry(folder, MODE_FOLDER, &[], (0, 0));
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        let name = format!("{}\0", path.trim_start_matches('/'));
        self.entries += 1;
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
        // Number, mode, owner, group, links, time, length, device it is on (2), device it is (2), name's length, sum.
        let (content_length, name_length) = (length(content), length(name.as_bytes()));
        let fields =
            [self.entries, mode, 0, 0, 1, 0, content_length, 0, 0, device.0, device.1, name_length, 0];
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        debug_assert_eq!(self.bytes.len(), begin + HEADER_BYTES);
        self.bytes.extend_from_slice(name.as_bytes());
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
