//! Where this user's sandboxes and images are kept on this machine.

use std::path::PathBuf;

/// Arguments common to all that touch the state directory.
#[derive(clap::Args, Clone)]
pub(crate) struct StateArgs {
    /// Node-local directory for sandboxes and images
    /// [default: skyrl-UID below $SLURM_TMPDIR, $TMPDIR or /tmp].
    #[arg(long, env = "SKYRL_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl StateArgs {
    /// The directory to use.
    pub(crate) fn directory(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(|| {
            let base = ["SLURM_TMPDIR", "TMPDIR"]
                .into_iter()
                .filter_map(std::env::var_os)
                .map(PathBuf::from)
                .find(|path| path.is_absolute())
                .unwrap_or_else(|| PathBuf::from("/tmp"));
            base.join(format!("skyrl-{}", rustix::process::geteuid().as_raw()))
        })
    }
}
