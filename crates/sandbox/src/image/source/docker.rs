//! Archives of `docker save`: `manifest.json` names the configuration and the
//! layers of each image. Newer ones hold an OCI layout as well, whose blobs the
//! same file names.

use super::{Context, Parts};
use crate::image::error::ImageError;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

/// Reads the image of an archive, or the one with this tag.
pub(super) fn read(context: &Context<'_>, tag: Option<&str>) -> Result<Parts, ImageError> {
    let text = context.document("manifest.json")?;
    let mut images: Vec<Saved> = context.parse("manifest.json", &text)?;
    let tags = images
        .iter()
        .flat_map(|image| image.repo_tags.iter().flatten())
        .take(20)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    if let Some(tag) = tag {
        images.retain(|image| {
            image
                .repo_tags
                .iter()
                .flatten()
                .any(|name| is_tag(name, tag))
        });
        if images.is_empty() {
            return Err(context.not_found(format!("no image in it is tagged {tag}; it has {tags}")));
        }
    }
    let image = match images.len() {
        0 => return Err(context.broken("it holds no image")),
        1 => images.remove(0),
        _ => {
            return Err(context.not_found(format!(
                "it holds several images ({tags}): choose one by its tag"
            )));
        }
    };
    let config = context.document(&image.config)?;
    let layers = image.layers.into_iter().map(|file| (file, None)).collect();
    context.parts(&config, layers)
}

/// `repo:tag` is meant by itself, without its registry, by `tag` alone, and
/// by `repo` if the tag is `latest`.
fn is_tag(name: &str, wanted: &str) -> bool {
    let ends = |name: &str| {
        name == wanted
            || name
                .strip_suffix(wanted)
                .is_some_and(|rest| rest.ends_with('/') || rest.ends_with(':'))
    };
    ends(name) || name.strip_suffix(":latest").is_some_and(ends)
}
