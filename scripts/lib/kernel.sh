# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# The distribution's kernel: packages, source, and a prepared tree with Rust metadata to build the module against.
#
#   $CACHE/kernel/<package version>/image    unpacked image package (boot/vmlinuz-*, modules)
#                                  /headers  unpacked header package (.config, Module.symvers)
#                                  /source   kernel source
#                                  /tree-*   O= tree, keyed by the tools that made it

META_IMAGE=linux-image-cloud-amd64
META_HEADERS=linux-headers-cloud-amd64
META_SOURCE=linux-source

apt_root() { in_root apt-cache -o APT::Default-Release="$SUITE-backports" "$@"; }

# Prints the version of package $1 that backports offers now.
backports_version() {
    apt_root policy "$1" | awk '$1 == "Candidate:" { print $2 }'
}

# Prints the package of that version that the metapackage $1 depends on and whose name begins with $2.
depends_on() {
    apt_root depends --no-recommends --no-suggests "$1" |
        awk -v prefix="$2" '$1 == "Depends:" && index($2, prefix) == 1 { print $2; exit }'
}

# Sets what the rest of this file works with.
ask_kernel_version() {
    KERNEL_VERSION=$(backports_version $META_IMAGE)
    IMAGE_PACKAGE=$(depends_on "$META_IMAGE" linux-image-)
    HEADERS_PACKAGE=$(depends_on "$META_HEADERS" linux-headers-)
    SOURCE_PACKAGE=$(depends_on "$META_SOURCE" linux-source-)
    [ -n "$KERNEL_VERSION" ] && [ -n "$IMAGE_PACKAGE" ] && [ -n "$HEADERS_PACKAGE" ] && [ -n "$SOURCE_PACKAGE" ] ||
        die "apt offers no cloud kernel with headers and source in $SUITE-backports"
    RELEASE=${HEADERS_PACKAGE#linux-headers-}
    KERNEL=$CACHE/kernel/$KERNEL_VERSION
}

kernel_packages() {
    ask_kernel_version
    if [ ! -d "$KERNEL" ]; then
        step "kernel $RELEASE: packages and source" fetch_kernel
    fi
    TREE=$KERNEL/tree-$(tool_key)
    if [ ! -e "$TREE/.dtloop-ready" ]; then
        step "kernel $RELEASE: tree with Rust metadata" make_tree
    fi
    publish_kernel
}

fetch_kernel() {
    local part=$KERNEL.part
    local package images
    mapfile -t images < <(image_packages)
    rm -rf "$part"
    mkdir -p "$part/debs"
    # shellcheck disable=SC2016
    in_root bash -ec '
        cd "$1"; shift
        apt-get -o APT::Default-Release="$1" -o APT::Sandbox::User=root download "${@:2}"
    ' - "$part/debs" "$SUITE-backports" "${images[@]}" "$HEADERS_PACKAGE" "$SOURCE_PACKAGE"
    for package in "${images[@]}"; do
        dpkg-deb -x "$part/debs/$package"_*.deb "$part/image"
    done
    kernel_image "$part/image" "$RELEASE" >/dev/null
    dpkg-deb -x "$part"/debs/"$HEADERS_PACKAGE"_*.deb "$part/headers"
    dpkg-deb -x "$part"/debs/"$SOURCE_PACKAGE"_*.deb "$part/source-package"
    mkdir "$part/source"
    in_root tar -C "$part/source" --strip-components=1 -xf \
        "$part/source-package/usr/src/$SOURCE_PACKAGE.tar.xz"
    rm -rf "$part/debs" "$part/source-package"
    mv "$part" "$KERNEL"
}

# The image package, and those of the same release that it is split into.
image_packages() {
    echo "$IMAGE_PACKAGE"
    apt_root depends --no-recommends --no-suggests "$IMAGE_PACKAGE" |
        awk -v release="-$RELEASE" '$1 == "Depends:" && substr($2, length($2) - length(release) + 1) == release { print $2 }'
}

# kernel_image DIR RELEASE: prints where the unpacked package has the bootable image.
kernel_image() {
    local file
    for file in "$1/boot/vmlinuz-$2" "$1/usr/lib/modules/$2/vmlinuz" "$1/lib/modules/$2/vmlinuz"; do
        if [ -e "$file" ]; then
            echo "$file"
            return
        fi
    done
    die "no kernel image of $2 in $1"
}

header_dir() { echo "$KERNEL/headers/usr/src/linux-headers-$RELEASE"; }

# Names the compilers: what they made is of no use to others.
tool_key() { in_root sh -c 'rustc --version; bindgen --version; gcc --version; clang --version' | hash_stdin; }

make_tree() {
    rm -rf "$TREE"
    prepare_tree "$KERNEL/source" "$(header_dir)" "$TREE" "$RELEASE" in_root
    touch "$TREE/.dtloop-ready"
}

# prepare_tree SOURCE HEADERS TREE RELEASE [RUNNER]: makes the O= tree TREE; used for native builds too.
prepare_tree() {
    local source=$1 headers=$2 tree=$3 release=$4 runner=${5:-env}
    mkdir -p "$tree"
    cp "$headers/.config" "$tree/.config"
    "$runner" make -C "$source" O="$tree" KERNELRELEASE="$release" -j"$(nproc)" olddefconfig
    grep -q '^CONFIG_RUST=y' "$tree/.config" || die "CONFIG_RUST fell out of the configuration: tools missing?"
    "$runner" make -C "$source" O="$tree" KERNELRELEASE="$release" -j"$(nproc)" prepare modules_prepare
    cp "$headers/Module.symvers" "$tree/Module.symvers"
    check_tree_exports "$tree" "$headers/Module.symvers"
}

# Every Rust symbol that the prepared tree exports must be one of the distribution's kernel: otherwise modules
# built here would not load there, or worse, mean something else.
check_tree_exports() {
    local tree=$1 symvers=$2 ours missing
    ours=$(sed -n 's/^EXPORT_SYMBOL_RUST_GPL(\(.*\));$/\1/p' "$tree"/rust/exports_*_generated.h | sort -u)
    [ "$(wc -l <<<"$ours")" -gt 500 ] || die "too few exported Rust symbols in $tree/rust"
    missing=$(comm -23 <(echo "$ours") <(awk '{ print $2 }' "$symvers" | sort -u))
    [ -z "$missing" ] || die "Rust symbols of the prepared tree that the distribution's kernel lacks: $missing"
    echo "$(wc -l <<<"$ours") exported Rust symbols, all in the distribution's Module.symvers"
}

# Tells the other scripts what to use.
publish_kernel() {
    cat >"$CACHE/kernel/env.part" <<END
KERNEL=$KERNEL
KERNEL_VERSION=$KERNEL_VERSION
RELEASE=$RELEASE
TREE=$TREE
END
    mv "$CACHE/kernel/env.part" "$CACHE/kernel/env"
    echo "$RELEASE" >"$CACHE/kernel/current.part"
    mv "$CACHE/kernel/current.part" "$CACHE/kernel/current"
}
