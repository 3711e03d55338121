#!/usr/bin/env bash
# Shows each engine at work on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

echo "demo: building (a few minutes the first time) ..." >&2
cargo build -q -p skyrl
exec cargo run -q -p skyrl -- sandbox demo
