#!/usr/bin/env bash
# Puts on this machine what building, testing, checking and measuring need, and
# says what it does and why. Under a second when everything is there already.
#
# usage: setup.sh [test] [lint] [fuzz]     (test and lint when none is named)
#
# What it changed outside the repository is noted in .tools/changes, and
# scripts/teardown.sh undoes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=$PWD/.tools
changes=$tools/changes
mkdir -p "$tools"
export PATH=$tools/bin:$PATH
wanted=" ${*:-test lint} "

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 3; }

root=()
if [ "$(id -u)" -ne 0 ]; then root=(sudo -n); fi

# as_root WHY COMMAND..: runs COMMAND as root, or says what a person must do.
as_root() {
    local why=$1
    shift
    if [ "${#root[@]}" -gt 0 ] && ! sudo -n true 2>/dev/null; then
        die "$why needs root, and sudo does not work here without a password. Run as root, then try again: $*"
    fi
    "${root[@]}" "$@"
}

# Debian packages: what each is for, and what tells that it is there.
missing=()
need() { # PACKAGE WHY TEST..
    local package=$1 why=$2
    shift 2
    "$@" >/dev/null 2>&1 && return
    say "$package is missing: $why"
    missing+=("$package")
}
has() { command -v "$1"; }
static_busybox() { local path; path=$(command -v busybox) && ! ldd "$path"; }
libc_archive() { compgen -G '/usr/lib/*/libc.a' || compgen -G '/usr/lib*/libc.a'; }

need gcc "links Rust programs" has gcc
need libc6-dev "libc.a, for the static guest" libc_archive
need git "the debian test image's and the guest's git" has git
need python3 "writes test images, runs the benchmark's harness" has python3
need ca-certificates "downloads over TLS" test -s /etc/ssl/certs/ca-certificates.crt
if [[ $wanted == *" test "* ]]; then
    need podman "the podman engine, registry images" has podman
    need conmon "podman keeps a monitor beside each container" has conmon
    need crun "the oci engine" has crun
    need fuse-overlayfs "writable roots where the kernel's overlay is refused" has fuse-overlayfs
    need uidmap "podman as a plain user" has newuidmap
    need slirp4netns "the nat network" has slirp4netns
    need busybox-static "test images" static_busybox
    need mmdebstrap "the debian test image" has mmdebstrap
    need skopeo "reads registries and archives" has skopeo
    need buildah "builds images in tests" has buildah
    need procps "tests look at processes" has ps
    need util-linux "unshare, setpriv, nsenter: tests as a plain user" has setpriv
    need passwd "tests make a plain user" has useradd
fi
if [[ $wanted == *" fuzz "* ]]; then
    need g++ "builds the fuzzer's runtime" has g++
fi
if [[ $wanted == *" lint "* ]]; then
    need shellcheck "checks the scripts" has shellcheck
fi

if [ "${#missing[@]}" -gt 0 ]; then
    command -v apt-get >/dev/null ||
        die "this machine has no apt-get; install the equivalents of: ${missing[*]}"
    say "installing ${missing[*]} (about a minute) ..."
    install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}")
    log=$tools/apt.log
    # The lists may be absent or stale, and an update may be needless: try both.
    if ! as_root "installing packages" "${install[@]}" >"$log" 2>&1; then
        as_root "installing packages" apt-get update -q >>"$log" 2>&1 || true
        as_root "installing packages" "${install[@]}" >>"$log" 2>&1 || {
            tail -n 20 "$log" >&2
            die "apt-get could not install ${missing[*]}: its last lines are above, all of them in $log"
        }
    fi
    echo "packages ${missing[*]}" >>"$changes"
fi

# Tools from crates.io, where none that is new enough is on PATH. Built with
# little optimisation: they run for seconds.
tool() { # CRATE VERSION OLDEST WHY VERSION-COMMAND..
    local crate=$1 version=$2 oldest=$3 why=$4 found
    shift 4
    found=$("$@" 2>/dev/null | grep -oE -m1 '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1 || true)
    if [ -n "$found" ] && [ "$(printf '%s\n' "$oldest" "$found" | sort -V | head -n 1)" = "$oldest" ]; then
        return
    fi
    say "building $crate $version (found: ${found:-none}): $why; takes 2 to 6 minutes on two cores ..."
    CARGO_TARGET_DIR=$tools/build CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off \
        CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_DEBUG=false \
        cargo install -q --locked --root "$tools" --version "$version" "$crate" ||
        die "cargo install $crate failed; is the crate registry reachable?"
    rm -rf "$tools/build"
}
command -v cargo >/dev/null || die "cargo is missing: install Rust with rustup (the version comes from rust-toolchain.toml)"
if [[ $wanted == *" test "* ]]; then
    tool cargo-nextest 0.9.143 0.9.100 "runs the tests, each in its own process with a deadline" cargo nextest --version
fi
if [[ $wanted == *" lint "* ]]; then
    tool cargo-deny 0.20.2 0.18.0 "checks licences and sources of dependencies" cargo deny --version
    tool cargo-machete 0.9.2 0.8.0 "finds dependencies that nothing uses" cargo machete --version
fi
if [[ $wanted == *" fuzz "* ]]; then
    tool cargo-fuzz 0.13.1 0.12.0 "runs the fuzz targets" cargo fuzz --version
fi

[[ $wanted == *" test "* ]] || exit 0

# crun refuses a hybrid cgroup tree while its v2 mount still owns a controller.
# A controller that is mounted as v1 leaves v2, if nothing uses it there.
while read -r unified; do
    read -r -a controllers <"$unified/cgroup.controllers" || true
    for controller in "${controllers[@]}"; do
        at=/sys/fs/cgroup/$controller
        say "crun refuses hybrid cgroups while $unified has the $controller controller: mounting it as v1 on $at"
        as_root "mounting a cgroup controller" mkdir -p "$at"
        as_root "mounting a cgroup controller" mount -t cgroup -o "$controller" cgroup "$at" ||
            die "could not mount $controller on $at: crun (the oci and podman engines) won't start containers here"
        echo "cgroup $at" >>"$changes"
    done
done < <(awk '$3 == "cgroup2" && $2 != "/sys/fs/cgroup" { print $2 }' /proc/mounts)

# Distributions open these two to everyone; some containers and minimal
# machines don't, and a plain user then has neither fuse-overlayfs nor slirp4netns.
for device in /dev/fuse /dev/net/tun; do
    [ -c "$device" ] || {
        say "$device does not exist: load its module (modprobe fuse tun), or tests that need it will fail"
        continue
    }
    mode=$(stat -c %a "$device")
    [ "$mode" = 666 ] && continue
    say "$device has mode $mode and plain users can't open it: setting 666"
    as_root "opening $device to plain users" chmod 666 "$device"
    echo "mode $device $mode" >>"$changes"
done
