# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# Builds dtloop.ko. The output goes to $WORK/kmod/<flavour>, never into the checkout.

# Against the distribution's kernel.
build_module_stock() {
    . "$CACHE/kernel/env"
    make_module stock in_root "$KERNEL/source" "$TREE" "$RELEASE"
}

# Against the debug kernel: clang throughout, as its KASAN with Rust wants it.
build_module_debug() {
    [ -e "$CACHE/kernel/debug-env" ] || die "no debug kernel yet: run scripts/setup debug"
    . "$CACHE/kernel/env"
    . "$CACHE/kernel/debug-env"
    make_module debug in_root "$KERNEL/source" "$DEBUG_TREE" "$DEBUG_RELEASE" LLVM=1
}

# Against the kernel that runs on this very machine (headers and linux-source installed), without a build root.
build_module_native() {
    local release source headers tree
    release=$(uname -r)
    headers=/usr/src/linux-headers-$release
    [ -e "$headers/Module.symvers" ] || die "install linux-headers-$release first"
    source=$(native_source "$release")
    tree=$CACHE/kernel/native-$release
    if [ ! -e "$tree/.dtloop-ready" ]; then
        rm -rf "$tree"
        step "tree with Rust metadata for $release" prepare_tree "$source" "$headers" "$tree" "$release"
        touch "$tree/.dtloop-ready"
    fi
    make_module native env "$source" "$tree" "$release"
}

# Unpacks the installed linux-source package that belongs to release $1, and prints where.
native_source() {
    local series archive source
    series=$(grep -oE '^[0-9]+\.[0-9]+' <<<"$1")
    archive=/usr/src/linux-source-$series.tar.xz
    [ -e "$archive" ] || die "install linux-source-$series first"
    source=$CACHE/kernel/native-source-$1
    if [ ! -d "$source" ]; then
        rm -rf "$source.part"
        mkdir -p "$source.part"
        tar -C "$source.part" --strip-components=1 -xf "$archive"
        mv "$source.part" "$source"
    fi
    echo "$source"
}

# make_module FLAVOUR RUNNER SOURCE TREE RELEASE [make variables]
make_module() {
    local flavour=$1 runner=$2 source=$3 tree=$4 release=$5 out=$WORK/kmod/$1
    shift 5
    [ -e "$REPO/Kbuild" ] || die "no Kbuild in $REPO yet"
    mkdir -p "$out"
    lock_output "$out"
    say "dtloop.ko ($flavour, $release)"
    "$runner" make --no-print-directory -C "$source" O="$tree" KERNELRELEASE="$release" M="$REPO" MO="$out" \
        CLIPPY=1 KRUSTFLAGS=-Dwarnings KCFLAGS=-Werror -j"$(nproc)" "$@" modules
    "$runner" bash "$REPO/scripts/lib/check-symbols" "$out/kmod/dtloop.ko" "$tree/Module.symvers"
    # Debug assertions are there to panic.
    [ "$flavour" = debug ] || "$runner" bash "$REPO/scripts/lib/check-panics" "$out/kmod/dtloop.ko"
    say "built $out/kmod/dtloop.ko"
}

lock_output() {
    local fd
    exec {fd}>"$1.lock"
    flock "$fd"
}
