//! OCI image layouts, and skopeo's `dir:` folders.

use super::blob::check_digest;
use super::{Context, Parts};
use crate::image::error::ImageError;
use serde::Deserialize;
use std::collections::BTreeMap;

/// An index may name further indexes.
const MAX_NESTING: usize = 4;
/// Manifests looked at in one index.
const MAX_MANIFESTS: usize = 1000;

/// Annotation that holds the tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation in which containerd and Docker put the whole name.
const IMAGE_NAME: &str = "io.containerd.image.name";

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

impl Descriptor {
    fn is_index(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            "application/vnd.oci.image.index.v1+json"
                | "application/vnd.docker.distribution.manifest.list.v2+json"
        )
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        let annotations = self.annotations.iter();
        annotations.flat_map(|all| {
            [REF_NAME, IMAGE_NAME]
                .into_iter()
                .filter_map(|key| all.get(key).map(String::as_str))
        })
    }

    /// Whether it suits this machine; `None` when it does not say.
    fn suits(&self) -> Option<bool> {
        let platform = self.platform.as_ref()?;
        if platform.os.is_empty() && platform.architecture.is_empty() {
            return None;
        }
        Some(platform.os == "linux" && platform.architecture == machine_architecture())
    }
}

/// This machine's processor, as images name it.
pub(super) fn machine_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

/// Reads the image of a layout, or the one with this tag.
pub(super) fn read_layout(context: &Context<'_>, tag: Option<&str>) -> Result<Parts, ImageError> {
    let text = context.document("index.json")?;
    let index: Index = context.parse("index.json", &text)?;
    let mut found = index.manifests;
    if let Some(tag) = tag {
        let all = names(&found);
        found.retain(|one| one.names().any(|name| is_tag(name, tag)));
        if found.is_empty() {
            return Err(context.not_found(format!("no image in it is tagged {tag}; it has {all}")));
        }
    }
    let chosen = choose(context, found)?;
    resolve(context, &chosen, blob_file, 0)
}

/// Reads skopeo's folder: `manifest.json`, and blobs named by their digests'
/// hexadecimal digits.
pub(super) fn read_skopeo_dir(context: &Context<'_>) -> Result<Parts, ImageError> {
    let text = context.document("manifest.json")?;
    let manifest: Manifest = context.parse("manifest.json", &text)?;
    if manifest.config.is_none() && !manifest.manifests.is_empty() {
        let chosen = choose(context, manifest.manifests)?;
        let file = |digest: &str| format!("{digest}.manifest.json");
        let hex = check_digest(&chosen.digest).map_err(|why| context.broken(why))?;
        let text = context.verified(&file(hex), &chosen.digest)?;
        return read_manifest(context, &context.parse("a manifest", &text)?, str::to_owned);
    }
    read_manifest(context, &manifest, str::to_owned)
}

/// File of a blob in a layout, by the hexadecimal digits of its digest.
fn blob_file(hex: &str) -> String {
    format!("blobs/sha256/{hex}")
}

/// Whether a name, in one of the forms in use, has the tag asked for.
fn is_tag(name: &str, tag: &str) -> bool {
    name == tag
        || name
            .rsplit_once(':')
            .is_some_and(|(_, last)| last == tag && !last.contains('/'))
}

fn names(manifests: &[Descriptor]) -> String {
    let names: Vec<&str> = manifests
        .iter()
        .flat_map(Descriptor::names)
        .take(20)
        .collect();
    if names.is_empty() {
        "no tags".into()
    } else {
        names.join(", ")
    }
}

/// The one manifest meant: the only one, or the only one for this machine.
fn choose(context: &Context<'_>, mut found: Vec<Descriptor>) -> Result<Descriptor, ImageError> {
    if found.len() > MAX_MANIFESTS {
        return Err(context.broken(format!("an index of it names {} manifests", found.len())));
    }
    let all = found.clone();
    // Attestations and the like say they are for no platform.
    found.retain(|one| one.suits() != Some(false));
    if found.iter().any(|one| one.suits() == Some(true)) {
        found.retain(|one| one.suits() == Some(true));
    }
    // Variants of one architecture, and one image under several tags.
    found.dedup_by(|a, b| a.digest == b.digest);
    match found.len() {
        0 if all.is_empty() => Err(context.broken("it holds no image")),
        0 => Err(context.not_found(format!(
            "it has no image for linux/{}, only for {}",
            machine_architecture(),
            all.iter()
                .filter_map(|one| one.platform.as_ref())
                .map(|p| format!("{}/{}", p.os, p.architecture))
                .collect::<Vec<_>>()
                .join(", ")
        ))),
        1 => Ok(found.remove(0)),
        _ if found.iter().all(|one| one.suits() == Some(true)) => Ok(found.remove(0)),
        _ => Err(context.not_found(format!(
            "it holds several images ({}): choose one by its tag",
            names(&found)
        ))),
    }
}

/// Follows indexes down to a manifest.
fn resolve(
    context: &Context<'_>,
    chosen: &Descriptor,
    file: fn(&str) -> String,
    depth: usize,
) -> Result<Parts, ImageError> {
    let hex = check_digest(&chosen.digest).map_err(|why| context.broken(why))?;
    let text = context.verified(&file(hex), &chosen.digest)?;
    let manifest: Manifest = context.parse("a manifest", &text)?;
    if chosen.is_index() || (manifest.config.is_none() && !manifest.manifests.is_empty()) {
        if depth >= MAX_NESTING {
            return Err(context.broken("its indexes are nested too deep"));
        }
        let next = choose(context, manifest.manifests)?;
        return resolve(context, &next, file, depth + 1);
    }
    read_manifest(context, &manifest, file)
}

fn read_manifest(
    context: &Context<'_>,
    manifest: &Manifest,
    file: fn(&str) -> String,
) -> Result<Parts, ImageError> {
    let Some(config) = &manifest.config else {
        return Err(context.broken(format!(
            "its manifest (schema {}) names no configuration; export it in OCI form",
            manifest.schema_version
        )));
    };
    let hex = check_digest(&config.digest).map_err(|why| context.broken(why))?;
    let text = context.verified(&file(hex), &config.digest)?;
    let mut layers = Vec::with_capacity(manifest.layers.len());
    for layer in &manifest.layers {
        if layer.media_type.contains("encrypted") {
            return Err(context.broken("its layers are encrypted"));
        }
        let hex = check_digest(&layer.digest).map_err(|why| context.broken(why))?;
        layers.push((file(hex), Some((layer.digest.clone(), layer.size))));
    }
    context.parts(&text, layers)
}
