//! The in-sandbox server: PID 1 of a sandbox and the only door into it.
//!
//! Statically linked, plain threads, no dependence on the image: it must work
//! beside a busybox, a Debian or nothing at all. Its socket is the whole
//! interface; it knows neither engines nor the runtime server.
//!
//! Rooms: [`init`] makes the process fit to be PID 1; [`process`] starts and
//! ends commands; [`mod@file`] reads and writes files; [`edit`], [`search`] and
//! [`git`] are tools of agents; [`http`] speaks HTTP; [`api`] joins them into
//! routes, one module per client family.
//! ends commands; [`shell`] keeps shells that last; [`edit`] and [`search`]
//! are tools of agents; [`http`] speaks HTTP; [`api`] joins them into routes, one
//! module per client family.

pub mod api;
pub mod edit;
pub mod file;
pub mod git;
mod guest;
pub mod http;
pub mod init;
pub mod process;
pub mod search;
pub mod shell;
pub mod sync;

pub use guest::{Config, Guest};

use rustix::rand::GetRandomFlags;

/// 32 hexadecimal digits that nobody can guess.
pub fn random_id() -> String {
    let mut bytes = [0u8; 16];
    let mut left: &mut [u8] = &mut bytes;
    while !left.is_empty() {
        // Fails only for a bad pointer; an interruption is tried again.
        if let Ok(count) = rustix::rand::getrandom(&mut *left, GetRandomFlags::empty()) {
            left = &mut left[count..];
        }
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
