//! Images: how they are named, fetched, unpacked, stored, shared and dropped.

mod error;
mod reference;

pub use error::ImageError;
pub use reference::{ImageRef, PullPolicy};
