#!/usr/bin/env bash
# Builds the images that tests and benchmarks start sandboxes from:
#
#   busybox/            busybox-static and its applet links, nothing else
#   static/             one static program, /probe: no shell, no libc
#   debian/             a Debian root with python3, git, bash, procps
#   busybox.oci.tar     three layers with whiteouts, an opaque directory, hard
#                       links, a setuid file; tag v1
#   busybox.docker.tar  the same as `docker save` writes it
#   special.oci.tar     device nodes, a FIFO, extended attributes
#
# They land in target/test-images, or in $SKYRL_TEST_IMAGES. Each is built
# aside and renamed, so whoever sees an image sees all of it; one that is
# already there and whose recipe is unchanged is left alone.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${SKYRL_TEST_IMAGES:-$(dirname "$here")/target/test-images}
recipes=$here/test-images
packages=python3,git,procps

say() { echo "test images: $*" >&2; }
die() { say "$*"; exit 1; }

mkdir -p "$out/.keys"
exec 9>"$out/.lock"
flock -w 900 9 || die "another build has held $out/.lock for 15 minutes; end it and try again"
work=$(mktemp -d "$out/.build-XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
# What a killed build left; the lock says that nobody is at work there.
find "$out" -maxdepth 1 -name '.build-*' ! -path "$work" -exec rm -rf --one-file-system {} +

# fresh IMAGE KEY: whether IMAGE is there and was built by this recipe.
fresh() { [ -e "$out/$1" ] && [ "$(cat "$out/.keys/$1" 2>/dev/null)" = "$2" ]; }

# put IMAGE KEY: moves $work/IMAGE into place and notes its recipe.
put() {
    rm -f "$out/.keys/$1"
    if [ -e "$out/$1" ]; then mv -T "$out/$1" "$work/old-$1"; fi
    mv -T "$work/$1" "$out/$1"
    echo "$2" >"$out/.keys/$1"
}

key() { cat "$@" | sha256sum | cut -d' ' -f1; }

busybox=$(command -v busybox) || die "busybox is missing: run make setup (package busybox-static)"
if ldd "$busybox" >/dev/null 2>&1; then
    die "$busybox is linked dynamically and won't run in an empty root: install busybox-static"
fi
busybox_key=$(key "$busybox")
if ! fresh busybox "$busybox_key"; then
    say "busybox ..."
    mkdir -p "$work/busybox/bin"
    install -m 755 "$busybox" "$work/busybox/bin/busybox"
    "$busybox" --list-full | while read -r applet; do
        [ "$applet" = bin/busybox ] && continue
        mkdir -p "$work/busybox/$(dirname "$applet")"
        ln -s /bin/busybox "$work/busybox/$applet"
    done
    put busybox "$busybox_key"
fi

static_key=$(key "$recipes/static.rs")
if ! fresh static "$static_key"; then
    say "static ..."
    mkdir -p "$work/static"
    rustc --edition 2024 -C target-feature=+crt-static -C opt-level=s -C panic=abort -C strip=symbols \
        -o "$work/static/probe" "$recipes/static.rs"
    put static "$static_key"
fi

archives_key=$busybox_key-$(key "$recipes/archives.py")
if ! fresh special.oci.tar "$archives_key"; then
    say "busybox.oci.tar, busybox.docker.tar, special.oci.tar ..."
    python3 "$recipes/archives.py" "$out/busybox" "$work"
    for archive in busybox.oci.tar busybox.docker.tar special.oci.tar; do
        put "$archive" "$archives_key"
    done
fi

# shellcheck source=/dev/null
. /etc/os-release
suite=${VERSION_CODENAME:-}
debian_key="$suite $packages 1"
if ! fresh debian "$debian_key"; then
    command -v mmdebstrap >/dev/null || die "mmdebstrap is missing: run make setup"
    [ -n "$suite" ] || die "/etc/os-release names no VERSION_CODENAME: the debian image needs Debian or Ubuntu"
    # The image comes from where this machine's own packages come from.
    sources=()
    for list in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [ -s "$list" ] && grep -q -E '(debian|ubuntu)' "$list" && sources+=("$list")
    done
    [ "${#sources[@]}" -gt 0 ] || die "no Debian or Ubuntu source in /etc/apt: can't tell where to get the debian image"
    root=()
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || die "the debian image needs root: run as root, or let sudo work without a password"
        root=(sudo -n)
    fi
    say "debian ($suite with $packages; about a minute) ..."
    log=$work/mmdebstrap.log
    if ! "${root[@]}" mmdebstrap --mode=root --variant=minbase --format=directory --include="$packages" \
        --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        "$suite" "$work/debian" "${sources[@]}" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "mmdebstrap failed, its last lines are above; is the package mirror reachable (apt-get update)?"
    fi
    # The host's resolver and name are no business of the image.
    "${root[@]}" rm -f "$work/debian/etc/resolv.conf" "$work/debian/etc/hostname"
    put debian "$debian_key"
fi
say "ready in $out"
