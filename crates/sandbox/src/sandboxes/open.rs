//! Opens the engine asked for, or the best that works here.

use crate::context::EngineContext;
use crate::engine::{Engine, EngineKind};
use crate::error::EngineError;
use crate::native::NativeEngine;
use crate::oci::OciEngine;
use crate::podman::PodmanEngine;
use crate::probe::{self, Choice};
use crate::state::StateDir;

/// Opens the engine asked for, or the best that works here; says why it was
/// taken.
pub(super) async fn open_engine(
    wanted: Option<EngineKind>,
    state: &StateDir,
    context: EngineContext,
) -> Result<(Box<dyn Engine>, String), EngineError> {
    let (kind, why) = match wanted {
        Some(kind) => (kind, format!("{kind}: asked for")),
        None => {
            let choice = best(state).await?;
            (choice.engine, choice.why)
        }
    };
    let engine: Box<dyn Engine> = match kind {
        EngineKind::Native => Box::new(NativeEngine::open(context).await?),
        EngineKind::Podman => Box::new(PodmanEngine::open(context).await?),
        EngineKind::Oci => Box::new(OciEngine::open(context).await?),
    };
    Ok((engine, why))
}

/// The first usable engine; those behind it are not looked at.
async fn best(state: &StateDir) -> Result<Choice, EngineError> {
    let mut probes = Vec::new();
    for kind in EngineKind::ALL {
        let found = probe::one(kind, state).await?;
        let usable = found.usable;
        probes.push(found);
        if usable {
            break;
        }
    }
    probe::choose(&probes)
}
