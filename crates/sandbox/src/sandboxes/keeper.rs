//! Keeps living sandboxes alive and ends old ones. One task an owner.

use super::{Phase, Shared, locked};
use crate::guest_client::GuestClient;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Semaphore;

/// How often ages are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Leases renewed at the same time.
const RENEWALS: usize = 32;

/// Runs until the owner's [`super::Sandboxes`] is gone.
pub(super) async fn keep(shared: Weak<Shared>) {
    let permits = Arc::new(Semaphore::new(RENEWALS));
    let mut renewed = Instant::now();
    let mut tick = tokio::time::interval(TICK);
    loop {
        tick.tick().await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        end_the_old(&shared);
        // Four chances before a lease runs out.
        if renewed.elapsed() >= shared.lease / 4 {
            renewed = Instant::now();
            for guest in running(&shared) {
                let Ok(permit) = permits.clone().acquire_owned().await else {
                    return;
                };
                let seconds = shared.lease_seconds();
                tokio::spawn(async move {
                    if let Err(error) = guest.renew_lease(seconds, Duration::from_secs(5)).await {
                        tracing::debug!(id = %guest.id(), %error, "a lease was not renewed");
                    }
                    drop(permit);
                });
            }
        }
    }
}

fn running(shared: &Shared) -> Vec<GuestClient> {
    locked(&shared.entries)
        .values()
        .filter_map(|entry| match entry.phase() {
            Phase::Running(guest) => Some(guest),
            Phase::Starting | Phase::Paused(_) | Phase::Gone => None,
        })
        .collect()
}

fn end_the_old(shared: &Arc<Shared>) {
    let now = SystemTime::now();
    let old: Vec<_> = locked(&shared.entries)
        .iter()
        .filter(|(_, entry)| {
            let age = entry
                .ready
                .get()
                .and_then(|ready| now.duration_since(*ready).ok())
                .unwrap_or_default();
            entry.spec.limits.lifetime.is_some_and(|limit| age > limit) && !*entry.unwanted.borrow()
        })
        .map(|(id, entry)| (id.clone(), entry.clone()))
        .collect();
    for (id, entry) in old {
        let shared = shared.clone();
        tracing::info!(%id, "the sandbox reached its lifetime");
        tokio::spawn(async move {
            if let Err(error) = shared.tear_down(&id, &entry).await {
                tracing::error!(%id, %error, "an old sandbox could not be removed");
                // Tried again at the next tick.
                entry.unwanted.send_replace(false);
            }
        });
    }
}
