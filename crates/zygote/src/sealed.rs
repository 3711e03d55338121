//! Programs as files in memory that nobody can change: what runs beside or
//! inside sandboxes can't be overwritten through `/proc/<pid>/exe`.

use crate::step::{Failed, Step};
use rustix::fs::{MemfdFlags, SealFlags};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// A sealed copy of a program.
///
/// # Errors
/// When it can't be read or there is no memory for it.
pub fn sealed_copy(program: &Path) -> Result<OwnedFd, Failed> {
    let mut file = File::open(program).step("opening", program)?;
    let name = program.file_name().unwrap_or_default();
    let create = |flags| rustix::fs::memfd_create(name, flags);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know that it is to be executed, and need not.
    let memory = create(flags | MemfdFlags::from_bits_retain(libc::MFD_EXEC))
        .or_else(|_| create(flags))
        .step("making a sealed copy of", program)?;
    let mut copy = File::from(memory);
    io::copy(&mut file, &mut copy).step("copying", program)?;
    // Exactly these: the runtimes look for them to see whether they are safe
    // from what they run.
    rustix::fs::fcntl_add_seals(
        copy.as_fd(),
        SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
    )
    .step("sealing", program)?;
    Ok(copy.into())
}
