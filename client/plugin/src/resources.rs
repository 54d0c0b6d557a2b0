//! Sessions, and resources in them.

use std::ffi::{CStr, OsStr, c_char, c_int};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use vaccel_client::{Error, Reason, Resource, ResourceFiles, ResourceKind};

use crate::abi;
use crate::given::{array, array_mut, refused, text};
use crate::host::{Opened, answer, lock, name};

pub(crate) unsafe extern "C" fn open(session: *mut abi::Session, hints: u32) -> c_int {
    answer("session_init", || {
        // SAFETY: null, or libvaccel's session.
        let session = unsafe { session.as_mut() }.ok_or_else(|| refused("session", "a session", "NULL"))?;
        session.remote_id = Opened::open(hints)?;
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn close(session: *mut abi::Session) -> c_int {
    answer("session_release", || {
        // SAFETY: null, or libvaccel's session.
        let session = unsafe { session.as_ref() }.ok_or_else(|| refused("session", "a session", "NULL"))?;
        Opened::close(session.remote_id)
    })
}

pub(crate) unsafe extern "C" fn register(resource: *mut abi::Resource, session: *mut abi::Session) -> c_int {
    answer("resource_register", || {
        // SAFETY: libvaccel's session, and its resource or null.
        let (opened, given) = unsafe { (Opened::of(session)?, resource.as_mut()) };
        let given = given.ok_or_else(|| refused("resource", "a resource", "NULL"))?;
        if given.remote_id > 0 && lock(&opened.resources).contains_key(&given.remote_id) {
            // libvaccel says so itself, and unregisters it once.
            return Ok(());
        }
        // SAFETY: libvaccel's resource.
        let files = unsafe { files(given)? };
        let registered = opened.wait(opened.session.register(files))?;
        let number = {
            // It keeps its number from the first session that has it; another thread may be about to name it.
            static NAMING: Mutex<()> = Mutex::new(());
            let _one = lock(&NAMING);
            if given.remote_id <= 0 {
                given.remote_id = name();
            }
            given.remote_id
        };
        let twice = lock(&opened.resources).insert(number, registered);
        twice.map_or(Ok(()), |twice| opened.let_go(|session| async move { session.unregister(&twice).await }))
    })
}

pub(crate) unsafe extern "C" fn unregister(
    resource: *mut abi::Resource,
    session: *mut abi::Session,
) -> c_int {
    answer("resource_unregister", || {
        // SAFETY: libvaccel's session, and its resource or null.
        let (opened, registered) = unsafe { registered(resource, session)? };
        // SAFETY: it is there, as was just seen.
        lock(&opened.resources).remove(&unsafe { &*resource }.remote_id);
        opened.let_go(|session| async move { session.unregister(&registered).await })
    })
}

/// Reads a resource back: what is registered cannot change, but the program's own memory can.
pub(crate) unsafe extern "C" fn sync(resource: *mut abi::Resource, session: *mut abi::Session) -> c_int {
    answer("resource_sync", || {
        // SAFETY: libvaccel's session, and its resource or null.
        let (opened, registered) = unsafe { registered(resource, session)? };
        // SAFETY: libvaccel's resource, which is there.
        let blobs = unsafe { blobs(&*resource)? };
        for &blob in blobs {
            // SAFETY: libvaccel's file, with its name and so many bytes of its own.
            let (name, place) =
                unsafe { (text("blob.name", (*blob).name)?, array_mut("blob", (*blob).data, (*blob).size)?) };
            let read = async {
                let length = place.len() as u64;
                opened.session.read_resource(&registered, name, 0, length).await?.rest().await
            };
            let content = opened.wait(read)?;
            if place.len() != content.len() {
                return Err(refused("blob", &format!("room for {} bytes", content.len()), place.len()));
            }
            place.copy_from_slice(&content);
        }
        Ok(())
    })
}

/// The session's resource that a program means.
///
/// # Safety
/// Null, or libvaccel's.
pub(crate) unsafe fn registered(
    resource: *const abi::Resource,
    session: *const abi::Session,
) -> Result<(Arc<Opened>, Resource), Error> {
    // SAFETY: as this function's.
    let (opened, resource) = unsafe { (Opened::of(session)?, resource.as_ref()) };
    let number = resource.map_or(0, |resource| resource.remote_id);
    let registered = lock(&opened.resources).get(&number).cloned();
    let missing = || Error::new(Reason::NotFound, "expected a resource that is registered in this session");
    Ok((opened, registered.ok_or_else(missing)?))
}

/// # Safety
/// A resource of libvaccel.
unsafe fn blobs(resource: &abi::Resource) -> Result<&[*mut abi::Blob], Error> {
    // SAFETY: libvaccel's list of files.
    let blobs = unsafe { array("blobs", resource.blobs, resource.blob_count)? };
    if blobs.iter().any(|blob| blob.is_null()) {
        return Err(refused("blobs", "files", "NULL"));
    }
    Ok(blobs)
}

/// What is to be registered: from the disk where it can be read again there, for an agent that is restarted, and else
/// from memory.
///
/// # Safety
/// A resource of libvaccel.
unsafe fn files(resource: &abi::Resource) -> Result<ResourceFiles, Error> {
    let kind = match resource.kind {
        0 => ResourceKind::Library,
        1 => ResourceKind::Data,
        2 => ResourceKind::Model,
        other => return Err(refused("resource.type", "0 to 2", other)),
    };
    match resource.path_kind {
        abi::REMOTE_FILE => {
            let expected = "files of this machine; the agent fetches nothing for anybody";
            return Err(refused("resource.paths", expected, "an address elsewhere"));
        }
        abi::LOCAL_FOLDER => {
            // SAFETY: libvaccel's list of paths.
            let paths = unsafe { array("resource.paths", resource.paths, resource.path_count)? };
            let &path = paths.first().ok_or_else(|| refused("resource.paths", "a folder", "none"))?;
            // SAFETY: a path of it.
            return Ok(ResourceFiles::path(kind, unsafe { path_of(path)? }));
        }
        _ => {}
    }
    // SAFETY: a resource of libvaccel.
    let blobs = unsafe { blobs(resource)? };
    if kind != ResourceKind::Library
        && let [blob] = *blobs
    {
        // SAFETY: a file of it, which is there.
        let blob = unsafe { &*blob };
        if blob.kind == abi::FILE && !blob.path.is_null() {
            // SAFETY: its path.
            return Ok(ResourceFiles::path(kind, unsafe { path_of(blob.path)? }));
        }
    }
    // Libraries are linked with libvaccel, as a rule, and find it where it was loaded before them.
    let mut files = Vec::with_capacity(blobs.len() + 1);
    for &blob in blobs {
        // SAFETY: a file that is there, with its name and so many bytes.
        let (name, data) =
            unsafe { (text("blob.name", (*blob).name)?, array("blob", (*blob).data, (*blob).size)?) };
        files.push((name.to_owned(), Bytes::copy_from_slice(data)));
    }
    if kind == ResourceKind::Library && !files.iter().any(|(name, _)| name.starts_with(LIBVACCEL)) {
        files.splice(..0, libvaccel());
    }
    Ok(ResourceFiles::new(kind, files))
}

/// A library of the program's machine, with what it may be linked with.
///
/// # Errors
/// `BAD_ARGUMENT` for a file that cannot be read.
pub(crate) fn library(path: &Path) -> Result<ResourceFiles, Error> {
    let unreadable = |error: io::Error| refused("library", "a file", format!("{}: {error}", path.display()));
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let own = (name, Bytes::from(std::fs::read(path).map_err(unreadable)?));
    Ok(ResourceFiles::new(ResourceKind::Library, libvaccel().into_iter().chain([own]).collect()))
}

const LIBVACCEL: &str = "libvaccel.so";

/// The libvaccel of this process, as a file.
fn libvaccel() -> Option<(String, Bytes)> {
    let maps = std::fs::read("/proc/self/maps").ok()?;
    let paths = maps.split(|byte| *byte == b'\n').filter_map(|line| {
        let begin = line.iter().position(|byte| *byte == b'/')?;
        Some(Path::new(OsStr::from_bytes(&line[begin..])))
    });
    let is_it =
        |path: &&Path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(LIBVACCEL.as_bytes()));
    let path = paths.into_iter().find(is_it)?;
    Some((LIBVACCEL.to_owned(), std::fs::read(path).ok()?.into()))
}

/// # Safety
/// Null, or a path that ends with a NUL. It may begin as libvaccel allows it.
unsafe fn path_of(path: *const c_char) -> Result<PathBuf, Error> {
    if path.is_null() {
        return Err(refused("path", "a path", "NULL"));
    }
    // SAFETY: not null, so a path.
    let path = unsafe { CStr::from_ptr(path) }.to_bytes();
    let path = Path::new(OsStr::from_bytes(path.strip_prefix(b"file://").unwrap_or(path)));
    // The program may go elsewhere before it is read again.
    std::path::absolute(path)
        .map_err(|error| refused("path", "a path", format!("{}: {error}", path.display())))
}
