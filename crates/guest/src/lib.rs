//! The in-sandbox server: PID 1 of a sandbox and the only door into it.
//!
//! Statically linked, plain threads, no dependence on the image: it must work
//! beside a busybox, a Debian or nothing at all. Its socket is the whole
//! interface; it knows neither engines nor the runtime server.

pub mod edit;
pub mod http;
pub mod search;
