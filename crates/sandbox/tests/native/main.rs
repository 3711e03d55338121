//! The native engine against the real kernel, as root and as a plain user.

mod bed;
mod isolation;
mod leftovers;
mod lifecycle;
mod limits;
mod network;
