//! Images: how they are named, fetched, unpacked, stored, shared and dropped.
//!
//! [`ImageRef`] names one, [`ImageStore`] makes it present and keeps it,
//! [`Image`] is what an engine mounts. The store knows nothing of engines;
//! files frozen from sandboxes are [`crate::snapshot`]'s.

mod error;
mod host;
#[expect(
    clippy::module_inception,
    reason = "the type it holds is the module's main one"
)]
mod image;
mod layer;
mod layout;
mod lock;
mod progress;
mod records;
mod reference;
mod registry;
mod source;
mod store;
mod temp;

pub use error::ImageError;
pub use image::{Image, ImageConfig, ReadOnlyBind};
pub(crate) use lock::{FileLock, Sharing};
pub use progress::{Progress, PullUpdate, Quiet};
pub(crate) use records::{random_name, read as read_record, write as write_record};
pub use reference::{ImageRef, PullPolicy};
pub use store::{Evicted, ImageStore, ImageSummary};

/// Lower-case hexadecimal.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
