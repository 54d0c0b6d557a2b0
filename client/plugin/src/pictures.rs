//! Pictures of what operations on images found: the agent makes them, and the program gets the name of a file.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::CStr;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vaccel_client::{Error, Reason};

use crate::abi;
use crate::given::refused;

/// Files of a session, as many as the agent keeps of its pictures: the folder of a session is often memory.
const KEPT_MAX: usize = 16;

/// Nobody else's business.
const MODE: u32 = 0o600;

/// The files of one session, which are gone with it. So is the folder that libvaccel made for the session: libvaccel
/// tries before the session is closed, when the files are still there.
#[derive(Default)]
pub(crate) struct Pictures {
    next: u64,
    kept: VecDeque<PathBuf>,
}

impl Pictures {
    /// Writes a file of a name that is nobody's yet, and puts the name, with its NUL, where the program wants it. Where
    /// the folder takes no files, that of all temporary files does.
    pub(crate) fn write(
        &mut self,
        folder: &Path,
        operation: &str,
        picture: &[u8],
        place: &mut [u8],
    ) -> Result<(), Error> {
        let unwritable = |path: &Path, error: &std::io::Error| {
            Error::new(Reason::BackendFailed, format!("the picture {}: {error}", path.display()))
        };
        let mut folder = folder.to_owned();
        let (path, mut file) = loop {
            self.next += 1;
            let path = folder.join(format!("{operation}-{}.jpg", self.next));
            put(path.as_os_str().as_encoded_bytes(), place)?;
            match OpenOptions::new().write(true).create_new(true).mode(MODE).open(&path) {
                Ok(file) => break (path, file),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(_) if folder != std::env::temp_dir() => folder = std::env::temp_dir(),
                Err(error) => return Err(unwritable(&path, &error)),
            }
        };
        self.kept.push_back(path.clone());
        if self.kept.len() > KEPT_MAX {
            self.remove_first();
        }
        file.write_all(picture).map_err(|error| unwritable(&path, &error))
    }

    pub(crate) fn remove_all(&mut self) {
        let folders: BTreeSet<_> =
            self.kept.iter().filter_map(|path| Some(path.parent()?.to_owned())).collect();
        while self.remove_first() {}
        for folder in folders.into_iter().filter(|folder| *folder != std::env::temp_dir()) {
            // Something else may be in it.
            let _ = std::fs::remove_dir(folder);
        }
    }

    fn remove_first(&mut self) -> bool {
        let first = self.kept.pop_front();
        // The program may have removed it.
        first.map(|path| drop(std::fs::remove_file(path))).is_some()
    }
}

impl Drop for Pictures {
    fn drop(&mut self) {
        self.remove_all();
    }
}

/// Writes a text and its NUL where the program wants them.
pub(crate) fn put(text: &[u8], place: &mut [u8]) -> Result<(), Error> {
    let needed = text.len() + 1;
    let room = place.len();
    let Some(fits) = place.get_mut(..needed) else {
        return Err(refused("out_imgname", &format!("room for {needed} bytes"), room));
    };
    fits[..text.len()].copy_from_slice(text);
    fits[text.len()] = 0;
    Ok(())
}

/// The folder that libvaccel made for a session; that of all temporary files where there is none.
pub(crate) fn folder(session: &abi::Session) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let named = CStr::from_bytes_until_nul(&session.folder).ok();
    let named = named.map(|name| PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes())));
    named.filter(|folder| folder.is_absolute() && folder.is_dir()).unwrap_or_else(std::env::temp_dir)
}
