//! Reading and replacing one file on disk. Separate from the editor so that
//! what makes a write safe stands in one place. Knows nothing of text.

use rustix::fs::{OFlags, fchown};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What opening a path for reading found.
pub(super) enum Opened {
    /// A regular file within the bound: its bytes.
    File(Vec<u8>),
    /// A regular file that is too large, with its size.
    TooLarge(u64),
    /// A directory.
    Directory,
    /// A device, FIFO or socket.
    Special,
}

/// Reads a regular file of at most `limit` bytes, following links. Never
/// waits: a FIFO or device is recognised without reading it.
pub(super) fn read(path: &Path, limit: u64) -> io::Result<Opened> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
        .open(path);
    let file = match opened {
        // A socket, or a device without a driver.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(Opened::Special),
        other => other?,
    };
    let meta = file.metadata()?;
    if meta.is_dir() {
        return Ok(Opened::Directory);
    }
    if !meta.is_file() {
        return Ok(Opened::Special);
    }
    if meta.len() > limit {
        return Ok(Opened::TooLarge(meta.len()));
    }
    // Files of pseudo file systems say 0 and grow while read.
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Ok(Opened::TooLarge(bytes.len() as u64));
    }
    Ok(Opened::File(bytes))
}

/// Writes a file that does not exist yet; removes it again if that fails.
pub(super) fn create(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(content).inspect_err(|_| {
        let _ = fs::remove_file(path);
    })
}

/// Replaces a file's content at once, keeping its mode and owner: readers see
/// the old or the new content, and a full disk leaves the old. Where a rename
/// would lose the owner or a hard link, or the directory forbids it, the file
/// is rewritten in place. `path` must not be a symbolic link.
pub(super) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let meta = fs::metadata(path)?;
    if meta.nlink() == 1 {
        // Refused the way the kernel refuses in-place writers, which a rename
        // would get around.
        let writable = OpenOptions::new().write(true).open(path)?;
        if let Some(temporary) = Temporary::write(path, &meta, content)? {
            drop(writable);
            match temporary.rename_to(path) {
                // A mount point, such as a bind-mounted /etc/hosts.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                done => return done,
            }
        }
    }
    let mut file = OpenOptions::new().write(true).truncate(true).open(path)?;
    file.write_all(content)
}

/// A file beside the one to replace; removed when dropped.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    /// Writes the content with the mode and owner of `meta`. `None` when the
    /// directory or the owner does not allow it.
    fn write(target: &Path, meta: &fs::Metadata, content: &[u8]) -> io::Result<Option<Self>> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = target.with_file_name(format!(".edit-{}-{serial}.tmp", std::process::id()));
        let created = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        let Ok(mut file) = created else {
            return Ok(None);
        };
        let temporary = Self { path };
        if !copy_owner(&file, meta) {
            return Ok(None);
        }
        file.write_all(content)?;
        // Last, since a change of owner or content drops set-id bits.
        file.set_permissions(Permissions::from_mode(meta.mode() & 0o7777))?;
        Ok(Some(temporary))
    }

    fn rename_to(self, target: &Path) -> io::Result<()> {
        fs::rename(&self.path, target)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone already after a rename.
        let _ = fs::remove_file(&self.path);
    }
}

fn copy_owner(file: &File, meta: &fs::Metadata) -> bool {
    let same = file
        .metadata()
        .is_ok_and(|own| own.uid() == meta.uid() && own.gid() == meta.gid());
    same || fchown(
        file,
        Some(rustix::fs::Uid::from_raw(meta.uid())),
        Some(rustix::fs::Gid::from_raw(meta.gid())),
    )
    .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_replaced_file_keeps_its_mode_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("tool.sh");
        fs::write(&path, "old").expect("write");
        fs::set_permissions(&path, Permissions::from_mode(0o4755)).expect("chmod");
        replace(&path, b"new").expect("replace");
        assert_eq!(fs::read(&path).expect("read"), b"new");
        assert_eq!(fs::metadata(&path).expect("stat").mode() & 0o7777, 0o4755);
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
    }

    #[test]
    fn a_hard_link_stays_linked() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&path, "old").expect("write");
        fs::hard_link(&path, &other).expect("link");
        replace(&path, b"new").expect("replace");
        assert_eq!(fs::read(&other).expect("read"), b"new");
    }

    #[test]
    fn a_fifo_or_device_is_recognised_without_waiting_for_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .expect("mkfifo");
        let link = dir.path().join("link");
        symlink("/dev/zero", &link).expect("symlink");
        assert!(matches!(read(&fifo, 10), Ok(Opened::Special)));
        assert!(matches!(read(&link, 10), Ok(Opened::Special)));
        assert!(matches!(read(dir.path(), 10), Ok(Opened::Directory)));
    }
}
