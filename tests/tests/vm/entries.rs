// SPDX-License-Identifier: GPL-2.0-only

//! `/etc/DT/dtloop_devices` on a real system: checked, attached and detached as a whole.

use anyhow::{Context, Result, ensure};
use dtloop_tests::{Disk, Output, Vm, patience};
use serde_json::Value;

const FILE: &str = "/etc/DT/dtloop_devices";

/// A machine with three disks and the module.
fn machine() -> Result<Vm> {
    let vm = Vm::builder("entries")
        .disk(Disk::new("one", 48))
        .disk(Disk::new("two", 32))
        .disk(Disk::new("three", 32))
        .start()?;
    vm.sh("modprobe dtloop; dtguest settle; udevadm settle; ls /dev/disk/by-id/virtio-one")?;
    Ok(vm)
}

/// Runs a command, which must end with this code; gives all it said.
fn expect(vm: &Vm, command: &str, code: i32) -> Result<String> {
    let output: Output = vm.try_sh_within(patience(60), command)?;
    ensure!(output.code == code, "{command}: not {code} but {output}");
    Ok(output.text() + "\n" + &output.complaint())
}

fn says(text: &str, words: &[&str]) -> Result<()> {
    ensure!(
        words.iter().all(|word| text.contains(word)),
        "no {words:?} in: {text}"
    );
    Ok(())
}

/// What each entry is attached to, by `dtloop config list`.
fn attached(vm: &Vm) -> Result<Vec<Option<String>>> {
    let list: Value = serde_json::from_str(&vm.sh("dtloop config list --json")?)?;
    let entries = list["entries"].as_array().context("no entries")?;
    Ok(entries
        .iter()
        .map(|entry| entry["attached_to"].as_str().map(str::to_owned))
        .collect())
}

fn some(paths: &[&str]) -> Vec<Option<String>> {
    paths.iter().map(|path| Some((*path).to_owned())).collect()
}

#[test]
fn entries_are_attached_and_detached_as_a_whole() -> Result<()> {
    let mut vm = machine()?;
    let two = vm.device("two")?;
    // A name that moves is written as it is given, and its name that stays is told.
    let said = expect(&vm, &format!("dtloop config add {two} -o set=second"), 0)?;
    says(&said, &["/dev/disk/by-id/virtio-two", "after a reboot"])?;
    expect(&vm, &format!("dtloop config remove {two}"), 0)?;
    expect(
        &vm,
        &format!("dtloop config add {two} --stable -o set=second"),
        0,
    )?;
    says(
        &vm.sh(format!("cat {FILE}"))?,
        &["/dev/disk/by-id/virtio-two\tauto\tset=second"],
    )?;
    expect(
        &vm,
        "dtloop config add ID=virtio-one 1 -o volume=vol,policy=throttle,throttle-start=60",
        0,
    )?;
    expect(&vm, "dtloop config check", 0)?;
    // The disk that is not there yet is written only when that is insisted on.
    says(
        &expect(&vm, "dtloop config add ID=virtio-late 7", 7)?,
        &["does not exist"],
    )?;
    expect(&vm, "dtloop config add ID=virtio-late 7 --force", 0)?;

    // What is there is attached at once, and the missing one told.
    let said = expect(&vm, "dtmount start", 9)?;
    says(
        &said,
        &[
            "attached to /dev/loop1",
            "attached to /dev/loop100",
            "virtio-late",
            "does not exist",
        ],
    )?;
    let mut now = some(&["/dev/loop100", "/dev/loop1"]);
    now.push(None);
    ensure!(attached(&vm)? == now, "{:?}", attached(&vm)?);
    let policy = vm.sh(
        "dtloop status --json | jq -r '.sets[] | select(.name == \"default\") | .kernel.policy'",
    )?;
    ensure!(policy == "throttle", "{policy}");
    says(
        &expect(&vm, "dtmount start", 9)?,
        &["is attached to /dev/loop1 already"],
    )?;

    // It comes while it is waited for.
    let waiting = vm.spawn("dtmount start --wait 60s")?;
    vm.plug(&Disk::new("late", 16))?;
    says(
        &waiting.finish(patience(60))?,
        &["ID=virtio-late attached to /dev/loop7"],
    )?;
    expect(&vm, "dtloop config check", 0)?;

    // A file system in use is not taken away, and the others are.
    vm.sh("mkfs.ext4 -q /dev/loop1; mount /dev/loop1 /mnt; mkfs.ext4 -q /dev/loop100; mkdir /m2; mount /dev/loop100 /m2")?;
    let user = vm.spawn("exec 3>/mnt/open; exec sleep 600")?;
    vm.wait_sh(patience(10), "[ -e /mnt/open ]")?;
    let said = expect(&vm, "dtmount stop", 9)?;
    says(
        &said,
        &[
            "/m2 unmounted",
            "/dev/loop100 detached",
            "/dev/loop7 detached",
            "/mnt was not unmounted",
            "sleep (",
        ],
    )?;
    user.kill(9)?;
    user.wait(patience(10))?;
    says(
        &expect(&vm, "dtloop detach --all", 9)?,
        &["mounted on /mnt"],
    )?;
    says(
        &expect(&vm, "dtmount stop", 0)?,
        &["/mnt unmounted", "/dev/loop1 detached"],
    )?;
    ensure!(
        attached(&vm)?.iter().all(Option::is_none),
        "{:?}",
        attached(&vm)?
    );

    // `auto` has the number that it had, and says so when somebody else has it by now.
    let three = vm.device("three")?;
    expect(
        &vm,
        &format!("dtloop attach {three} --loop 100 --set third --intent off"),
        0,
    )?;
    let said = expect(&vm, "dtloop attach --all", 0)?;
    says(
        &said,
        &["virtio-two attached to /dev/loop101; it had /dev/loop100 before"],
    )?;
    expect(
        &vm,
        "dtmount stop; dtloop detach 100 --discard-records; dtmount start",
        0,
    )?;
    says(
        &format!("{:?}", attached(&vm)?),
        &["/dev/loop101", "/dev/loop1\"", "/dev/loop7"],
    )?;
    expect(&vm, "dtmount stop", 0)?;
    Ok(())
}

