//! Writes layers and archives byte by byte, sound and unsound ones.

use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::path::Path;

/// One entry of a layer.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: u8,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u64,
    pub(crate) mtime: u64,
    pub(crate) owner: u64,
    pub(crate) data: Vec<u8>,
    /// Stated instead of the data's length.
    pub(crate) size: Option<u64>,
    pub(crate) pax: Vec<(String, Vec<u8>)>,
}

impl Entry {
    fn new(path: &str, kind: u8) -> Self {
        Self {
            path: path.into(),
            kind,
            link: Vec::new(),
            mode: if kind == b'5' { 0o755 } else { 0o644 },
            mtime: 1_000_000,
            owner: 0,
            data: Vec::new(),
            size: None,
            pax: Vec::new(),
        }
    }

    pub(crate) fn file(path: &str, data: impl Into<Vec<u8>>) -> Self {
        let mut entry = Self::new(path, b'0');
        entry.data = data.into();
        entry
    }

    pub(crate) fn dir(path: &str) -> Self {
        Self::new(path, b'5')
    }

    pub(crate) fn symlink(path: &str, target: &str) -> Self {
        let mut entry = Self::new(path, b'2');
        entry.link = target.into();
        entry.mode = 0o777;
        entry
    }

    pub(crate) fn hard_link(path: &str, target: &str) -> Self {
        let mut entry = Self::new(path, b'1');
        entry.link = target.into();
        entry
    }

    pub(crate) fn special(path: &str, kind: u8) -> Self {
        Self::new(path, kind)
    }

    pub(crate) fn mode(mut self, mode: u64) -> Self {
        self.mode = mode;
        self
    }

    pub(crate) fn owner(mut self, owner: u64) -> Self {
        self.owner = owner;
        self
    }

    pub(crate) fn pax(mut self, key: &str, value: impl Into<Vec<u8>>) -> Self {
        self.pax.push((key.to_owned(), value.into()));
        self
    }

    pub(crate) fn stated_size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    fn write(&self, out: &mut Vec<u8>) {
        let mut pax = self.pax.clone();
        let mut path = self.path.clone();
        let mut link = self.link.clone();
        for (field, key) in [(&mut path, "path"), (&mut link, "linkpath")] {
            if field.len() > 100 {
                pax.push((key.to_owned(), field.clone()));
                field.truncate(100);
            }
        }
        if !pax.is_empty() {
            let mut records = Vec::new();
            for (key, value) in &pax {
                records.extend(pax_record(key, value));
            }
            header(
                out,
                b"PaxHeader",
                b'x',
                b"",
                0o644,
                0,
                0,
                records.len() as u64,
            );
            padded(out, &records);
        }
        let size = self.size.unwrap_or(self.data.len() as u64);
        header(
            out, &path, self.kind, &link, self.mode, self.mtime, self.owner, size,
        );
        padded(out, &self.data);
    }
}

fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    let mut record = format!("{length} {key}=").into_bytes();
    record.extend_from_slice(value);
    record.push(b'\n');
    record
}

#[expect(clippy::too_many_arguments, reason = "the fields of a header")]
fn header(
    out: &mut Vec<u8>,
    path: &[u8],
    kind: u8,
    link: &[u8],
    mode: u64,
    mtime: u64,
    owner: u64,
    size: u64,
) {
    let mut header = tar::Header::new_gnu();
    header.set_mode(u32::try_from(mode).unwrap());
    header.set_mtime(mtime);
    header.set_uid(owner);
    header.set_gid(owner);
    header.set_size(size);
    let bytes = header.as_mut_bytes();
    bytes[..path.len()].copy_from_slice(path);
    bytes[156] = kind;
    bytes[157..157 + link.len()].copy_from_slice(link);
    header.set_cksum();
    out.extend_from_slice(header.as_bytes());
}

fn padded(out: &mut Vec<u8>, data: &[u8]) {
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(512), 0);
}

/// The uncompressed archive of a layer.
pub(crate) fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        entry.write(&mut out);
    }
    out.resize(out.len() + 1024, 0);
    out
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    format!("sha256:{hex}")
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

pub(crate) fn compress(data: &[u8], how: Compression) -> Vec<u8> {
    match how {
        Compression::None => data.to_vec(),
        Compression::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd => zstd::stream::encode_all(data, 1).unwrap(),
    }
}

