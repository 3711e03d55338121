//! The two static programs every engine needs, carried inside this library
//! and put on disk once per content: the guest (runs in every sandbox) and the
//! zygote (clones the native engine's sandboxes).

use crate::error::EngineError;
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

struct Embedded {
    name: &'static str,
    bytes: &'static [u8],
}

static GUEST: Embedded = Embedded {
    name: "skyrl-guest",
    bytes: include_bytes!(env!("SKYRL_GUEST_PROGRAM")),
};
static ZYGOTE: Embedded = Embedded {
    name: "skyrl-zygote",
    bytes: include_bytes!(env!("SKYRL_ZYGOTE_PROGRAM")),
};

/// Size of the embedded guest in bytes.
pub fn guest_size() -> usize {
    GUEST.bytes.len()
}

/// Paths of the installed programs.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The guest.
    pub guest: PathBuf,
    /// The zygote.
    pub zygote: PathBuf,
}

impl Programs {
    /// Puts the programs into `dir`. The names carry a hash of the content, so
    /// several versions live side by side and nothing in use is overwritten.
    ///
    /// # Errors
    /// [`EngineError::Step`] when the directory can't be written.
    pub fn install(dir: &Path) -> Result<Self, EngineError> {
        static NAMES: LazyLock<[String; 2]> = LazyLock::new(|| [&GUEST, &ZYGOTE].map(file_name));
        Ok(Self {
            guest: install_one(dir, &GUEST, &NAMES[0])?,
            zygote: install_one(dir, &ZYGOTE, &NAMES[1])?,
        })
    }
}

fn file_name(program: &Embedded) -> String {
    let digest = Sha256::digest(program.bytes);
    let short: String = digest[..8].iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{short}", program.name)
}

fn install_one(dir: &Path, program: &Embedded, name: &str) -> Result<PathBuf, EngineError> {
    let path = dir.join(name);
    let whole = path
        .metadata()
        .is_ok_and(|m| m.len() == program.bytes.len() as u64);
    if whole {
        return Ok(path);
    }
    let step = |what: &str, error| EngineError::step(what, path.display(), error);
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file: File = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o700)
            .open(&temporary)?;
        file.write_all(program.bytes)?;
        // Read-only for everybody: a sandbox runs it under any user id.
        file.set_permissions(Permissions::from_mode(0o555))?;
        file.sync_all()
    };
    write().map_err(|e| step("installing", e))?;
    std::fs::rename(&temporary, &path).map_err(|e| step("installing", e))?;
    Ok(path)
}
