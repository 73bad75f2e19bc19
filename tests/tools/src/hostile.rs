// SPDX-License-Identifier: GPL-2.0-only

//! Asks the module for what it must refuse: the calls are made as a program would that is broken, or means no good.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use dtloop_abi::{CONTROL_PATH, Control, raw, stream_path};
use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::libc;

use crate::intent_file;

/// Largest argument of any ioctl of the module in bytes, and more.
const ARGUMENT_BYTES: usize = 4096;

/// An ioctl argument as plain bytes.
type Argument = [u8; ARGUMENT_BYTES];

/// Every number that the module knows.
const NUMBERS: [u32; 19] = [
    raw::IOC_GET_FEATURES,
    raw::IOC_STREAM_CREATE,
    raw::IOC_STREAM_DESTROY,
    raw::IOC_STREAM_SET,
    raw::IOC_STREAM_STATUS,
    raw::IOC_ATTACH,
    raw::IOC_DETACH,
    raw::IOC_RESIZE,
    raw::IOC_DEVICE_STATUS,
    raw::IOC_SYNC,
    raw::IOC_DIRTY_NEXT,
    raw::IOC_DIRTY_SET,
    raw::IOC_KICK,
    raw::IOC_STREAM_INTENT,
    raw::IOC_INTENT_STATUS,
    raw::IOC_INTENT_CLEAR,
    raw::IOC_SUSPECT_NEXT,
    raw::IOC_SUSPECT_CLEAR,
    raw::IOC_SUSPECT_SET,
];

fn call(file: BorrowedFd<'_>, number: u32, argument: &mut Argument) -> Errno {
    // SAFETY: The argument is larger than any that a file of this system reads or writes for a number of the module:
    // their sizes, which are part of the number, are below 4096.
    errno(unsafe { libc::ioctl(file.as_raw_fd(), number.into(), argument.as_mut_ptr()) })
}

/// With an address where nothing is.
fn call_nowhere(file: BorrowedFd<'_>, number: u32, address: usize) -> Errno {
    // SAFETY: The kernel checks the address before it uses it; the callers give addresses that are not mapped (the first
    // page, the kernel's half), so nothing of this program is read or written.
    errno(unsafe { libc::ioctl(file.as_raw_fd(), number.into(), address) })
}

fn errno(result: libc::c_int) -> Errno {
    Errno::result(result).map_or_else(|errno| errno, |_| Errno::from_raw(0))
}

fn set(argument: &mut Argument, at: usize, bytes: &[u8]) {
    argument[at..at + bytes.len()].copy_from_slice(bytes);
}

fn expect(what: &str, got: Errno, wanted: &[Errno]) -> Result<()> {
    ensure!(
        wanted.contains(&got),
        "{what}: {got:?}, not one of {wanted:?}"
    );
    Ok(())
}

macro_rules! at {
    ($type:ident . $field:ident) => {
        std::mem::offset_of!(raw::$type, $field)
    };
}

/// Runs everything against a set without devices, and a block device that is not attached.
pub fn run(set: &str, device: &Path) -> Result<()> {
    let control = Control::open()?;
    let stream = control.stream_by_name(set)?.context("no such set")?;
    let id = stream.stream_id;
    let file = open(Path::new(CONTROL_PATH), 0)?;
    garbage(file.as_fd(), "control")?;
    streams(file.as_fd(), id)?;
    attaching(file.as_fd(), id, device)?;
    consumer(&control, id)?;
    released(&control, id)?;
    intents(&control, file.as_fd(), id)?;
    ensure!(control.stream_by_name(set)?.is_some(), "the set is gone");
    ensure!(control.devices().next().is_none(), "something got attached");
    Ok(())
}

