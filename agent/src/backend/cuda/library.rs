//! Libraries of the host, found when the agent runs: which were looked for, where, and why one was not loaded.

use std::path::{Path, PathBuf};

use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};

/// Folders where drivers, packages and images put the libraries, after those that the loader knows by itself.
const USUAL_FOLDERS: &[&str] = &[
    "/usr/local/cuda/lib64",
    "/usr/local/nvidia/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib/wsl/lib",
];

/// A library: what it is for, and the names that serve, best first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) purpose: &'static str,
    pub(super) names: &'static [&'static str],
}

/// What came of looking for a library. It names paths of the host: for its operator.
#[derive(Clone, Debug)]
pub(crate) struct Sought {
    pub(crate) purpose: &'static str,
    pub(crate) names: &'static [&'static str],
    /// Places that were tried, and why the library could not be had there.
    pub(crate) refusals: Vec<(String, String)>,
    /// Where it was loaded from.
    pub(crate) loaded: Option<String>,
}

impl Sought {
    /// What was looked for, where, and why it was not loaded, in a line.
    pub(crate) fn told(&self) -> String {
        let names = self.names.join(" or ");
        match &self.loaded {
            Some(place) => format!("{} ({names}): {place}", self.purpose),
            None => {
                let why = self.refusals.iter().map(|(place, why)| format!("{place}: {why}"));
                let why = why.collect::<Vec<_>>().join("; ");
                format!("{} ({names}) was looked for and not loaded: {why}", self.purpose)
            }
        }
    }
}

/// A loaded library.
#[derive(Debug)]
pub(super) struct Library(Handle);

impl Library {
    /// Looks for a library in these folders alone, or without any where the loader and packages have them.
    #[allow(unsafe_code, reason = "dlopen runs what the host's operator installed")]
    pub(super) fn look(wanted: Wanted, folders: &[PathBuf]) -> (Option<Self>, Sought) {
        let Wanted { purpose, names } = wanted;
        let mut sought = Sought { purpose, names, refusals: Vec::new(), loaded: None };
        for (place, path) in places(names, folders) {
            // SAFETY: loading runs the library's constructors. It is NVIDIA's or what the operator put in a folder
            // that the configuration names; guests choose neither name nor folder.
            match unsafe { Handle::open(Some(&path), RTLD_NOW | RTLD_LOCAL) } {
                Ok(handle) => {
                    sought.loaded = Some(place);
                    return (Some(Self(handle)), sought);
                }
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    let cause = cause.unwrap_or_else(|| error.to_string());
                    // The loader says the name first, which is told already.
                    let why = cause.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&cause);
                    sought.refusals.push((place, why.into()));
                }
            }
        }
        if folders.is_empty() && !USUAL_FOLDERS.iter().any(|folder| has_one(Path::new(folder), names)) {
            sought.refusals.push((USUAL_FOLDERS.join(", "), "not there".into()));
        }
        (None, sought)
    }

    /// The function of this name. What its type is, the caller says: that it is the library's is what makes calls of
    /// it sound.
    ///
    /// # Errors
    /// The name, when the library has no such function.
    #[allow(unsafe_code, reason = "dlsym knows no types")]
    pub(super) fn function<T: Copy>(&self, name: &str) -> Result<T, String> {
        // SAFETY: `T` is a function pointer in each of the tables made by `functions!`, as NVIDIA's headers declare the
        // function of this name; it is used only as long as the library is loaded, for the table owns both.
        let found = unsafe { self.0.get::<T>(name) };
        found.map(|symbol| *symbol).map_err(|_| format!("it has no function {name}"))
    }
}

/// How each try is told, and what is opened.
fn places(names: &[&str], folders: &[PathBuf]) -> Vec<(String, PathBuf)> {
    let by_loader = names.iter().map(|name| (format!("{name} by the loader"), PathBuf::from(name)));
    let usual: Vec<PathBuf> = USUAL_FOLDERS.iter().map(PathBuf::from).collect();
    let in_folders = |folders: &[PathBuf], only_there: bool| {
        let all = folders.iter().flat_map(|folder| names.iter().map(move |name| folder.join(name)));
        // That the usual folders have nothing is told once, for all of them.
        let all = all.filter(|path| only_there || path.exists()).map(|path| (shown(&path), path));
        all.collect::<Vec<_>>()
    };
    if folders.is_empty() {
        by_loader.chain(in_folders(&usual, false)).collect()
    } else {
        in_folders(folders, true)
    }
}

fn has_one(folder: &Path, names: &[&str]) -> bool {
    names.iter().any(|name| folder.join(name).exists())
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Declares a table of functions that all answer with a status, and how it is loaded.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($field:ident = $symbol:literal: ($($argument:ty),*);)* }) => {
        $(#[$doc])*
        pub(super) struct $table {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> std::ffi::c_int,)*
            /// Unloaded with the table.
            _library: $crate::backend::cuda::library::Library,
        }

        impl $table {
            /// # Errors
            /// The name of a function that the library lacks.
            pub(super) fn of(library: $crate::backend::cuda::library::Library) -> Result<Self, String> {
                Ok(Self { $($field: library.function($symbol)?,)* _library: library })
            }
        }
    };
}
pub(super) use functions;

#[cfg(test)]
mod tests {
    use super::*;

    const ABSENT: Wanted = Wanted { purpose: "a test", names: &["libabsent.so.2", "libabsent.so.1"] };

    #[test]
    fn what_was_looked_for_is_told_with_every_place() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("libabsent.so.1"), "no library ".repeat(99)).expect("written");
        let (library, sought) = Library::look(ABSENT, &[folder.path().to_owned(), "/absent".into()]);
        assert!(library.is_none());
        assert_eq!(sought.refusals.len(), 4, "{sought:?}");
        let told = sought.told();
        for named in
            ["a test", "libabsent.so.2 or libabsent.so.1", "/absent/libabsent.so.2", "invalid ELF", "No such"]
        {
            assert!(told.contains(named), "{named}: {told}");
        }
        let (library, sought) = Library::look(ABSENT, &[]);
        assert!(library.is_none());
        let told = sought.told();
        assert!(
            told.contains("libabsent.so.1 by the loader") && told.contains("/usr/local/cuda/lib64"),
            "{told}"
        );
    }
}
