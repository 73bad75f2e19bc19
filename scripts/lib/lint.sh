# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# Checks that need no kernel to run. Each is one test.

# It cannot see what files that are found at run time set, nor who uses what one file sets for another.
SHELLCHECK_EXCLUDE=SC1090,SC1091,SC2034,SC2153,SC2015,SC2016

lint_format_userspace() {
    in_root cargo fmt --manifest-path "$REPO/Cargo.toml" --all --check
    in_root cargo fmt --manifest-path "$REPO/tests/fuzz/Cargo.toml" --check
    in_root cargo fmt --manifest-path "$REPO/tests/simulation/Cargo.toml" --check
}

lint_format_module() {
    local files
    mapfile -t files < <(tracked 'kmod/*.rs')
    in_root rustfmt --check --edition 2021 "${files[@]}"
}

lint_clippy_userspace() {
    in_root cargo clippy --manifest-path "$REPO/Cargo.toml" --workspace --all-targets --locked -- -D warnings
    # With the feature that makes agent and target live in a simulated world.
    in_root cargo clippy --manifest-path "$REPO/tests/simulation/Cargo.toml" --locked -- -D warnings
    # `test = false` takes it out of all targets.
    in_root cargo clippy --manifest-path "$REPO/Cargo.toml" --package dtloop-tests --test vm --locked -- -D warnings
}

lint_clippy_module() { "$REPO/scripts/build" kmod; }

lint_shellcheck() {
    local files
    mapfile -t files < <(shell_scripts)
    in_root shellcheck --exclude="$SHELLCHECK_EXCLUDE" "${files[@]}"
}

# Every source file says under which licence it is, in its first five lines.
lint_licence() {
    local file missing=0
    while read -r file; do
        if ! head -n 5 "$REPO/$file" | grep -q 'SPDX-License-Identifier: GPL-2.0-only'; then
            echo "$file: no SPDX-License-Identifier: GPL-2.0-only"
            missing=1
        fi
    done < <(tracked '*.rs' '*.c' '*.h' '*.toml' '*.sh' '*Kbuild' 'scripts/*' '.ci/*' 'tests/guest/*')
    return $missing
}

# Nothing in the tree may depend on the machine it was written on.
lint_no_machine() {
    local hosts
    hosts=$(apt-get indextargets --format '$(SITE)' | sed 's#^[a-z+]*://##; s#/.*##; s#\.#\\.#g' | sort -u | sed '/^$/d' | paste -sd'|')
    ! git -C "$REPO" grep -nIE "$REPO/|$CACHE/${hosts:+|$hosts}" -- . ':!*Cargo.lock'
}

# The tests that the documents name for a guarantee or a fault exist. Names of four words and more are taken for tests; the
# module's design names some of the kernel's own.
lint_named_tests() {
    local missing
    missing=$(comm -23 \
        <(git -C "$REPO" grep -ohE '`[a-z0-9]+(_[a-z0-9]+){3,}`' -- '*.md' ':!kmod/*' | tr -d '`' | sort -u) \
        <(tracked '*.rs' | sed "s#^#$REPO/#" | xargs -r grep -ohE 'fn [a-z0-9_]+' | cut -d' ' -f2 | sort -u))
    if [ -n "$missing" ]; then
        printf 'Named in a document, but no test:\n%s\n' "$missing"
        return 1
    fi
}

tracked() { git -C "$REPO" ls-files --cached --others --exclude-standard -- "$@" | sort -u; }

shell_scripts() {
    local file
    tracked 'scripts/*' '.ci/*' '*.sh' | while read -r file; do
        if [[ $file == *.sh ]] || head -n 1 "$REPO/$file" | grep -qE '^#!.*\b(ba)?sh'; then
            echo "$file"
        fi
    done
}

LINTS=(format_userspace format_module clippy_userspace clippy_module shellcheck licence no_machine named_tests)
