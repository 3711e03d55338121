#!/usr/bin/env python3
"""Writes the archive test images from the busybox root: an OCI archive, the
same as a docker archive, and an OCI archive of special files.

Made by hand and not with a tool, so that the layers hold exactly what the
image store must cope with. Same input, same bytes, same digest.

usage: archives.py BUSYBOX_ROOT OUTPUT_DIRECTORY
"""

import gzip
import hashlib
import io
import json
import os
import sys
import tarfile

MTIME = 1_700_000_000
CREATED = "2023-11-14T22:13:20Z"
NAME = "localhost/skyrl-test/busybox:v1"


class Layer:
    """A layer's tar, built entry by entry."""

    def __init__(self):
        self.buffer = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.buffer, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, name, kind=tarfile.REGTYPE, data=b"", mode=None, target="", owner=0, pax=None,
            device=(0, 0)):
        info = tarfile.TarInfo(name)
        info.type = kind
        info.mtime = MTIME
        info.mode = mode if mode is not None else (0o755 if kind == tarfile.DIRTYPE else 0o644)
        info.uid = info.gid = owner
        info.linkname = target
        info.size = len(data)
        info.devmajor, info.devminor = device
        info.pax_headers = pax or {}
        self.tar.addfile(info, io.BytesIO(data))

    def directory(self, name, mode=0o755):
        self.add(name, tarfile.DIRTYPE, mode=mode)

    def bytes(self):
        self.tar.close()
        return self.buffer.getvalue()


def base_layer(root):
    """The busybox root, and what the later layers will change."""
    layer = Layer()
    for folder, names, files in os.walk(root):
        names.sort()
        relative = os.path.relpath(folder, root)
        if relative != ".":
            layer.directory(relative)
        for name in sorted(files):
            path = os.path.join(folder, name)
            inner = os.path.normpath(os.path.join(relative, name))
            if os.path.islink(path):
                layer.add(inner, tarfile.SYMTYPE, target=os.readlink(path), mode=0o777)
            else:
                with open(path, "rb") as file:
                    layer.add(inner, data=file.read(), mode=0o755)
    layer.directory("etc")
    layer.add("etc/passwd", data=b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
    layer.add("etc/group", data=b"root:x:0:\nuser:x:1000:\n")
    layer.directory("tmp", mode=0o1777)
    layer.directory("root", mode=0o700)
    layer.directory("home")
    layer.directory("opt")
    layer.add("opt/kept", data=b"from layer 1\n")
    layer.add("opt/gone", data=b"must not be seen\n")
    layer.add("opt/replaced", data=b"from layer 1\n")
    layer.directory("opt/opaque")
    layer.add("opt/opaque/old", data=b"must not be seen\n")
    layer.directory("opt/opaque/old-dir")
    layer.add("opt/opaque/old-dir/file", data=b"must not be seen\n")
    layer.directory("opt/gone-dir")
    layer.directory("opt/gone-dir/deep")
    layer.add("opt/gone-dir/deep/file", data=b"must not be seen\n")
    layer.directory("opt/becomes-file")
    layer.add("opt/becomes-file/inner", data=b"must not be seen\n")
    layer.add("opt/becomes-dir", data=b"must not be seen\n")
    layer.add("opt/hard-a", data=b"one inode\n")
    layer.add("opt/hard-b", tarfile.LNKTYPE, target="opt/hard-a")
    layer.add("opt/link-to-dir", tarfile.SYMTYPE, target="gone-dir", mode=0o777)
    return layer.bytes()


def change_layer():
    """Whiteouts, an opaque directory, type changes, a setuid file."""
    layer = Layer()
    layer.directory("opt")
    layer.add("opt/.wh.gone")
    layer.add("opt/replaced", data=b"from layer 2\n")
    layer.directory("opt/opaque")
    layer.add("opt/opaque/.wh..wh..opq")
    layer.add("opt/opaque/new", data=b"from layer 2\n")
    layer.add("opt/becomes-file", data=b"a file now\n")
    layer.directory("opt/becomes-dir")
    layer.add("opt/becomes-dir/inner", data=b"from layer 2\n")
    layer.add("opt/setuid", data=b"#!/bin/sh\nid -u\n", mode=0o4755)
    layer.add("opt/.wh.link-to-dir")
    # A link inside the layer, both names new.
    layer.add("opt/hard-c", data=b"another inode\n")
    layer.add("opt/hard-d", tarfile.LNKTYPE, target="opt/hard-c")
    return layer.bytes()


def last_layer():
    """Removes a directory and brings back a name that layer 2 removed."""
    layer = Layer()
    layer.directory("opt")
    layer.add("opt/.wh.gone-dir")
    layer.add("opt/user-file", data=b"owned by 1000\n", owner=1000)
    layer.directory("opt/link-to-dir")
    layer.add("opt/link-to-dir/file", data=b"from layer 3\n")
    # A long name and one that is no ASCII need extended headers.
    layer.add("opt/" + "long-" * 40 + "name", data=b"long\n")
    layer.add("opt/gr\u00fc\u00df", data=b"unicode\n")
    return layer.bytes()


def special_layer():
    """What a store may only keep as root: devices, capabilities, a FIFO."""
    layer = Layer()
    layer.directory("dev-nodes")
    layer.add("dev-nodes/null", tarfile.CHRTYPE, mode=0o666, device=(1, 3))
    layer.add("dev-nodes/loop", tarfile.BLKTYPE, mode=0o660, device=(7, 0))
    layer.add("dev-nodes/fifo", tarfile.FIFOTYPE, mode=0o644)
    # cap_net_bind_service=ep, as setcap writes it (VFS_CAP_REVISION_2).
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    layer.add("dev-nodes/with-capability", data=b"x", mode=0o755,
              pax={"SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape")})
    layer.add("dev-nodes/with-user-xattr", data=b"x", pax={"SCHILY.xattr.user.note": "kept"})
    return layer.bytes()


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def config(layers):
    return json.dumps({
        "created": CREATED,
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    "IMAGE_VARIABLE=from the image"],
            "Cmd": ["/bin/sh"],
            "WorkingDir": "/opt",
            "Labels": {"org.example.purpose": "tests"},
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
        "history": [{"created": CREATED, "created_by": f"layer {n + 1}"} for n in range(len(layers))],
    }, separators=(",", ":")).encode()