#[test]
fn entries_that_would_do_harm_are_refused_with_the_line_to_change() -> Result<()> {
    let vm = machine()?;
    let [one, two] = [vm.device("one")?, vm.device("two")?];
    let refused = |command: &str, words: &[&str]| {
        let before = vm.sh(format!("cat {FILE} 2>/dev/null || true"))?;
        says(&expect(&vm, command, 7)?, words)?;
        let after = vm.sh(format!("cat {FILE} 2>/dev/null || true"))?;
        ensure!(before == after, "{command} changed {before} to {after}");
        anyhow::Ok(())
    };
    // In use, in each way.
    vm.sh(format!(
        "mkfs.ext4 -q -L data {one}; udevadm settle; mount {one} /mnt"
    ))?;
    refused("dtloop config add ID=virtio-one", &["mounted on /mnt"])?;
    vm.sh(format!("umount /mnt; mkswap -q {two}"))?;
    refused(
        "dtloop config add ID=virtio-two",
        &["swap signature", "option allow-signature"],
    )?;
    vm.sh(format!(
        "wipefs -qa {two}; export LVM_SUPPRESS_FD_WARNINGS=1; pvcreate -qq {two}"
    ))?;
    refused("dtloop config add ID=virtio-two", &["LVM physical volume"])?;
    vm.sh(format!(
        "pvremove -qq {two} 2>/dev/null; wipefs -qa {two}; udevadm settle"
    ))?;
    // By whatever name fstab has it.
    let fstab = |line: &str| vm.sh(format!("printf '# first\\n{line}\\n' >/etc/fstab"));
    for line in [
        format!("{one} /srv/data ext4 defaults 0 2"),
        "LABEL=data /srv/data ext4 defaults 0 2".to_owned(),
        "/dev/disk/by-id/virtio-one /srv/data ext4 defaults 0 2".to_owned(),
    ] {
        fstab(&line)?;
        refused(
            "dtloop config add ID=virtio-one 1",
            &["/etc/fstab line 2", "/srv/data", "put /dev/loop1 there"],
        )?;
    }
    fstab("/dev/loop1 /srv/data ext4 defaults 0 2")?;
    expect(&vm, "dtloop config add LABEL=data 1", 0)?;
    // The loop device carries the label too: the entry is about the disk all the same.
    expect(&vm, "dtmount start; udevadm settle; dtloop config check", 0)?;
    ensure!(
        attached(&vm)? == some(&["/dev/loop1"]),
        "{:?}",
        attached(&vm)?
    );
    fstab("LABEL=data /srv/data ext4 defaults 0 2")?;
    // Whatever udev takes it for now: while the machine starts, only the native device has it.
    says(
        &expect(&vm, "dtloop config check", 7)?,
        &["/etc/fstab line 2", "put /dev/loop1 there"],
    )?;
    fstab("/dev/loop1 /srv/data ext4 defaults 0 2")?;
    // Twice, and with another's number.
    refused(
        "dtloop config add ID=virtio-one 2",
        &["is in line 1 already"],
    )?;
    refused("dtloop config add ID=virtio-two 1", &["taken by line 1"])?;
    refused(
        "dtloop config add ID=virtio-two 2 -o offset=100",
        &["multiple"],
    )?;
    // The stock driver, which is there since a number of its own was taken, may be loaded again and again.
    vm.sh("modprobe loop; truncate -s 1M /root/image; losetup /dev/loop3 /root/image; losetup -f")?;
    refused(
        "dtloop config add ID=virtio-two 3",
        &["stock loop driver for /root/image"],
    )?;
    vm.sh("losetup -d /dev/loop3")?;
    // Bad lines keep nobody else from being attached, and are named with line and column.
    vm.sh(format!(
        "printf 'vdb\\n/dev/vdb 1 offst=1\\n' >>{FILE}; dtmount stop"
    ))
    .map(drop)
    .or_else(|_| expect(&vm, "dtmount status", 7).map(drop))?;
    let said = expect(&vm, "dtmount start", 9)?;
    says(
        &said,
        &[
            "dtloop_devices:2:1:",
            "dtloop_devices:3:12: the option \"offst\"",
            "LABEL=data",
        ],
    )?;
    says(
        &expect(&vm, "dtloop config check", 7)?,
        &["dtloop_devices:2:1:", "dtloop_devices:3:12:"],
    )?;
    Ok(())
}

