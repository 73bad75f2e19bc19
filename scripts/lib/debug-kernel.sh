# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# The debug kernel, from the distribution's source: KASAN, lockdep, kmemleak, fault injection.
#
#   $CACHE/kernel/<package version>/debug-*/tree   O= tree; the module is built against it
#                                          /image  boot/vmlinuz-*, lib/modules, like an unpacked image package

DEBUG_CONFIG=$REPO/tests/guest/debug-kernel.config

debug_kernel() {
    DEBUG=$KERNEL/debug-$({ tool_key; cat "$DEBUG_CONFIG"; } | hash_stdin)
    DEBUG_RELEASE=${KERNEL_VERSION%%-*}-dtloop-debug
    if [ ! -e "$DEBUG/ready" ]; then
        take_lock debug-kernel
        [ -e "$DEBUG/ready" ] || step "debug kernel (6 to 25 minutes on two cores)" make_debug_kernel
    fi
    publish_debug_kernel
}

debug_make() {
    in_root nice -n 15 make -C "$KERNEL/source" O="$DEBUG/tree" LLVM=1 KERNELRELEASE="$DEBUG_RELEASE" -j"$(nproc)" "$@"
}

# An interrupted build goes on where it stopped.
make_debug_kernel() {
    mkdir -p "$DEBUG/tree" "$DEBUG/image/boot"
    if [ ! -e "$DEBUG/tree/.config" ]; then
        debug_make KCONFIG_ALLCONFIG="$DEBUG_CONFIG" allnoconfig
    fi
    check_debug_config
    debug_make bzImage modules
    debug_make INSTALL_MOD_PATH="$DEBUG/image" modules_install
    cp "$DEBUG/tree/arch/x86/boot/bzImage" "$DEBUG/image/boot/vmlinuz-$DEBUG_RELEASE"
    touch "$DEBUG/ready"
}

# Kconfig drops an option silently when something it depends on is missing.
check_debug_config() {
    local lost
    lost=$(comm -23 <(grep '^CONFIG_' "$DEBUG_CONFIG" | sort -u) <(sort -u "$DEBUG/tree/.config"))
    [ -z "$lost" ] && return
    rm "$DEBUG/tree/.config"
    die "options of debug-kernel.config that did not survive: $lost"
}

publish_debug_kernel() {
    cat >"$CACHE/kernel/debug-env.part" <<END
DEBUG=$DEBUG
DEBUG_TREE=$DEBUG/tree
DEBUG_RELEASE=$DEBUG_RELEASE
END
    mv "$CACHE/kernel/debug-env.part" "$CACHE/kernel/debug-env"
}
