#!/usr/bin/env bash
# Every check that needs no test to run. All of them run even if one fails, so
# that one round shows everything.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

failed=()
check() { # NAME COMMAND..
    local name=$1 began=$SECONDS
    shift
    if "$@"; then
        echo "lint: $name passed ($((SECONDS - began)) s)" >&2
    else
        echo "lint: $name FAILED ($((SECONDS - began)) s): $*" >&2
        failed+=("$name")
    fi
}

longest=900
short_files() {
    local long
    long=$(git ls-files -co --exclude-standard -- '*.rs' '*.sh' '*.py' | while read -r file; do
        [ -f "$file" ] || continue
        lines=$(wc -l <"$file")
        if [ "$lines" -gt "$longest" ]; then echo "$file has $lines lines"; fi
    done)
    [ -z "$long" ] || { echo "$long (more than $longest: split it by what the parts know)"; false; }
}

dependencies() {
    local kinds=(bans licenses sources)
    if GIT_TERMINAL_PROMPT=0 timeout 15 git ls-remote -q https://github.com/rustsec/advisory-db HEAD >/dev/null 2>&1; then
        kinds+=(advisories)
    else
        echo "lint: the advisory database (github.com/rustsec/advisory-db) can't be reached: known vulnerabilities are NOT checked" >&2
    fi
    cargo deny --log-level error check "${kinds[@]}"
}

scripts() {
    local files
    mapfile -t files < <(git ls-files -co --exclude-standard -- '*.sh' .ci/run)
    shellcheck -x "${files[@]}"
}

check "format (cargo fmt)" cargo fmt --all --check
check "clippy" cargo clippy -q --workspace --all-targets -- -D warnings
check "documentation (cargo doc)" env RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc -q --workspace --no-deps --document-private-items
check "dependencies (cargo deny)" dependencies
check "unused dependencies (cargo machete)" cargo machete
check "scripts (shellcheck)" scripts
check "file length" short_files

[ "${#failed[@]}" -eq 0 ] || { echo "lint: failed: ${failed[*]}" >&2; exit 1; }
