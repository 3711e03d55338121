//! Locks that survive a panicking holder: a request that panicked must not
//! take the sandbox down, and every state here is valid between statements.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Locks, whatever happened to the last holder.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a notification, at most until `deadline`; false once it passed.
pub fn wait_until<'g, T>(
    condition: &Condvar,
    guard: MutexGuard<'g, T>,
    deadline: Option<Instant>,
) -> (MutexGuard<'g, T>, bool) {
    match deadline {
        None => (
            condition
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner),
            true,
        ),
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return (guard, false);
            }
            let (guard, _) = condition
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner);
            (guard, true)
        }
    }
}