fn open(path: &Path, flags: i32) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(flags);
    options
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Numbers with other sizes and directions, unknown ones, and addresses where nothing is.
fn garbage(file: BorrowedFd<'_>, what: &str) -> Result<()> {
    for number in NUMBERS {
        for wrong in [
            number ^ (1 << 16),
            number ^ (1 << 30),
            number ^ 0x40,
            number | 0x80,
            number ^ (1 << 8),
        ] {
            if !NUMBERS.contains(&wrong) {
                let got = call(file, wrong, &mut [0; ARGUMENT_BYTES]);
                expect(&format!("{what}: ioctl {wrong:#x}"), got, &[Errno::ENOTTY])?;
            }
        }
        for address in [0, 8, usize::MAX - 4095, usize::MAX / 2 + 1] {
            if number != raw::IOC_KICK {
                let got = call_nowhere(file, number, address);
                expect(
                    &format!("{what}: ioctl {number:#x} at {address:#x}"),
                    got,
                    &[Errno::EFAULT, Errno::ENOTTY],
                )?;
            }
        }
        // Nothing but ones: no number, size or reserved field of it is legal.
        let got = call(file, number, &mut [0xff; ARGUMENT_BYTES]);
        // These look at no argument.
        let of_stream = [raw::IOC_STREAM_STATUS, raw::IOC_INTENT_STATUS].contains(&number);
        let legal = number == raw::IOC_KICK || (what == "stream" && of_stream);
        let refused = got != Errno::EFAULT && got != Errno::from_raw(0);
        ensure!(
            refused || legal,
            "{what}: ioctl {number:#x} with ones: {got:?}"
        );
    }
    Ok(())
}

fn streams(file: BorrowedFd<'_>, id: u32) -> Result<()> {
    let create = |name: &[u8], payload: u64, descs: u32, policy: u32, reserved: u64| {
        let mut argument = [0; ARGUMENT_BYTES];
        set(&mut argument, at!(StreamCreate.name), name);
        set(
            &mut argument,
            at!(StreamCreate.payload_bytes),
            &payload.to_le_bytes(),
        );
        set(
            &mut argument,
            at!(StreamCreate.desc_count),
            &descs.to_le_bytes(),
        );
        set(
            &mut argument,
            at!(StreamCreate.policy),
            &policy.to_le_bytes(),
        );
        set(
            &mut argument,
            at!(StreamCreate.reserved),
            &reserved.to_le_bytes(),
        );
        call(file, raw::IOC_STREAM_CREATE, &mut argument)
    };
    let invalid = &[Errno::EINVAL];
    for name in [
        &b""[..],
        b"a/b",
        b"../x",
        b"a b",
        b"\xff",
        &[b'x'; raw::NAME_BYTES],
        b"a\0b",
    ] {
        expect(&format!("name {name:?}"), create(name, 0, 0, 0, 0), invalid)?;
    }
    for payload in [
        1,
        4096,
        raw::RING_BYTES_MIN - 1,
        raw::RING_BYTES_MIN / 2,
        raw::RING_BYTES_MIN * 3,
        raw::RING_BYTES_MAX * 2,
        u64::MAX,
    ] {
        expect(
            &format!("ring of {payload}"),
            create(b"n", payload, 0, 0, 0),
            invalid,
        )?;
    }
    for descs in [1, 255, 128, 257, 1 << 21, u32::MAX] {
        expect(
            &format!("{descs} descriptors"),
            create(b"n", 0, descs, 0, 0),
            invalid,
        )?;
    }
    expect("policy", create(b"n", 0, 0, 9, 0), invalid)?;
    expect("reserved field", create(b"n", 0, 0, 0, 1), invalid)?;
    let mut argument = [0; ARGUMENT_BYTES];
    set(
        &mut argument,
        at!(StreamDestroy.stream_id),
        &77u32.to_le_bytes(),
    );
    expect(
        "destroy what is not",
        call(file, raw::IOC_STREAM_DESTROY, &mut argument),
        &[Errno::ENOENT],
    )?;
    set(
        &mut argument,
        at!(StreamDestroy.stream_id),
        &id.to_le_bytes(),
    );
    set(
        &mut argument,
        at!(StreamDestroy.flags),
        &0x8000_0000u32.to_le_bytes(),
    );
    expect(
        "destroy with an unknown flag",
        call(file, raw::IOC_STREAM_DESTROY, &mut argument),
        invalid,
    )?;
    let mut argument = [0; ARGUMENT_BYTES];
    set(&mut argument, at!(StreamSet.stream_id), &id.to_le_bytes());
    set(&mut argument, at!(StreamSet.policy), &7u32.to_le_bytes());
    expect(
        "unknown policy",
        call(file, raw::IOC_STREAM_SET, &mut argument),
        invalid,
    )
}

