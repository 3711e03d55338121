#!/usr/bin/env bash
# Undoes what setup.sh changed on this machine outside the repository, newest
# change first. Packages are only removed with REMOVE_PACKAGES=1, because by
# now something else may rely on them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

changes=.tools/changes
say() { echo "teardown: $*" >&2; }
[ -s "$changes" ] || { say "setup changed nothing on this machine"; exit 0; }

root=()
if [ "$(id -u)" -ne 0 ]; then root=(sudo -n); fi
left=()
while read -r kind what detail; do
    case $kind in
    cgroup)
        if mountpoint -q "$what"; then
            # Empty groups that containers left would keep the mount busy.
            "${root[@]}" find "$what" -mindepth 1 -depth -type d -exec rmdir {} + 2>/dev/null || true
            if ! "${root[@]}" umount "$what"; then
                say "$what is still in use: end the sandboxes on it and try again"
                left+=("$kind $what $detail")
                continue
            fi
            "${root[@]}" rmdir "$what" 2>/dev/null || true
            say "unmounted $what"
        fi
        ;;
    mode)
        "${root[@]}" chmod "$detail" "$what"
        say "$what has mode $detail again"
        ;;
    packages)
        read -r -a names <<<"$what $detail"
        if [ "${REMOVE_PACKAGES:-0}" = 1 ]; then
            "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get remove -y -q --autoremove "${names[@]}"
        else
            say "setup installed ${names[*]}; make teardown REMOVE_PACKAGES=1 removes them"
            left+=("$kind $what $detail")
        fi
        ;;
    esac
done < <(tac "$changes")

rm -f "$changes"
for ((n = ${#left[@]} - 1; n >= 0; n--)); do echo "${left[n]}" >>"$changes"; done
