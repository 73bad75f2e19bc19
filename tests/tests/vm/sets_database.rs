// SPDX-License-Identifier: GPL-2.0-only

//! PostgreSQL with its log of writes (WAL) on a second device of the set: whatever is cut, it starts on the two copies, with
//! all that was committed up to a point, and nothing broken.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dtloop_tests::{Disk, Job, Link, Vm, full_run, note, patience, wait_until};

use crate::replication_rig::{DEV, IMAGE, Rig};
use crate::sets_order::{attach, same_log, volumes, wait_in_sync};

const MIB: u64 = 160;
const WAL_MIB: u64 = 96;

/// Small, but as careful with data as any other server.
const CONFIG: &str = "
listen_addresses = ''
unix_socket_directories = '/tmp'
max_connections = 20
shared_buffers = 32MB
dynamic_shared_memory_type = mmap
min_wal_size = 16MB
max_wal_size = 32MB
checkpoint_timeout = 30s
";

/// Runs commands of the database as its user.
const AS_POSTGRES: &str =
    r#"cd /; bin=$(echo /usr/lib/postgresql/*/bin); pg() { runuser -u postgres -- "$bin/$@"; };"#;

/// Client that commits one row after the other, and notes each that is committed.
const LEDGER: &str = r#"for id in $(seq 1 1000000); do
    echo "INSERT INTO ledger VALUES ($id, repeat(md5('$id'), 8));"; echo "\echo $id"
done | runuser -u postgres -- $bin/psql -h /tmp -q -v ON_ERROR_STOP=1 bench >/tmp/committed"#;

fn postgres(vm: &Vm, script: &str) -> Result<String> {
    vm.sh_within(patience(120), format!("{AS_POSTGRES} {script}"))
}

fn sql(vm: &Vm, query: &str) -> Result<String> {
    postgres(vm, &format!("pg psql -h /tmp -At -c '{query}' bench"))
}

/// Starts the database on what is mounted.
fn start(vm: &Vm) -> Result<()> {
    postgres(
        vm,
        "pg pg_ctl -D /mnt/data/pg -l /tmp/start.log -t 120 -w start >/dev/null",
    )
    .map(drop)
}

fn stop(vm: &Vm) -> Result<()> {
    postgres(
        vm,
        "pg pg_ctl -D /mnt/data/pg -t 120 -m fast -w stop >/dev/null",
    )
    .map(drop)
}

fn machines() -> Result<Rig> {
    let link = Link::new("source", "target")?;
    let [source, target] = Vm::start_all([
        Vm::builder("source")
            .link(&link)
            .disk(Disk::new("disk", MIB))
            .disk(Disk::new("log", WAL_MIB)),
        Vm::builder("target").link(&link),
    ])?;
    let rig = Rig::with(source, Some(target), MIB)?;
    rig.configure_target(&volumes(MIB, WAL_MIB))?;
    for vm in [rig.source(), rig.target()] {
        vm.sh("mkdir -p /mnt/data /mnt/wal")?;
    }
    Ok(rig)
}

/// A database whose data is on the one device and whose WAL is on the other.
fn make_database(rig: &Rig) -> Result<()> {
    let vm = rig.source();
    vm.sh(format!(
        "mkfs.ext4 -q {DEV}; mkfs.ext4 -q /dev/loop102; mount {DEV} /mnt/data; mount /dev/loop102 /mnt/wal"
    ))?;
    vm.put("/tmp/extra.conf", CONFIG.as_bytes())?;
    postgres(
        vm,
        "install -d -o postgres -m 700 /mnt/data/pg /mnt/wal/pg
         pg initdb -D /mnt/data/pg --waldir /mnt/wal/pg -k --auth=trust --locale=C --encoding=UTF8 --wal-segsize=4 --no-sync >/tmp/initdb.log
         cat /tmp/extra.conf >>/mnt/data/pg/postgresql.conf; sync -f /mnt/data; sync -f /mnt/wal",
    )?;
    start(vm)?;
    postgres(
        vm,
        "pg createdb -h /tmp bench; pg pgbench -h /tmp -q -i -s 1 bench 2>&1
         pg psql -h /tmp -q -c 'CREATE EXTENSION amcheck; CREATE TABLE ledger (id bigint PRIMARY KEY, proof text)' bench",
    )
    .map(drop)
}

