#!/usr/bin/env bash
# Runs every fuzz target for a while. A finding ends the run: its input is kept
# in fuzz/artifacts, and cargo-fuzz prints how to reproduce it.
#
# usage: fuzz.sh [SECONDS per target]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-60}
# The sanitizer's flags are unstable; this lets the pinned toolchain take them,
# so that no second toolchain is needed.
export RUSTC_BOOTSTRAP=1
mapfile -t targets < <(cargo fuzz list)
[ "${#targets[@]}" -gt 0 ] || { echo "fuzz: no targets in fuzz/" >&2; exit 1; }
for target in "${targets[@]}"; do
    echo "fuzz: $target for $seconds s" >&2
    # New inputs are kept in the corpus; the seeds stay as they are.
    mkdir -p "fuzz/corpus/$target" "fuzz/seeds/$target"
    cargo fuzz run "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1
done
echo "fuzz: ${#targets[@]} targets, no finding" >&2
