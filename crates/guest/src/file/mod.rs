//! Files of the sandbox: reading, atomic writing, listing, tar and zip archives. It
//! knows neither HTTP nor a client's dialect.

mod archive;
mod beneath;
mod error;
mod extract;
mod look;
mod read;
mod write;
mod zip;

pub use archive::archive;
pub use error::FileError;
pub use extract::extract;
pub use look::{list, remove, stat};
pub use read::{Source, open};
pub use write::{WriteOptions, make_directories, write_atomically};
pub use zip::{unzip, zip_directory};
