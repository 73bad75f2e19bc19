# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# The test machines: a root image shared by all, and per kernel an initial RAM disk with the kernel modules, dtloop.ko,
# the programs, and dtguest as init.
#
#   $CACHE/guest/root-*.img                      root file system, read-only base of every machine's own overlay
#   $KERNEL/guest-*.cpio, $DEBUG/guest-*.cpio    the kernel's modules and what dtguest needs to run
#   $WORK/guest/<flavour>/                       vmlinuz, initrd: what the harness boots

GUEST_EXCLUDES=(/usr/share/doc/\* /usr/share/man/\* /usr/share/locale/\* /usr/share/info/\* /var/cache/apt/\*)

guest_image() {
    local key
    key=$({ echo "$SUITE"; package_list "$REPO/scripts/lib/guest.packages"; declare -f make_guest_image; } | hash_stdin)
    ROOT_IMAGE=$CACHE/guest/root-$key.img
    if [ ! -e "$ROOT_IMAGE" ]; then
        mkdir -p "$CACHE/guest"
        step "guest root image" make_guest_image
    fi
    echo "ROOT_IMAGE=$ROOT_IMAGE" >"$CACHE/guest/env"
}

make_guest_image() {
    local packages path dir=$ROOT_IMAGE.dir size_mib
    rm -rf --one-file-system "$dir" "$ROOT_IMAGE.part"
    mapfile -t packages < <(package_list "$REPO/scripts/lib/guest.packages")
    DEBIAN_OPTIONS=()
    for path in "${GUEST_EXCLUDES[@]}"; do
        DEBIAN_OPTIONS+=("--dpkgopt=path-exclude=$path")
    done
    make_debian "$dir" "${packages[@]}"
    rm -rf "$dir"/var/lib/apt/lists/* "$dir"/usr/share/locale/* "${dir:?}"/dev/*
    mkdir -p "$dir/usr/lib/modules" "$dir/etc/DT" "$dir/var/lib/dtloop"
    printf '127.0.0.1 localhost\n' >"$dir/etc/hosts"
    # Two GiB beside what is installed: state of agent and target, and what the stories leave.
    size_mib=$(($(du -sm "$dir" | cut -f1) * 11 / 10 + 2048))
    in_root mke2fs -q -t ext4 -L dtroot -d "$dir" "$ROOT_IMAGE.part" "${size_mib}M"
    rm -rf --one-file-system "$dir"
    mv "$ROOT_IMAGE.part" "$ROOT_IMAGE"
}

# guest_modules DIR RELEASE: makes DIR/guest-<key> (a tree with lib/modules/RELEASE) and its archive, from DIR/image.
guest_modules() {
    local dir=$1 release=$2 key
    key=$({ cat "$REPO/scripts/lib/guest.modules"; declare -f make_guest_modules; } | hash_stdin)
    GUEST_BASE=$dir/guest-$key
    [ -e "$GUEST_BASE.cpio" ] || step "guest modules of $release" make_guest_modules "$dir/image" "$release"
}

make_guest_modules() {
    local image=$1 release=$2 from to
    from=$(find "$image" -maxdepth 4 -type d -path "*/lib/modules/$release")
    [ -n "$from" ] || die "no modules of $release in $image"
    rm -rf "$GUEST_BASE"
    to=$GUEST_BASE/lib/modules/$release
    mkdir -p "$to"
    in_root depmod -b "${from%/lib/modules/*}" "$release"
    in_root "$REPO/scripts/lib/pick-modules" "${from%/lib/modules/*}" "$release" "$GUEST_BASE" \
        <"$REPO/scripts/lib/guest.modules"
    guest_libraries
    pack_cpio "$GUEST_BASE" "$GUEST_BASE.cpio"
}

# dtguest is dynamically linked, and runs before there is a root file system.
guest_libraries() {
    local dir
    for dir in lib64 usr/lib/x86_64-linux-gnu dev proc sys sysroot opt/dtloop/bin; do
        mkdir -p "$GUEST_BASE/$dir"
    done
    cp -L "$BUILD_ROOT/lib64/ld-linux-x86-64.so.2" "$GUEST_BASE/lib64/"
    cp -L "$BUILD_ROOT"/usr/lib/x86_64-linux-gnu/{libc.so.6,libgcc_s.so.1} "$GUEST_BASE/usr/lib/x86_64-linux-gnu/"
}

# pack_cpio DIR FILE
pack_cpio() {
    in_root sh -c 'cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0' - "$1" >"$2.part"
    mv "$2.part" "$2"
}

# guest_pack FLAVOUR: brings $WORK/guest/FLAVOUR up to date with the module and the programs just built.
guest_pack() {
    local flavour=$1 out=$WORK/guest/$1 base release vmlinuz
    . "$CACHE/kernel/env"
    base=$KERNEL release=$RELEASE
    if [ "$flavour" = debug ]; then
        . "$CACHE/kernel/debug-env"
        base=$DEBUG release=$DEBUG_RELEASE
    fi
    . "$CACHE/guest/env"
    mkdir -p "$out"
    guest_modules "$base" "$release"
    stage_overlay "$flavour" "$release"
    pack_cpio "$out/overlay" "$out/overlay.cpio"
    cat "$GUEST_BASE.cpio" "$out/overlay.cpio" >"$out/initrd.part"
    mv "$out/initrd.part" "$out/initrd"
    vmlinuz=$(kernel_image "$base/image" "$release")
    ln -sfn "$vmlinuz" "$out/vmlinuz"
    ln -sfn "$ROOT_IMAGE" "$out/root.img"
}

# Lays out what changes with every build: the module (if there is one yet), its dependencies, the programs.
stage_overlay() {
    local flavour=$1 release=$2 overlay=$WORK/guest/$1/overlay module=$WORK/kmod/$1/kmod/dtloop.ko
    local scratch=$WORK/guest/$1/depmod modules=lib/modules/$2 file
    rm -rf "$overlay" "$scratch"
    mkdir -p "$overlay/$modules/updates" "$overlay/opt/dtloop/bin" "$scratch/lib/modules"
    cp -al "$GUEST_BASE/$modules" "$scratch/$modules"
    if [ -e "$module" ]; then
        cp "$module" "$overlay/$modules/updates/"
        cp -r "$overlay/$modules/updates" "$scratch/$modules/"
    fi
    rm -f "$scratch/$modules"/modules.{dep,alias,symbols,softdep,devname}*
    in_root depmod -b "$scratch" "$release"
    cp "$scratch/$modules"/modules.* "$overlay/$modules/"
    for file in "$WORK"/target/release/*; do
        if [ -f "$file" ] && [ -x "$file" ] && [[ $file != *.so && $file != */dtsim ]]; then
            in_root strip -g -o "$overlay/opt/dtloop/bin/$(basename "$file")" "$file"
        fi
    done
    ln -s opt/dtloop/bin/dtguest "$overlay/init"
}