fn attaching(file: BorrowedFd<'_>, id: u32, device: &Path) -> Result<()> {
    let attach = |fd: i32, flags: u32, number: i32, stream: u32, change: &dyn Fn(&mut Argument)| {
        let mut argument = [0; ARGUMENT_BYTES];
        set(&mut argument, at!(Attach.backing_fd), &fd.to_le_bytes());
        set(&mut argument, at!(Attach.flags), &flags.to_le_bytes());
        set(&mut argument, at!(Attach.number), &number.to_le_bytes());
        set(&mut argument, at!(Attach.stream_id), &stream.to_le_bytes());
        change(&mut argument);
        call(file, raw::IOC_ATTACH, &mut argument)
    };
    let backing = File::open(device)?;
    let fd = backing.as_raw_fd();
    let no_change: &dyn Fn(&mut Argument) = &|_| ();
    let by_fd = raw::ATTACH_FD;
    expect(
        "attach descriptor -1",
        attach(-1, by_fd, -1, id, no_change),
        &[Errno::EBADF],
    )?;
    expect(
        "attach descriptor 9999",
        attach(9999, by_fd, -1, id, no_change),
        &[Errno::EBADF],
    )?;
    let null = File::open("/dev/null")?;
    expect(
        "attach a character device",
        attach(null.as_raw_fd(), by_fd, -1, id, no_change),
        &[Errno::ENOTBLK],
    )?;
    expect(
        "attach an unknown flag",
        attach(fd, by_fd | (1 << 31), -1, id, no_change),
        &[Errno::EINVAL],
    )?;
    expect(
        "attach to number -2",
        attach(fd, by_fd, -2, id, no_change),
        &[Errno::EINVAL],
    )?;
    expect(
        "attach to a huge number",
        attach(fd, by_fd, i32::MAX, id, no_change),
        &[Errno::EINVAL],
    )?;
    expect(
        "attach to no stream",
        attach(fd, by_fd, -1, 99, no_change),
        &[Errno::ENOENT],
    )?;
    expect(
        "attach no device",
        attach(0, 0, -1, id, no_change),
        &[Errno::ENXIO, Errno::ENODEV],
    )?;
    let offset = |bytes: u64| {
        move |argument: &mut Argument| set(argument, at!(Attach.offset_bytes), &bytes.to_le_bytes())
    };
    let limit = |bytes: u64| {
        move |argument: &mut Argument| set(argument, at!(Attach.limit_bytes), &bytes.to_le_bytes())
    };
    expect(
        "attach at an odd offset",
        attach(fd, by_fd, -1, id, &offset(1)),
        &[Errno::EINVAL],
    )?;
    expect(
        "attach at the end of all",
        attach(fd, by_fd, -1, id, &offset(u64::MAX - 511)),
        &[Errno::ERANGE],
    )?;
    expect(
        "attach an odd length",
        attach(fd, by_fd, -1, id, &limit(513)),
        &[Errno::EINVAL],
    )?;
    expect(
        "attach all there is",
        attach(fd, by_fd, -1, id, &limit(u64::MAX - 511)),
        &[Errno::ERANGE],
    )?;
    let label = |argument: &mut Argument| set(argument, at!(Attach.label), b"../etc");
    expect(
        "attach with a path for a label",
        attach(fd, by_fd, -1, id, &label),
        &[Errno::EINVAL],
    )?;
    let reserved = |argument: &mut Argument| set(argument, at!(Attach.reserved), &[1]);
    expect(
        "attach with a reserved field",
        attach(fd, by_fd, -1, id, &reserved),
        &[Errno::EINVAL],
    )?;
    for number in [raw::IOC_DETACH, raw::IOC_RESIZE] {
        for device in [-1i32, 0, 4000, i32::MAX] {
            let mut argument = [0; ARGUMENT_BYTES];
            set(&mut argument, 0, &device.to_le_bytes());
            expect(
                &format!("ioctl {number:#x} of loop{device}"),
                call(file, number, &mut argument),
                &[Errno::ENXIO],
            )?;
        }
    }
    Ok(())
}

