#!/usr/bin/env bash
# Measures our engines and their peers side by side, and writes bench/RESULTS.md.
# Needs root, like the peers. `bench/run.sh --help` lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

[ "$(id -u)" -eq 0 ] || { echo "bench: run as root: crun and Podman are measured as root" >&2; exit 3; }
export SKYRL_TEST_IMAGES=${SKYRL_TEST_IMAGES:-$(dirname "$PWD")/target/test-images}
[ -d "$SKYRL_TEST_IMAGES/busybox" ] || { echo "bench: no test images in $SKYRL_TEST_IMAGES: run make test-images" >&2; exit 3; }
python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' || { echo "bench: needs Python 3.9 or newer" >&2; exit 3; }
echo "bench: building our side (release; a few minutes the first time) ..." >&2
target=${CARGO_TARGET_DIR:-$(dirname "$PWD")/target}
cargo build -q --release -p skyrl-bench-driver
export SKYRL_BENCH_DRIVER=$target/release/skyrl-bench-driver
exec python3 -m harness "$@"