/// Rows that a client knows to be committed.
fn committed(vm: &Vm) -> Result<u64> {
    let last = vm.sh("tail -n 2 /tmp/committed 2>/dev/null | head -n 1 || true")?;
    Ok(last.parse().unwrap_or(0))
}

fn work(vm: &Vm) -> Result<[Job; 2]> {
    sql(vm, "TRUNCATE ledger")?;
    vm.sh("rm -f /tmp/committed")?;
    let jobs = [
        vm.spawn(format!("{AS_POSTGRES} {LEDGER}"))?,
        vm.spawn(format!(
            "{AS_POSTGRES} exec runuser -u postgres -- $bin/pgbench -h /tmp -n -c 2 -T 3600 bench"
        ))?,
    ];
    wait_until("the first rows", patience(30), || Ok(committed(vm)? > 20))?;
    Ok(jobs)
}

#[test]
fn a_database_starts_on_the_copies_of_its_two_devices() -> Result<()> {
    let rig = machines()?;
    rig.start_target()?;
    attach(&rig, "")?;
    rig.start_agent()?;
    make_database(&rig)?;
    rig.mirror("--full")?;
    wait_in_sync(&rig)?;
    let jobs = work(rig.source())?;
    for round in 0..if full_run() { 8 } else { 1 } {
        rig.wait()?;
        let at_least = committed(rig.source())?;
        // Committed before this wait began, so it is on the target.
        rig.wait()?;
        sleep(Duration::from_millis(700 + round * 6007 % 1300));
        if round % 2 == 0 {
            rig.kill_target()?;
        }
        rig.source().set_link(false)?;
        if round % 2 == 0 {
            rig.start_target()?;
        }
        rig.stop_target()?;
        rig.target().sh(format!(
            "cp --sparse=always {IMAGE} /srv/data.copy; cp --sparse=always /srv/log.img /srv/wal.copy"
        ))?;
        rig.start_target()?;
        rig.source().set_link(true)?;
        use_copies(rig.target(), at_least)?;
    }
    for job in &jobs {
        job.kill(15)?;
    }
    for job in jobs {
        job.wait(patience(30))?;
    }
    stop(rig.source())?;
    rig.source().sh("umount /mnt/data /mnt/wal")?;
    rig.same()?;
    same_log(&rig)?;
    rig.source().sh("dtguest settle; dtloop detach 102")?;
    rig.finish()
}

/// Starts the database on the copies, and looks at everything in it.
fn use_copies(vm: &Vm, at_least: u64) -> Result<()> {
    vm.sh(
        "modprobe loop; mount -o loop /srv/data.copy /mnt/data; mount -o loop /srv/wal.copy /mnt/wal
         rm -f /mnt/data/pg/postmaster.pid",
    )?;
    start(vm).with_context(|| {
        vm.sh("tail -n 20 /tmp/start.log")
            .unwrap_or_else(|error| error.to_string())
    })?;
    // Every row up to the last one, each as it was written.
    let ledger = sql(
        vm,
        "SELECT count(*), coalesce(max(id), 0), count(*) FILTER (WHERE proof <> repeat(md5(id::text), 8)) FROM ledger",
    )?;
    let numbers: Vec<u64> = ledger.split('|').filter_map(|n| n.parse().ok()).collect();
    ensure!(
        numbers.len() == 3 && numbers[0] == numbers[1] && numbers[2] == 0,
        "count, last, damaged rows: {ledger}"
    );
    ensure!(
        numbers[0] >= at_least,
        "{at_least} rows were committed and on the target, {} are in the copy",
        numbers[0]
    );
    let books = sql(
        vm,
        "SELECT (SELECT coalesce(sum(delta), 0) FROM pgbench_history), (SELECT sum(abalance) FROM pgbench_accounts),
            (SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(bbalance) FROM pgbench_branches)",
    )?;
    let sums: Vec<&str> = books.split('|').collect();
    ensure!(
        sums.len() == 4 && sums.iter().all(|sum| *sum == sums[0]),
        "history, accounts, tellers, branches: {books}"
    );
    postgres(vm, "pg pg_amcheck -h /tmp --heapallindexed -d bench")?;
    stop(vm)?;
    postgres(vm, "pg pg_checksums --check -D /mnt/data/pg >/dev/null")?;
    note(format!(
        "the copies hold {} rows, {at_least} of them known to be there before the cut; all sums are {}",
        numbers[0], sums[0]
    ));
    vm.sh("umount /mnt/data /mnt/wal; rm /srv/data.copy /srv/wal.copy")
        .map(drop)
}
