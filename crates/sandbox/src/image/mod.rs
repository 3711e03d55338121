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

/// Unpacks one layer's archive, compressed or not, as a plain user's store
/// would, into a directory that does not exist yet; at most `limit` bytes. What
/// was made before an error is left to the caller. Fuzzed; the store itself
/// checks digests as well.
///
/// # Errors
/// Why the archive was refused.
pub fn unpack_layer(
    archive: impl std::io::Read + Send,
    directory: &std::path::Path,
    limit: u64,
) -> Result<(), String> {
    let spent = std::sync::atomic::AtomicU64::new(0);
    let options = layer::UnpackOptions {
        marks: layout::Marks::User,
        spend: &|bytes| {
            let before = spent.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
            if before.saturating_add(bytes) > limit {
                return Err(layer::LayerError::TooLarge("it passes the limit".into()));
            }
            Ok(())
        },
        stop: &std::sync::atomic::AtomicBool::new(false),
    };
    let archive = source::decompress(archive).map_err(|error| error.to_string())?;
    layer::unpack(archive, directory, &options)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Lower-case hexadecimal.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