def write_tar(path, files):
    """All or nothing: readers never see half an archive."""
    with tarfile.open(path + ".new", "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), MTIME, 0o644
            tar.addfile(info, io.BytesIO(data))
    os.rename(path + ".new", path)


def write_oci(path, layers, tag):
    """Every second layer stays uncompressed: both forms are legal."""
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}

    def blob(data, media):
        files["blobs/sha256/" + digest(data).removeprefix("sha256:")] = data
        return {"mediaType": media, "digest": digest(data), "size": len(data)}

    described = []
    for number, layer in enumerate(layers):
        if number % 2 == 0:
            packed = gzip.compress(layer, mtime=0)
            described.append(blob(packed, "application/vnd.oci.image.layer.v1.tar+gzip"))
        else:
            described.append(blob(layer, "application/vnd.oci.image.layer.v1.tar"))
    manifest = json.dumps({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(config(layers), "application/vnd.oci.image.config.v1+json"),
        "layers": described,
    }, separators=(",", ":")).encode()
    entry = blob(manifest, "application/vnd.oci.image.manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    write_tar(path, files)


def write_docker(path, layers, name):
    """The form of `docker save`: manifest.json and plain layer tars."""
    body = config(layers)
    config_name = digest(body).removeprefix("sha256:") + ".json"
    files = {config_name: body}
    names = []
    for layer in layers:
        layer_name = digest(layer).removeprefix("sha256:") + "/layer.tar"
        files[layer_name] = layer
        names.append(layer_name)
    files["manifest.json"] = json.dumps(
        [{"Config": config_name, "RepoTags": [name], "Layers": names}]).encode()
    write_tar(path, files)


def main():
    root, out = sys.argv[1:]
    base = base_layer(root)
    layers = [base, change_layer(), last_layer()]
    write_oci(os.path.join(out, "busybox.oci.tar"), layers, "v1")
    write_docker(os.path.join(out, "busybox.docker.tar"), layers, NAME)
    write_oci(os.path.join(out, "special.oci.tar"), [base, special_layer()], "v1")


if __name__ == "__main__":
    main()
