//! What this machine offers, as each engine sees it, and which engine `auto`
//! takes. Engines report facts; choosing is a pure function of the reports, so
//! that the explanation a user reads is the reason the code acted on.

use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::programs::Programs;
use crate::state::StateDir;
use crate::{native, oci, podman};
use serde::{Deserialize, Serialize};

/// One thing an engine looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// What was looked at, e.g. `overlayfs` or `crun`.
    pub name: String,
    /// What was found, e.g. `1.8.1` or `not installed`.
    pub value: String,
    /// Whether that serves the engine fully. A fact that is not ok does not
    /// make an engine unusable by itself: it may have a slower way.
    pub ok: bool,
    /// What would make it ok.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Fact {
    /// Something that is as the engine wants it.
    pub fn good(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            value: value.into(),
            ok: true,
            remedy: None,
        }
    }

    /// Something that is missing or in the way, with what cures it.
    pub fn lacking(
        name: impl Into<String>,
        value: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            name: name.into(),
            value: value.into(),
            ok: false,
            remedy: Some(remedy.into()),
        }
    }
}

/// What one engine finds on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineProbe {
    /// Which engine.
    pub engine: EngineKind,
    /// Whether it can start sandboxes here.
    pub usable: bool,
    /// What it looked at.
    pub facts: Vec<Fact>,
    /// One sentence: how it would work here, or why it can't.
    pub reason: String,
}

impl EngineProbe {
    /// An engine that works here, and how.
    pub fn usable(engine: EngineKind, facts: Vec<Fact>, reason: impl Into<String>) -> Self {
        Self {
            engine,
            usable: true,
            facts,
            reason: reason.into(),
        }
    }

    /// An engine that can't work here, and why.
    pub fn unusable(engine: EngineKind, facts: Vec<Fact>, reason: impl Into<String>) -> Self {
        Self {
            engine,
            usable: false,
            facts,
            reason: reason.into(),
        }
    }

    /// The remedies of what is lacking, joined; empty if nothing is.
    pub fn remedies(&self) -> String {
        let remedies: Vec<&str> = self
            .facts
            .iter()
            .filter(|fact| !fact.ok)
            .filter_map(|fact| fact.remedy.as_deref())
            .collect();
        remedies.join("; ")
    }

    /// This report as the error of somebody who asked for the engine.
    pub fn refusal(&self) -> EngineError {
        EngineError::Unusable {
            engine: self.engine,
            reason: self.reason.clone(),
            hint: match self.remedies() {
                none if none.is_empty() => "`skyrl sandbox probe` shows which engines are".into(),
                remedies => remedies,
            },
        }
    }
}

/// What one engine finds on this machine.
///
/// # Errors
/// When the static programs can't be put into the state directory or run.
pub async fn one(kind: EngineKind, state: &StateDir) -> Result<EngineProbe, EngineError> {
    let programs = Programs::install(&state.programs())?;
    let root = state.root().to_owned();
    let look = move || match kind {
        EngineKind::Native => native::probe(&programs.zygote, &root),
        EngineKind::Podman => Ok(podman::probe()),
        EngineKind::Oci => oci::probe(&programs, &root),
    };
    tokio::task::spawn_blocking(look)
        .await
        .unwrap_or_else(|panic| {
            Err(EngineError::Bug {
                engine: kind,
                reason: panic.to_string(),
            })
        })
}

/// What every engine finds on this machine, in order of preference.
///
/// # Errors
/// As for [`one`].
pub async fn all(state: &StateDir) -> Result<Vec<EngineProbe>, EngineError> {
    let mut found = Vec::new();
    for kind in EngineKind::ALL {
        found.push(one(kind, state).await?);
    }
    Ok(found)
}

/// The engine `auto` takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// Which.
    pub engine: EngineKind,
    /// Why this one, and why not those preferred to it.
    pub why: String,
}

/// Picks the first usable engine in order of preference.
///
/// # Errors
/// [`EngineError::Unusable`] of the most preferred engine, whose reason names
/// every engine's, when none is usable.
pub fn choose(probes: &[EngineProbe]) -> Result<Choice, EngineError> {
    let in_order = || {
        EngineKind::ALL
            .into_iter()
            .filter_map(|kind| probes.iter().find(|probe| probe.engine == kind))
    };
    let mut passed_over: Vec<String> = Vec::new();
    for probe in in_order() {
        if probe.usable {
            let mut why = format!("{}: {}", probe.engine, probe.reason);
            for reason in passed_over {
                why.push_str("; not ");
                why.push_str(&reason);
            }
            return Ok(Choice {
                engine: probe.engine,
                why,
            });
        }
        passed_over.push(format!("{}: {}", probe.engine, probe.reason));
    }
    let remedies: Vec<String> = in_order()
        .map(|probe| (probe.engine, probe.remedies()))
        .filter(|(_, remedies)| !remedies.is_empty())
        .map(|(engine, remedies)| format!("for {engine}: {remedies}"))
        .collect();
    Err(EngineError::Unusable {
        engine: EngineKind::ALL[0],
        reason: if passed_over.is_empty() {
            "no engine was probed".into()
        } else {
            format!(
                "no engine works on this machine: {}",
                passed_over.join("; ")
            )
        },
        hint: remedies.join("; "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_namespaces() -> EngineProbe {
        EngineProbe::unusable(
            EngineKind::Native,
            vec![Fact::lacking(
                "user namespaces",
                "forbidden",
                "sysctl user.max_user_namespaces=10000",
            )],
            "user namespaces are forbidden",
        )
    }

    #[test]
    fn the_preferred_engine_is_taken_and_the_others_are_not_mentioned() {
        let probes = [
            EngineProbe::usable(EngineKind::Podman, vec![], "podman 4.3.1 as root"),
            EngineProbe::usable(EngineKind::Native, vec![], "namespaces as root"),
        ];
        let choice = choose(&probes).unwrap();
        assert_eq!(choice.engine, EngineKind::Native);
        assert_eq!(choice.why, "native: namespaces as root");
    }

    #[test]
    fn an_engine_that_was_passed_over_is_explained() {
        let probes = [
            without_namespaces(),
            EngineProbe::usable(EngineKind::Oci, vec![], "crun 1.8.1"),
        ];
        let choice = choose(&probes).unwrap();
        assert_eq!(choice.engine, EngineKind::Oci);
        assert_eq!(
            choice.why,
            "oci: crun 1.8.1; not native: user namespaces are forbidden"
        );
    }

    #[test]
    fn a_machine_without_any_engine_hears_every_reason_and_every_remedy() {
        let probes = [
            without_namespaces(),
            EngineProbe::unusable(
                EngineKind::Oci,
                vec![Fact::lacking("crun", "not installed", "install crun")],
                "neither crun nor runc is installed",
            ),
        ];
        let error = choose(&probes).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("user namespaces are forbidden"), "{text}");
        assert!(text.contains("neither crun nor runc"), "{text}");
        let hint = error.hint().unwrap();
        assert!(hint.contains("for oci: install crun"), "{hint}");
        assert!(hint.contains("for native: sysctl"), "{hint}");
    }
}
