//! Sandboxes: isolated root file systems with a process tree each, made by one
//! of three engines, all spoken to through the same injected guest.
//!
//! Callers hold a [`Sandboxes`] and never see which engine is behind it. This
//! crate knows neither HTTP sessions nor training.

pub mod cgroup;
pub mod command;
pub mod context;
pub mod engine;
pub mod error;
pub mod guest_client;
pub mod image;
pub mod native;
pub mod oci;
pub mod podman;
pub mod probe;
pub mod programs;
pub mod prune;
pub mod rootfs;
pub mod sandboxes;
mod seccomp;
pub mod snapshot;
pub mod spec;
pub mod state;
pub mod tree;
pub mod watchdog;

pub use context::EngineContext;
pub use engine::{Engine, EngineKind, Liveness, SnapshotMode, Stats};
pub use error::EngineError;
pub use guest_client::GuestClient;
pub use image::{Image, ImageError, ImageRef, ImageStore, PullPolicy};
pub use podman::PodmanEngine;
pub use probe::{Choice, EngineProbe, Fact};
pub use sandboxes::{Deadlines, Options, Sandbox, SandboxRecord, Sandboxes};
pub use snapshot::Snapshots;
pub use spec::{HostMount, Limits, Network, SandboxSpec};
pub use state::{OwnerDir, OwnerLock, StateDir};
