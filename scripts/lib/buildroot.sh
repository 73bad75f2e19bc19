# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# The host's few packages, and the build root with all tools.

KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# Installs what the host itself needs.
host_packages() {
    local missing=() package
    for package in mmdebstrap debian-archive-keyring; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    step "host packages: ${missing[*]}" install_host_packages "${missing[@]}"
}

install_host_packages() {
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

# Prints the address of the mirror from which this machine takes Debian's main component.
debian_mirror() {
    local mirror
    mirror=$(debian_mirror_of_lists)
    if [ -z "$mirror" ]; then
        apt-get update >&2
        mirror=$(debian_mirror_of_lists)
    fi
    [ -n "$mirror" ] || die "apt on this machine knows no mirror of Debian main"
    echo "$mirror"
}

debian_mirror_of_lists() {
    # apt itself replaces these words.
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages' |
        awk -F'|' '$1 == "Debian" && $2 == "Debian" && $3 == "main" { print $4; exit }'
}

apt_sources() {
    local mirror=$1 suite
    for suite in "$SUITE" "$SUITE-updates" "$SUITE-backports"; do
        echo "deb [signed-by=$KEYRING] $mirror $suite main"
    done
}

# Makes a Debian tree: make_debian DIR|TARBALL PACKAGES... (more options in the array DEBIAN_OPTIONS).
make_debian() {
    local target=$1 mirror proxy options=("${DEBIAN_OPTIONS[@]:-}")
    shift
    mirror=$(debian_mirror)
    proxy=$(apt-config dump --format '%v' Acquire::http::Proxy)
    [ -z "$proxy" ] || options+=("--aptopt=Acquire::http::Proxy \"$proxy\"")
    [ -n "${options[0]:-}" ] || options=("${options[@]:1}")
    apt_sources "$mirror" |
        mmdebstrap --mode=root --variant=apt --include="$(tr ' ' , <<<"$*")" "${options[@]}" \
            "$SUITE" "$target" -
}

build_root() {
    if [ ! -d "$BUILD_ROOT" ]; then
        step "build root (Debian $SUITE with compilers and QEMU)" make_build_root
    fi
    refresh_lists
}

make_build_root() {
    local packages part=$BUILD_ROOT.part
    rm -rf --one-file-system "$part"
    mapfile -t packages < <(package_list "$REPO/scripts/lib/buildroot.packages")
    make_debian "$part" "${packages[@]}"
    mv "$part" "$BUILD_ROOT"
}

# Package lists of the build root, at most six hours old.
refresh_lists() {
    local stamp=$BUILD_ROOT/var/lib/dtloop-lists
    if [ -n "$(find "$stamp" -mmin -360 2>/dev/null)" ]; then
        return
    fi
    if (step "package lists" in_root apt-get update -o APT::Update::Error-Mode=any); then
        touch "$stamp"
    elif [ -e "$CACHE/kernel/current" ]; then
        warn "no new package lists; going on with the old ones"
    else
        die "no package lists"
    fi
}
