#!/usr/bin/env bash
# Shows each engine at work on this machine: crates/sandbox/examples/demo.rs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

echo "demo: building (a few minutes the first time) ..." >&2
cargo build -q -p skyrl-sandbox --example demo
exec cargo run -q -p skyrl-sandbox --example demo