#[test]
fn an_encrypted_entry_shows_plain_text_and_keeps_cipher_text() -> Result<()> {
    let vm = machine()?;
    let [one, two] = [vm.device("one")?, vm.device("two")?];
    vm.sh(
        "modprobe dm-crypt; mkdir -p /etc/DT/keys; head -c 64 /dev/urandom >/etc/DT/keys/one; chmod 400 /etc/DT/keys/one
         head -c 64 /dev/urandom >/etc/DT/keys/two; chmod 400 /etc/DT/keys/two",
    )?;
    vm.sh_within(
        patience(120),
        format!(
            "cryptsetup luksFormat --batch-mode --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {one} /etc/DT/keys/one"
        ),
    )?;
    expect(
        &vm,
        "dtloop config add ID=virtio-one 1 -o encryption=luks2,key=/etc/DT/keys/one",
        0,
    )?;
    expect(
        &vm,
        "dtloop config add ID=virtio-two 2 -o encryption=plain,cipher=aes-xts-plain64,keysize=512,key=/etc/DT/keys/two",
        0,
    )?;
    says(
        &expect(
            &vm,
            "dtloop config add ID=virtio-three 3 -o encryption=XOR",
            2,
        )?,
        &["losetup", "luks2", "aes-xts-plain64"],
    )?;
    expect(&vm, "dtmount start", 0)?;
    ensure!(
        attached(&vm)? == some(&["/dev/loop1", "/dev/loop2"]),
        "{:?}",
        attached(&vm)?
    );
    expect(&vm, "dtloop config check", 0)?;
    for (device, disk) in [("/dev/loop1", &one), ("/dev/loop2", &two)] {
        vm.sh(format!(
            "{{ yes plaintext-everywhere || true; }} | dd of={device} bs=1M count=4 iflag=fullblock oflag=direct conv=fsync status=none
             dd if={device} bs=1M count=4 iflag=direct status=none | grep -c plaintext-everywhere >/dev/null
             ! grep -c plaintext-everywhere {disk}"
        ))?;
    }
    // Nothing of the key where others see it.
    vm.sh("! dtloop status --json | grep -qi 'keys/'; ! ps -ef | grep -v grep | grep -q luks2")?;
    expect(&vm, "dtmount stop", 0)?;
    ensure!(vm.sh("ls /dev/mapper | grep dtloop || true")?.is_empty());
    // The same again; and a key that does not fit leaves nothing behind.
    expect(&vm, "dtmount start", 0)?;
    vm.sh(
        "dd if=/dev/loop1 bs=1M count=4 iflag=direct status=none | grep -c plaintext-everywhere >/dev/null",
    )?;
    expect(
        &vm,
        "dtmount stop; cp --no-preserve=mode /etc/DT/keys/two /etc/DT/keys/one; chmod 400 /etc/DT/keys/one",
        0,
    )?;
    says(
        &expect(&vm, "dtmount start", 9)?,
        &["virtio-one", "cryptsetup did not open it"],
    )?;
    ensure!(vm.sh("ls /dev/mapper | grep -c dtloop || true")? == "1");
    expect(&vm, "dtloop detach --all", 0)?;
    Ok(())
}
