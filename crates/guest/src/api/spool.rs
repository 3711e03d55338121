//! A place for uploads whose destination is told only after their content.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Copies everything to a file without a name, which vanishes when it is
/// closed; its position is at the end. Tries the usual temporary directories,
/// then `directory`, then memory.
pub(super) fn spool(content: &mut dyn Read, directory: &Path) -> io::Result<File> {
    let mut file = nameless(directory)?;
    io::copy(content, &mut file)?;
    Ok(file)
}

fn nameless(directory: &Path) -> io::Result<File> {
    let places = [Path::new("/tmp"), Path::new("/var/tmp"), directory];
    for place in places {
        if let Ok(file) = open_in(place) {
            return Ok(file);
        }
    }
    let memory = rustix::fs::memfd_create("upload", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(File::from(memory))
}

fn open_in(directory: &Path) -> io::Result<File> {
    let nameless = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(directory);
    if nameless.is_ok() {
        return nameless;
    }
    // Not every file system has files without names.
    let path = directory.join(format!(".skyrl-{}.tmp", crate::random_id()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}
