//! What an engine is given when it is opened.

use crate::image::{ImageStore, Progress};
use crate::state::OwnerDir;
use std::path::PathBuf;
use std::sync::Arc;

/// What an engine works with.
#[derive(Clone)]
pub struct EngineContext {
    /// Where its owner's things are.
    pub owner: Arc<OwnerDir>,
    /// Images of all owners.
    pub images: Arc<ImageStore>,
    /// Hears how far a pull is.
    pub progress: Arc<dyn Progress>,
    /// The static guest on the host.
    pub guest: PathBuf,
    /// The static zygote on the host.
    pub zygote: PathBuf,
}
