//! Where the parts of an image (manifest, configuration, layers) are read
//! from: an OCI layout or skopeo's `dir:` folder on the disk, or an archive
//! file. All give the same [`Parts`]; nothing here writes or unpacks.

mod blob;
mod docker;
mod files;
mod oci;

pub(super) use blob::{Hashing, check_digest, decompress};
pub(super) use files::Files;

use super::error::ImageError;
use super::image::ImageConfig;
use super::reference::ImageRef;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Longest manifest, index or configuration read.
const MAX_DOCUMENT: u64 = 16 << 20;
/// Layers of an image.
const MAX_LAYERS: usize = 400;

/// An image as it comes: what it says, and where its layers are.
pub(super) struct Parts {
    /// Digest of the configuration, which names every layer's content.
    pub(super) digest: String,
    pub(super) config: ImageConfig,
    /// Lowest first.
    pub(super) layers: Vec<LayerPart>,
}

/// A layer that has not been unpacked.
#[derive(Debug, Clone)]
pub(super) struct LayerPart {
    /// Digest of its uncompressed archive.
    pub(super) diff_id: String,
    /// Its file, for [`Files::open`].
    pub(super) file: String,
    /// Digest of that file and its length, where the manifest tells.
    pub(super) blob: Option<(String, u64)>,
}

/// What kind of directory `dir:` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DirectoryKind {
    /// An unpacked root file system.
    Root,
    /// An OCI image layout.
    OciLayout,
    /// What `skopeo copy ... dir:PATH` writes.
    Skopeo,
}

impl DirectoryKind {
    pub(super) fn of(path: &Path) -> Self {
        if path.join("oci-layout").is_file() && path.join("index.json").is_file() {
            Self::OciLayout
        } else if path.join("version").is_file() && path.join("manifest.json").is_file() {
            Self::Skopeo
        } else {
            Self::Root
        }
    }
}

/// Reads the manifest and configuration of the image `wanted` in `files`.
/// `wanted` is the reference as the user gave it.
pub(super) fn read(wanted: &ImageRef, files: &Files) -> Result<Parts, ImageError> {
    let context = Context {
        image: wanted.to_string(),
        files,
    };
    match wanted {
        ImageRef::DockerArchive { tag, .. } => docker::read(&context, tag.as_deref()),
        ImageRef::OciArchive { tag, .. } => oci::read_layout(&context, tag.as_deref()),
        ImageRef::Directory(path) if DirectoryKind::of(path) == DirectoryKind::Skopeo => {
            oci::read_skopeo_dir(&context)
        }
        _ => oci::read_layout(&context, None),
    }
}

/// What the readers of one image share.
struct Context<'a> {
    image: String,
    files: &'a Files,
}

impl Context<'_> {
    fn broken(&self, reason: impl Into<String>) -> ImageError {
        ImageError::Broken {
            image: self.image.clone(),
            reason: reason.into(),
        }
    }

    fn not_found(&self, reason: impl Into<String>) -> ImageError {
        ImageError::NotFound {
            image: self.image.clone(),
            reason: reason.into(),
        }
    }

    /// Reads a small file whole.
    fn document(&self, name: &str) -> Result<Vec<u8>, ImageError> {
        self.files
            .read(name, MAX_DOCUMENT)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => self.broken(format!("it has no {name}")),
                _ if error.raw_os_error().is_none() => self.broken(format!("{name}: {error}")),
                _ => ImageError::Io {
                    step: "reading",
                    path: name.into(),
                    source: error,
                },
            })
    }

    fn parse<'t, T: Deserialize<'t>>(&self, name: &str, text: &'t [u8]) -> Result<T, ImageError> {
        serde_json::from_slice(text).map_err(|error| self.broken(format!("{name}: {error}")))
    }

    /// Reads a file named by its digest and checks that it has it.
    fn verified(&self, file: &str, digest: &str) -> Result<Vec<u8>, ImageError> {
        let text = self.document(file)?;
        let found = blob::digest(&text);
        if found == digest {
            Ok(text)
        } else {
            Err(self.broken(format!(
                "{file} should have the digest {digest}, but has {found}"
            )))
        }
    }

    /// Puts an image together from its configuration and layer files.
    fn parts(
        &self,
        config: &[u8],
        files: Vec<(String, Option<(String, u64)>)>,
    ) -> Result<Parts, ImageError> {
        let document: Document = self.parse("the image's configuration", config)?;
        if !document.os.is_empty() && document.os != "linux" {
            return Err(self.broken(format!("it is made for {}", document.os)));
        }
        let here = oci::machine_architecture();
        if !document.architecture.is_empty() && document.architecture != here {
            return Err(self.broken(format!(
                "it is made for {} processors, this machine has {here}",
                document.architecture
            )));
        }
        let diff_ids = document.rootfs.diff_ids;
        if diff_ids.len() != files.len() || files.is_empty() {
            return Err(self.broken(format!(
                "its configuration names {} layers, its manifest {}: it is no container image",
                diff_ids.len(),
                files.len()
            )));
        }
        if diff_ids.len() > MAX_LAYERS {
            return Err(self.broken(format!("it has {} layers", diff_ids.len())));
        }
        for id in &diff_ids {
            check_digest(id).map_err(|why| self.broken(why))?;
        }
        Ok(Parts {
            digest: blob::digest(config),
            config: document.config.unwrap_or_default().into(),
            layers: diff_ids
                .into_iter()
                .zip(files)
                .map(|(diff_id, (file, blob))| LayerPart {
                    diff_id,
                    file,
                    blob,
                })
                .collect(),
        })
    }
}

/// An image configuration, of OCI or Docker.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    config: Option<RunConfig>,
    #[serde(default)]
    rootfs: RootFs,
}

#[derive(Default, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    labels: Option<BTreeMap<String, Option<String>>>,
}

impl From<RunConfig> for ImageConfig {
    fn from(config: RunConfig) -> Self {
        let text = |value: Option<String>| value.filter(|text| !text.is_empty());
        Self {
            env: config
                .env
                .unwrap_or_default()
                .iter()
                .filter_map(|pair| pair.split_once('='))
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
            workdir: text(config.working_dir),
            user: text(config.user),
            entrypoint: config.entrypoint.unwrap_or_default(),
            cmd: config.cmd.unwrap_or_default(),
            labels: config
                .labels
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.unwrap_or_default()))
                .collect(),
        }
    }
}