/// One consumer at a time, and what it asks for.
fn consumer(control: &Control, id: u32) -> Result<()> {
    let path = stream_path(id);
    let mut file = open(&path, libc::O_NONBLOCK)?;
    let second = File::options().read(true).write(true).open(&path).map(drop);
    let busy = second
        .as_ref()
        .is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY));
    ensure!(busy, "a second consumer: {second:?}");
    garbage(file.as_fd(), "stream")?;
    for number in [
        raw::IOC_SYNC,
        raw::IOC_DIRTY_NEXT,
        raw::IOC_DIRTY_SET,
        raw::IOC_SUSPECT_NEXT,
        raw::IOC_SUSPECT_CLEAR,
        raw::IOC_SUSPECT_SET,
    ] {
        for device in [0u32, 1, 5000, u32::MAX] {
            let mut argument = [0; ARGUMENT_BYTES];
            set(&mut argument, 0, &device.to_le_bytes());
            let got = call(file.as_fd(), number, &mut argument);
            expect(
                &format!("ioctl {number:#x} of device {device}"),
                got,
                &[Errno::ENXIO],
            )?;
        }
    }
    let destroy = control.destroy_stream(id, true);
    ensure!(
        destroy.is_err_and(|error| error.is(Errno::EBUSY)),
        "destroyed although a consumer has it open"
    );
    let empty = file.read(&mut [0; 100]).map_err(|error| error.kind());
    ensure!(
        empty == Err(ErrorKind::WouldBlock),
        "read of nothing: {empty:?}"
    );
    mappings(control, id, &file)
}

fn mappings(control: &Control, id: u32, file: &File) -> Result<()> {
    let status = control.stream_from(id)?.context("no stream")?;
    let ring = usize::try_from(status.ring_bytes)?;
    let mut options = MmapOptions::new();
    for (offset, length) in [
        (raw::MMAP_CONSUMER, raw::PAGE_BYTES * 2),
        (raw::MMAP_RING, ring + raw::PAGE_BYTES),
        (raw::MMAP_RING, raw::PAGE_BYTES),
        (raw::MMAP_RING + 4096, ring - 4096),
        (1 << 40, raw::PAGE_BYTES),
    ] {
        let mapped = options.offset(offset).len(length).map_raw_read_only(file);
        ensure!(mapped.is_err(), "{length} bytes are mapped at {offset:#x}");
    }
    let writable = options.offset(raw::MMAP_RING).len(ring).map_raw(file);
    ensure!(writable.is_err(), "the ring can be mapped for writing");
    Ok(())
}

/// Releases that lie: the stream takes nothing from such a consumer, and is as new with the next one.
fn released(control: &Control, id: u32) -> Result<()> {
    let status = || -> Result<raw::StreamStatus> { control.stream_from(id)?.context("no stream") };
    let before = status()?;
    for lie in [
        before.committed + 1,
        u64::MAX,
        0,
        before.released.wrapping_sub(1),
        before.released + (1 << 40),
    ] {
        if lie == before.released {
            continue;
        }
        let file = open(&stream_path(id), 0)?;
        let page = MmapOptions::new()
            .offset(raw::MMAP_CONSUMER)
            .len(raw::PAGE_BYTES)
            .map_raw(&file)?;
        store(
            &page,
            std::mem::offset_of!(raw::ConsumerPage, released),
            lie,
        );
        let got = call(file.as_fd(), raw::IOC_KICK, &mut [0; ARGUMENT_BYTES]);
        expect(
            &format!("kick after {lie} was released"),
            got,
            &[Errno::EBADMSG],
        )?;
        let now = status()?;
        ensure!(
            now.has(raw::STREAM_BAD_CONSUMER) && now.bad_releases > before.bad_releases,
            "{lie} was believed"
        );
        ensure!(
            now.released == before.released,
            "{lie} moved what is released to {}",
            now.released
        );
        // The truth comes too late.
        store(
            &page,
            std::mem::offset_of!(raw::ConsumerPage, released),
            before.released,
        );
        let got = call(file.as_fd(), raw::IOC_KICK, &mut [0; ARGUMENT_BYTES]);
        expect("kick after the truth", got, &[Errno::EBADMSG])?;
        drop((page, file));
        let after = status()?;
        ensure!(
            !after.has(raw::STREAM_BAD_CONSUMER) && !after.has(raw::STREAM_CONSUMER),
            "{lie} is not forgotten"
        );
    }
    let file = open(&stream_path(id), 0)?;
    let good = call(file.as_fd(), raw::IOC_KICK, &mut [0; ARGUMENT_BYTES]);
    if good != Errno::from_raw(0) {
        bail!("the successor is refused: {good:?}");
    }
    Ok(())
}

