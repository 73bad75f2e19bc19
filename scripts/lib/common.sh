# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# What all scripts share: places, messages, locks, and the way into the build root.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${DTLOOP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dtloop}
SUITE=trixie
mkdir -p "$CACHE"
CACHE=$(cd "$CACHE" && pwd)

# Work of one checkout stays apart from that of another one.
CHECKOUT_KEY=$(printf %s "$REPO" | sha256sum | cut -c1-12)
WORK=$CACHE/checkouts/$CHECKOUT_KEY

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Prints the short hash of what comes in on stdin.
hash_stdin() { sha256sum | cut -c1-12; }

# Lists the packages of one list file: comments and blank lines dropped.
package_list() { sed -e 's/#.*//' "$1" | tr -s ' \t\n' '\n' | sed '/^$/d'; }

need_root() {
    [ "$(id -u)" = 0 ] || die "$(basename "$0") needs root (it installs packages and enters a build root); try: sudo -E $0"
}

# Runs a command with its output in $LOG, and shows the step's name and duration.
step() {
    local name=$1 begin=$SECONDS status=0
    shift
    say "$name ..."
    # Not `if ! (...)`: that would switch off `set -e` inside.
    set +e
    (set -e; "$@") >>"$LOG" 2>&1
    status=$?
    set -e
    if [ "$status" != 0 ]; then
        printf '%s\n' "---- the last lines of $LOG:" >&2
        tail -n 30 "$LOG" >&2
        die "failed: $name (whole log: $LOG)"
    fi
    say "$name: $((SECONDS - begin)) s"
}

declare -A LOCK_FD

# Takes lock $1, until drop_lock or the end of the process; says so when it has to wait.
take_lock() {
    local fd
    exec {fd}>"$CACHE/$1.lock"
    LOCK_FD[$1]=$fd
    flock -n "$fd" && return
    say "waiting for another run that holds $CACHE/$1.lock"
    flock "$fd"
}

drop_lock() { flock -u "${LOCK_FD[$1]}"; }

build_root_key() { { echo "$SUITE"; package_list "$REPO/scripts/lib/buildroot.packages"; } | hash_stdin; }
BUILD_ROOT=$CACHE/buildroot-$(build_root_key)

# Runs a command inside the build root, in the same directory.
in_root() { "$REPO/scripts/in-root" "$@"; }

# Kernel release of the last setup, for example 7.3.4+deb13-cloud-amd64.
kernel_release() {
    [ -e "$CACHE/kernel/current" ] || die "no kernel prepared yet: run scripts/setup"
    cat "$CACHE/kernel/current"
}
