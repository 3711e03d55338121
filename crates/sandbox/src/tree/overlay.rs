//! The form in which overlayfs keeps a layer: a character device 0:0 stands
//! for the absence of a lower entry, an attribute on a directory for the
//! absence of all lower entries in it.

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{AtFlags, FileType, Stat, XattrFlags};
use rustix::io::Errno;
use std::ffi::CStr;

/// Attributes that make a directory opaque: of overlays mounted by root, by
/// plain users, and by fuse-overlayfs.
const OPAQUE: [&CStr; 3] = [
    c"trusted.overlay.opaque",
    c"user.overlay.opaque",
    c"user.fuseoverlayfs.opaque",
];

/// Whether an entry stands for the absence of a lower one.
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Whether a directory hides what lower layers have in it.
pub(crate) fn is_opaque(dir: impl AsFd) -> Result<bool, Errno> {
    let dir = dir.as_fd();
    for mark in OPAQUE {
        let mut value = [0_u8; 4];
        match rustix::fs::fgetxattr(dir, mark, &mut value) {
            Ok(1) if value[0] == b'y' => return Ok(true),
            Ok(_) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE | Errno::PERM) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Rewrites a directory's opaque mark from the form of fuse-overlayfs (an
/// attribute of its own, and two entries) to the kernel's, which
/// fuse-overlayfs understands as well.
pub(crate) fn normalize_fuse_marks(dir: BorrowedFd<'_>, mark: &CStr) -> Result<(), Errno> {
    let opaque = is_opaque(dir)?;
    match rustix::fs::fremovexattr(dir, OPAQUE[2]) {
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    let mut marked = opaque;
    for name in [c".wh..wh..opq", c".wh..opq"] {
        match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
            Ok(()) => marked = true,
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    if marked {
        rustix::fs::fsetxattr(dir, mark, b"y", XattrFlags::empty())?;
    }
    Ok(())
}

/// Whether an attribute belongs to an overlay file system.
pub(crate) fn is_overlay_attribute(name: &CStr) -> bool {
    const PREFIXES: [&[u8]; 3] = [
        b"trusted.overlay.",
        b"user.overlay.",
        b"user.fuseoverlayfs.",
    ];
    PREFIXES
        .iter()
        .any(|prefix| name.to_bytes().starts_with(prefix))
}