/// Files that no intent map can be kept in, and what happens to one that has one.
fn intents(control: &Control, file: BorrowedFd<'_>, id: u32) -> Result<()> {
    const BYTES: usize = 256 << 10;
    let ask = |intent: &File, stream: u32, change: &dyn Fn(&mut Argument)| {
        let mut argument = [0; ARGUMENT_BYTES];
        set(
            &mut argument,
            at!(StreamIntent.stream_id),
            &stream.to_le_bytes(),
        );
        let fd = intent.as_raw_fd().to_le_bytes();
        set(&mut argument, at!(StreamIntent.fd), &fd);
        change(&mut argument);
        call(file, raw::IOC_STREAM_INTENT, &mut argument)
    };
    let as_is: &dyn Fn(&mut Argument) = &|_| ();
    let good = intent_file::make("hostile-intent", BYTES)?;
    let read_only = File::open(Path::new(intent_file::DIR).join("hostile-intent"))?;
    let null = open(Path::new("/dev/null"), 0)?;
    let directory = File::open(intent_file::DIR)?;
    let small = intent_file::make("hostile-small", 4096)?;
    let odd = intent_file::make("hostile-odd", BYTES + 512)?;
    let hole = intent_file::make("hostile-hole", 4096)?;
    hole.set_len(BYTES as u64)?;
    let in_memory = nix::sys::memfd::memfd_create(c"hostile", nix::sys::memfd::MFdFlags::empty())?;
    let in_memory = File::from(in_memory);
    in_memory.set_len(BYTES as u64)?;
    for (what, intent, wanted) in [
        ("a file that is read only", &read_only, Errno::EBADF),
        ("a character device", &null, Errno::EBADF),
        ("a directory", &directory, Errno::EBADF),
        ("a file too small", &small, Errno::EINVAL),
        ("a file of odd length", &odd, Errno::EINVAL),
        ("a file with a hole", &hole, Errno::EOPNOTSUPP),
        ("a file in memory", &in_memory, Errno::EOPNOTSUPP),
    ] {
        expect(what, ask(intent, id, as_is), &[wanted])?;
    }
    expect("no such stream", ask(&good, 77, as_is), &[Errno::ENOENT])?;
    for (what, at, value) in [
        ("an unknown flag", at!(StreamIntent.flags), 1_u32 << 31),
        (
            "a region that is no power of two",
            at!(StreamIntent.region_bytes),
            65537,
        ),
        (
            "a region too small",
            at!(StreamIntent.region_bytes),
            raw::REGION_BYTES_MIN / 2,
        ),
        (
            "a region too large",
            at!(StreamIntent.region_bytes),
            raw::REGION_BYTES_MAX * 2,
        ),
        ("a reserved field", at!(StreamIntent.reserved), 1),
    ] {
        let change = |argument: &mut Argument| set(argument, at, &value.to_le_bytes());
        expect(what, ask(&good, id, &change), &[Errno::EINVAL])?;
    }
    expect("a good file", ask(&good, id, as_is), &[Errno::from_raw(0)])?;
    expect("a second file", ask(&small, id, as_is), &[Errno::EBUSY])?;
    // Nobody else writes or moves what the kernel writes by itself.
    let path = Path::new(intent_file::DIR).join("hostile-intent");
    for (what, done) in [
        ("written", (&good).write_all(b"x")),
        ("cut", good.set_len(0)),
        ("removed", std::fs::remove_file(&path)),
        (
            "moved",
            std::fs::rename(&path, path.with_extension("moved")),
        ),
    ] {
        ensure!(done.is_err(), "the intent file can be {what}");
    }
    let stream = open(&stream_path(id), 0)?;
    let committed = control.stream_from(id)?.context("no stream")?.committed;
    let mut argument = [0; ARGUMENT_BYTES];
    let at = at!(IntentClear.acked);
    set(&mut argument, at, &(committed + 1).to_le_bytes());
    expect(
        "clearing by what was never sent",
        call(stream.as_fd(), raw::IOC_INTENT_CLEAR, &mut argument),
        &[Errno::EINVAL],
    )
}

fn store(page: &MmapRaw, offset: usize, value: u64) {
    assert!(offset + 8 <= page.len() && offset % 8 == 0);
    // SAFETY: The word lies inside of the mapping, which is writable and lives as long as it is borrowed; it is aligned,
    // as mappings are, and accessed atomically by both sides.
    unsafe { AtomicU64::from_ptr(page.as_mut_ptr().wrapping_add(offset).cast()) }
        .store(value, Ordering::Release);
}