/// An image, and the files of its OCI layout.
pub(crate) struct Built {
    /// Name in the layout, content.
    pub(crate) files: Vec<(String, Vec<u8>)>,
    /// Digest of the manifest.
    pub(crate) manifest: String,
    /// Digest of the configuration.
    pub(crate) config: String,
    /// Digests of the layers' files.
    pub(crate) blobs: Vec<String>,
}

/// Puts an image together from uncompressed layer archives, lowest first.
pub(crate) fn build(layers: &[Vec<u8>], how: Compression) -> Built {
    build_for(layers, how, std::env::consts::ARCH)
}

pub(crate) fn build_for(layers: &[Vec<u8>], how: Compression, machine: &str) -> Built {
    let architecture = match machine {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let mut files = Vec::new();
    let mut put = |bytes: Vec<u8>| {
        let digest = digest(&bytes);
        files.push((format!("blobs/sha256/{}", &digest[7..]), bytes));
        digest
    };
    let mut described = Vec::new();
    let mut blobs = Vec::new();
    for layer in layers {
        let blob = compress(layer, how);
        let size = blob.len();
        let digest = put(blob);
        let kind = match how {
            Compression::None => "tar",
            Compression::Gzip => "tar+gzip",
            Compression::Zstd => "tar+zstd",
        };
        described.push(serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.layer.v1.{kind}"),
            "digest": digest,
            "size": size,
        }));
        blobs.push(digest);
    }
    let config = serde_json::json!({
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Env": ["PATH=/bin", "GREETING=hello=world"],
            "Entrypoint": ["/bin/sh"],
            "Cmd": ["-c", "true"],
            "WorkingDir": "/work",
            "User": "1000:1000",
            "Labels": {"kind": "test"},
        },
        "rootfs": {
            "type": "layers",
            "diff_ids": layers.iter().map(|layer| digest(layer)).collect::<Vec<_>>(),
        },
    });
    let config = serde_json::to_vec(&config).unwrap();
    let config_size = config.len();
    let config = put(config);
    let manifest = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config,
            "size": config_size,
        },
        "layers": described,
    }))
    .unwrap();
    let manifest = put(manifest);
    Built {
        files,
        manifest,
        config,
        blobs,
    }
}

impl Built {
    /// What an index says about it.
    pub(crate) fn descriptor(&self, tag: &str) -> serde_json::Value {
        let name = format!("blobs/sha256/{}", &self.manifest[7..]);
        let size = self.files.iter().find(|(n, _)| *n == name).unwrap().1.len();
        serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": self.manifest,
            "size": size,
            "annotations": {"org.opencontainers.image.ref.name": tag},
        })
    }

    /// The files of a layout that holds this image alone.
    pub(crate) fn layout(&self) -> Vec<(String, Vec<u8>)> {
        layout(&[self.descriptor("v1")], &[self])
    }

    /// Writes an OCI archive.
    pub(crate) fn write(&self, path: &Path) {
        write_archive(path, &self.layout());
    }
}

/// The files of a layout with these descriptors in its index.
pub(crate) fn layout(
    descriptors: &[serde_json::Value],
    images: &[&Built],
) -> Vec<(String, Vec<u8>)> {
    let index = serde_json::json!({"schemaVersion": 2, "manifests": descriptors});
    let mut files = vec![
        (
            "oci-layout".to_owned(),
            br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
        ),
        ("index.json".to_owned(), serde_json::to_vec(&index).unwrap()),
    ];
    for image in images {
        files.extend(image.files.iter().cloned());
    }
    files
}

pub(crate) fn write_archive(path: &Path, files: &[(String, Vec<u8>)]) {
    let entries: Vec<Entry> = files
        .iter()
        .map(|(name, data)| Entry::file(name, data.clone()))
        .collect();
    fs::write(path, tar(&entries)).unwrap();
}

pub(crate) fn write_directory(path: &Path, files: &[(String, Vec<u8>)]) {
    for (name, data) in files {
        let to = path.join(name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, data).unwrap();
    }
}

/// Writes an image of these layers as an OCI archive; returns its reference.
pub(crate) fn image(dir: &Path, name: &str, layers: &[Vec<Entry>]) -> String {
    let layers: Vec<Vec<u8>> = layers.iter().map(|layer| tar(layer)).collect();
    let path = dir.join(format!("{name}.tar"));
    build(&layers, Compression::None).write(&path);
    format!("oci-archive:{}", path.display())
}
