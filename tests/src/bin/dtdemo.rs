// SPDX-License-Identifier: GPL-2.0-only

//! `scripts/demo`: the whole path on real input, for a person to watch.
//!
//! Two machines and a cable. On the source PostgreSQL works on a file system on `/dev/loop1`, while the device is mirrored
//! and afterwards; the cable is cut, the agent is killed. In the end the target's copy is used as after the loss of the
//! source, and both devices are compared. Every claim is checked; the first that does not hold ends the demo.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use dtloop_tests::{Disk, Job, Link, Vm, note, patience, wait_until};
use serde_json::Value;

/// Size of the replicated device in MiB.
const DISK_MIB: u64 = 256;

/// How long pgbench goes on after each disturbance.
const SETTLE: Duration = Duration::from_secs(5);

/// How long the network is away, and the agent.
const OUTAGE: Duration = Duration::from_secs(8);

/// Where the target keeps the copy.
const IMAGE: &str = "/srv/pgdata.img";

const TARGET_CONFIG: &str = r#"listen = "0.0.0.0:7788"

[[volume]]
name = "pgdata"
path = "/srv/pgdata.img"
size = "256MiB"
"#;

const AGENT_CONFIG: &str = r#"[[set]]
name = "default"
target = "target:7788"
"#;

/// Small, but as careful with data as any other server.
const DATABASE_CONFIG: &str = "
listen_addresses = ''
unix_socket_directories = '/tmp'
max_connections = 20
shared_buffers = 32MB
dynamic_shared_memory_type = mmap
min_wal_size = 16MB
max_wal_size = 48MB
checkpoint_timeout = 30s
";

/// Runs commands of the database as its user.
const AS_POSTGRES: &str =
    r#"PATH=$(echo /usr/lib/postgresql/*/bin):$PATH; pg() { runuser -u postgres -- "$@"; };"#;

fn main() -> ExitCode {
    // Machines are named after the thread they are started from.
    let demo = std::thread::Builder::new().name("demo".into()).spawn(play);
    let outcome = demo.map_err(Into::into).and_then(|demo| {
        let broken = |_| Err(anyhow!("it broke off"));
        demo.join().unwrap_or_else(broken)
    });
    match outcome {
        // The last line: the machines are off, nothing more can be said of them.
        Ok(identical) => {
            println!("\n{identical}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn play() -> Result<String> {
    let mut demo = Demo::start()?;
    demo.attach()?;
    demo.fill()?;
    let mut bench = demo.work()?;
    demo.mirror(&mut bench)?;
    demo.cut_network()?;
    demo.kill_agent()?;
    demo.end_work(bench)?;
    let books = demo.books(&demo.source)?;
    demo.wait()?;
    demo.take_copy()?;
    demo.use_copy(&books)?;
    demo.compare()
}

/// What the database says of itself: all four are sums over the same transactions.
#[derive(Debug, PartialEq, Eq)]
struct Books {
    transactions: u64,
    sums: [i64; 4],
}

/// The figures of `dtloop status --json` that a person wants to see.
struct Figures {
    next_seq: u64,
    durable_seq: u64,
    applied_seq: u64,
    backlog_bytes: u64,
    backlog_records: u64,
    lag_ms: u64,
    dirty_bytes: u64,
    has_agent: bool,
    connection: String,
    state: String,
    mirror: Option<(u64, u64)>,
}

impl Figures {
    fn read(vm: &Vm) -> Result<Self> {
        let text = vm.sh("dtloop status --json")?;
        let status: Value = serde_json::from_str(&text).context("the status is no JSON")?;
        let (set, device) = (&status["sets"][0], &status["sets"][0]["devices"][0]);
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
        let (agent, state) = (&set["agent"], &device["agent"]["state"]);
        let pass = &state["pass"];
        Ok(Self {
            // The module counts on while there is no agent.
            next_seq: number(&set["kernel"]["next_seq"]),
            durable_seq: number(&agent["durable_seq"]),
            applied_seq: number(&agent["applied_seq"]),
            backlog_bytes: number(&set["kernel"]["used_bytes"]),
            backlog_records: number(&set["kernel"]["next_seq"])
                - number(&set["kernel"]["released"]),
            lag_ms: number(&agent["lag_ms"]),
            dirty_bytes: number(&device["kernel"]["dirty_blocks"])
                * number(&device["kernel"]["dirty_block_bytes"]),
            has_agent: agent.is_object(),
            connection: text(&agent["connection"]["state"]),
            state: text(&state["state"]),
            mirror: pass["done_bytes"]
                .as_u64()
                .map(|done| (done, number(&pass["total_bytes"]))),
        })
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.has_agent {
            write!(f, "{}, {}; records ", self.connection, self.state)?;
            write!(
                f,
                "{} made, {} durable, {} applied; ",
                self.next_seq, self.durable_seq, self.applied_seq
            )?;
        } else {
            write!(f, "no agent; records {} made; ", self.next_seq)?;
        }
        let held = bytes(self.backlog_bytes);
        write!(f, "{held} in {} records held back", self.backlog_records)?;
        if self.lag_ms > 0 {
            write!(f, ", lag {} ms", self.lag_ms)?;
        }
        if self.dirty_bytes > 0 {
            write!(f, ", {} to be sent again", bytes(self.dirty_bytes))?;
        }
        Ok(())
    }
}

fn bytes(bytes: u64) -> String {
    match bytes {
        0..0x400 => format!("{bytes} B"),
        0x400..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

/// pgbench in the background.
struct Bench {
    job: Job,
}

impl Bench {
    fn check(&mut self) -> Result<()> {
        ensure!(
            self.job.is_running(),
            "pgbench has ended by itself: {}",
            self.job.printed()
        );
        Ok(())
    }
}

struct Demo {
    source: Vm,
    target: Vm,
    /// The disk behind `/dev/loop1`.
    disk: String,
    begin: Instant,
    steps: u32,
}

impl Demo {
    fn start() -> Result<Self> {
        let begin = Instant::now();
        note("two machines are started");
        println!("\nDTLOOP: a database on /dev/loop1 of one machine, and its copy on another\n");
        let link = Link::new("source", "target")?;
        let disk = Disk::new("pgdisk", DISK_MIB);
        let [source, target] = Vm::start_all([
            Vm::builder("source").link(&link).disk(disk),
            Vm::builder("target").link(&link),
        ])?;
        source.wait_sh(patience(20), "ping -c1 -W1 target")?;
        let disk = source.device("pgdisk")?;
        let demo = Self {
            source,
            target,
            disk,
            begin,
            steps: 0,
        };
        demo.say(format!(
            "two machines with Linux {}, joined by a cable",
            demo.source.release()?
        ));
        Ok(demo)
    }

    // Telling.

    /// Announces what happens next.
    fn step(&mut self, text: &str) {
        self.steps += 1;
        println!("\n{}. {text}", self.steps);
    }

    fn say(&self, text: impl AsRef<str>) {
        println!(
            "   [{:5.1} s] {}",
            self.begin.elapsed().as_secs_f64(),
            text.as_ref()
        );
    }

    fn say_figures(&self) -> Result<Figures> {
        let figures = Figures::read(&self.source)?;
        let done = self.transactions()?;
        self.say(format!("{done} transactions; {figures}"));
        Ok(figures)
    }

    // Steps.

    fn attach(&mut self) -> Result<()> {
        self.step("Target: dttarget with a volume. Source: the module, a disk attached to /dev/loop1, the agent");
        self.target
            .put("/etc/DT/dttarget.toml", TARGET_CONFIG.as_bytes())?;
        self.target.sh(
            "mkdir -p /srv; setsid -f dttarget serve >>/var/log/dttarget.log 2>&1 </dev/null",
        )?;
        self.target
            .wait_sh(patience(10), "grep -q 'listens on' /var/log/dttarget.log")?;
        self.source
            .put("/etc/DT/dtloop.toml", AGENT_CONFIG.as_bytes())?;
        let disk = &self.disk;
        self.source.sh(format!(
            "modprobe dtloop; dtloop attach {disk} --loop 1 --volume pgdata; dtguest settle"
        ))?;
        let code = self.target.sh("dttarget invite")?;
        self.say(format!("target: dttarget invite -> {code}"));
        let pair = format!("dtloop pair target:7788 {code}");
        let paired = self.source.sh(&pair)?;
        self.say(format!("source: {pair}\n{paired}"));
        self.start_agent()?;
        self.say(format!("dtloop attach {disk} --loop 1 --volume pgdata"));
        for line in self
            .source
            .sh("lsblk -o NAME,TYPE,SIZE,MOUNTPOINTS /dev/loop1; dtloop devices --all")?
            .lines()
        {
            self.say(line);
        }
        Ok(())
    }

    fn start_agent(&self) -> Result<()> {
        let script = "setsid -f bash -c 'echo $$ >/run/dtagent.pid; exec dtagent' >>/var/log/dtagent.log 2>&1 </dev/null";
        self.source.sh(script)?;
        self.source.wait_sh(
            patience(10),
            "dtloop status --json | jq -e '.agent_error == null'",
        )
    }

    fn fill(&mut self) -> Result<()> {
        self.step("Source: ext4 on /dev/loop1, PostgreSQL on it, the tables of pgbench");
        self.source
            .sh("mkfs.ext4 -q /dev/loop1; mkdir -p /mnt/pg; mount /dev/loop1 /mnt/pg")?;
        self.say("mkfs.ext4 /dev/loop1 && mount /dev/loop1 /mnt/pg");
        self.source
            .put("/tmp/demo.conf", DATABASE_CONFIG.as_bytes())?;
        let init = format!(
            "{AS_POSTGRES} install -d -o postgres -m 700 /mnt/pg/data; cd /
             pg initdb -D /mnt/pg/data --auth=trust --locale=C --encoding=UTF8 --wal-segsize=4 --no-sync >/tmp/initdb.log
             cat /tmp/demo.conf >>/mnt/pg/data/postgresql.conf"
        );
        self.source.sh_within(patience(120), init)?;
        self.say("initdb");
        start_database(&self.source, "/mnt/pg")?;
        let tables = format!(
            "{AS_POSTGRES} cd /; pg createdb -h /tmp bench; pg pgbench -h /tmp -q -i -s 2 bench 2>&1"
        );
        self.source.sh_within(patience(120), tables)?;
        self.say("PostgreSQL runs; pgbench has made 200 000 accounts");
        Ok(())
    }

    fn work(&mut self) -> Result<Bench> {
        self.step("Source: pgbench begins, and goes on until the end");
        let script = format!(
            "{AS_POSTGRES} cd /; exec runuser -u postgres -- $(echo /usr/lib/postgresql/*/bin)/pgbench -h /tmp -n -c 2 -T 3600 bench"
        );
        let job = self.source.spawn(script)?;
        self.wait_transactions(1)?;
        self.say_figures()?;
        Ok(Bench { job })
    }

    fn mirror(&mut self, bench: &mut Bench) -> Result<()> {
        self.step("Full mirror, while pgbench writes");
        let (begin, before) = (Instant::now(), self.transactions()?);
        let mut mirror = self
            .source
            .spawn("exec dtloop mirror start --full --json")?;
        let mut told = Instant::now();
        wait_until("the end of the mirror", patience(120), || {
            if told.elapsed() > Duration::from_secs(3) {
                told = Instant::now();
                let figures = Figures::read(&self.source)?;
                let (done, total) = figures.mirror.unwrap_or_default();
                self.say(format!(
                    "{} of {} looked at; {figures}",
                    bytes(done),
                    bytes(total)
                ));
            }
            Ok(!mirror.is_running())
        })?;
        let report = mirror.finish(patience(1))?;
        let took = begin.elapsed();
        bench.check()?;
        let last: Value = serde_json::from_str(report.lines().last().unwrap_or_default())?;
        let result = &last["mirror"][0];
        ensure!(
            result["complete"] == true,
            "the mirror is not complete: {last}"
        );
        let sent = result["pass"]["sent_bytes"].as_u64().unwrap_or_default();
        self.say(format!(
            "mirrored in {:.1} s: {} sent, while {} transactions were committed",
            took.as_secs_f64(),
            bytes(sent),
            self.transactions()? - before
        ));
        self.wait_in_sync()?;
        self.say_figures().map(drop)
    }

    fn cut_network(&mut self) -> Result<()> {
        self.step("The network is cut. The database must not notice");
        let before = self.transactions()?;
        self.source.set_link(false)?;
        self.watch(OUTAGE)?;
        let during = self.transactions()? - before;
        ensure!(during > 0, "no transaction was committed without a network");
        self.say(format!(
            "{during} transactions were committed without a network; it is restored"
        ));
        let begin = Instant::now();
        self.source.set_link(true)?;
        self.wait_caught_up(begin)?;
        self.watch(SETTLE)
    }

    fn kill_agent(&mut self) -> Result<()> {
        self.step("The agent is killed (kill -9), and started again");
        let before = self.transactions()?;
        self.source.sh("kill -9 $(cat /run/dtagent.pid)")?;
        self.watch(OUTAGE)?;
        let during = self.transactions()? - before;
        ensure!(during > 0, "no transaction was committed without an agent");
        self.say(format!(
            "{during} transactions were committed without an agent; it is started again"
        ));
        let begin = Instant::now();
        self.start_agent()?;
        self.wait_caught_up(begin)?;
        self.watch(SETTLE)
    }

    fn end_work(&mut self, mut bench: Bench) -> Result<()> {
        self.step("pgbench ends; the books are closed");
        bench.check()?;
        bench.job.kill(15)?;
        bench.job.wait(patience(20))?;
        // What a server process was about to commit still counts.
        wait_until("the end of the last transaction", patience(20), || {
            let query =
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = $$pgbench$$";
            Ok(sql(&self.source, query)? == "0")
        })
    }

    fn wait(&mut self) -> Result<()> {
        self.step("dtloop wait: the target has everything written until now");
        self.say(
            self.source
                .sh_within(patience(120), "dtloop wait --timeout 5m")?,
        );
        self.say_figures().map(drop)
    }

    /// What is left when the source is lost now: the database runs, the file system is mounted.
    fn take_copy(&mut self) -> Result<()> {
        self.step(
            "The network is cut again, as if the source were lost; the target's volume is copied",
        );
        self.source.set_link(false)?;
        let script =
            format!("cp --sparse=always {IMAGE} /srv/copy.img; du -m /srv/copy.img | cut -f1");
        let used = self.target.sh_within(patience(60), script)?;
        self.say(format!("{DISK_MIB} MiB copied, {used} MiB of them in use"));
        self.source.set_link(true)
    }

    fn use_copy(&mut self, books: &Books) -> Result<()> {
        self.step("Target: the copy is checked, mounted, and PostgreSQL started on it");
        self.target.sh(
            "modprobe loop; mkdir -p /mnt/pg; mount -o loop /srv/copy.img /mnt/pg; umount /mnt/pg",
        )?;
        self.say("mounted and unmounted: the file system has replayed its journal");
        let fsck = self
            .target
            .try_sh_within(patience(60), "e2fsck -fn /srv/copy.img 2>&1")?;
        for line in fsck.text().lines() {
            self.say(line);
        }
        ensure!(fsck.ok(), "e2fsck finds errors in the copy");
        self.target
            .sh("mount -o loop /srv/copy.img /mnt/pg; rm -f /mnt/pg/data/postmaster.pid")?;
        start_database(&self.target, "/mnt/pg")?;
        for line in self
            .target
            .sh("grep -E 'not properly|redo|ready' /tmp/start.log")?
            .lines()
        {
            self.say(line);
        }
        let copied = self.books(&self.target)?;
        ensure!(
            copied == *books,
            "the copy's books differ: {copied:?} instead of {books:?}"
        );
        self.say(format!("all {} transactions are there, and the sums of accounts, tellers, branches and history agree", copied.transactions));
        stop_database(&self.target, "/mnt/pg")?;
        self.target.sh("umount /mnt/pg; rm /srv/copy.img").map(drop)
    }

    fn compare(mut self) -> Result<String> {
        self.step("Source: PostgreSQL ends, clean unmount; both devices are compared");
        stop_database(&self.source, "/mnt/pg")?;
        self.source.sh("umount /mnt/pg")?;
        self.say(
            self.source
                .sh_within(patience(120), "dtloop wait --timeout 5m")?,
        );
        let figures = Figures::read(&self.source)?;
        self.say(figures.to_string());
        ensure!(
            figures.state == "in-sync",
            "the device is {}",
            figures.state
        );
        // Both at once.
        let target = hash(&self.target, IMAGE)?;
        let source = fingerprint(
            &self.source,
            "/dev/loop1",
            hash(&self.source, "/dev/loop1")?,
        )?;
        let target = fingerprint(&self.target, IMAGE, target)?;
        self.say(format!("source /dev/loop1      {source}"));
        self.say(format!("target {IMAGE} {target}"));
        let disk = &self.disk;
        // Past the page cache: that of the disk knows nothing of what the module writes.
        let read = |path: &str| format!("<(dd if={path} bs=1M iflag=direct status=none)");
        let script = format!("cmp {} {}", read("/dev/loop1"), read(disk));
        self.source.sh_within(patience(60), script)?;
        self.say(format!(
            "source /dev/loop1 and {disk} behind it are the same"
        ));
        ensure!(source == target, "source and target differ");
        self.source.sh("dtloop detach 1")?;
        self.say(format!(
            "altogether {:.0} s",
            self.begin.elapsed().as_secs_f64()
        ));
        self.source.shutdown()?;
        self.target.shutdown()?;
        self.source.check()?;
        self.target.check()?;
        Ok(format!("identical: {source}"))
    }

    // Looking.

    /// Shows the figures for a while.
    fn watch(&self, time: Duration) -> Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < time {
            std::thread::sleep(Duration::from_secs(2));
            self.say_figures()?;
        }
        Ok(())
    }

    fn wait_in_sync(&self) -> Result<()> {
        let script = "dtloop status --check >/dev/null";
        self.source.wait_sh(patience(60), script)
    }

    /// Waits until the target has what was written until now; no mirror may begin for it.
    fn wait_caught_up(&self, begin: Instant) -> Result<()> {
        self.source
            .sh_within(patience(120), "dtloop wait --timeout 5m")?;
        let figures = self.say_figures()?;
        ensure!(
            figures.mirror.is_none(),
            "the device was mirrored again: {figures}"
        );
        self.say(format!(
            "caught up by itself after {:.1} s, without a new mirror",
            begin.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    fn transactions(&self) -> Result<u64> {
        let text = sql(&self.source, "SELECT count(*) FROM pgbench_history")?;
        text.parse().with_context(|| format!("no number: {text}"))
    }

    fn wait_transactions(&self, count: u64) -> Result<()> {
        wait_until("the first transactions", patience(30), || {
            Ok(self.transactions()? >= count)
        })
    }

    fn books(&self, vm: &Vm) -> Result<Books> {
        let query = "SELECT (SELECT count(*) FROM pgbench_history), (SELECT coalesce(sum(delta), 0) FROM pgbench_history),
            (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
            (SELECT sum(bbalance) FROM pgbench_branches)";
        let line = sql(vm, query)?;
        let mut fields = line.split('|').map(str::parse::<i64>);
        let mut field = || {
            fields
                .next()
                .and_then(Result::ok)
                .ok_or_else(|| anyhow!("not a row: {line}"))
        };
        let books = Books {
            transactions: u64::try_from(field()?)?,
            sums: [field()?, field()?, field()?, field()?],
        };
        self.say(format!(
            "{}: {} transactions, sum of history, accounts, tellers, branches {:?}",
            vm.name(),
            books.transactions,
            books.sums
        ));
        ensure!(
            books.sums.iter().all(|sum| *sum == books.sums[0]),
            "the sums on {} do not agree",
            vm.name()
        );
        Ok(books)
    }
}

fn sql(vm: &Vm, query: &str) -> Result<String> {
    vm.sh(format!(
        "cd /; runuser -u postgres -- psql -h /tmp -At -c '{query}' bench"
    ))
}

fn start_database(vm: &Vm, place: &str) -> Result<()> {
    let script = format!(
        "{AS_POSTGRES} cd /; pg pg_ctl -D {place}/data -l /tmp/start.log -t 120 -w start >/dev/null"
    );
    vm.sh_within(patience(120), script).map(drop)
}

fn stop_database(vm: &Vm, place: &str) -> Result<()> {
    let script =
        format!("{AS_POSTGRES} cd /; pg pg_ctl -D {place}/data -t 120 -m fast -w stop >/dev/null");
    vm.sh_within(patience(120), script).map(drop)
}

/// Begins to hash a device or file.
fn hash(vm: &Vm, path: &str) -> Result<Job> {
    vm.spawn(format!(
        "dd if={path} bs=1M iflag=direct status=none | sha256sum | cut -d' ' -f1"
    ))
}

/// Size and hash of a device or file, as the last line shows them.
fn fingerprint(vm: &Vm, path: &str, hash: Job) -> Result<String> {
    let hash = hash.finish(patience(120))?;
    let length = vm.sh(format!(
        "if [ -b {path} ]; then blockdev --getsize64 {path}; else stat -c %s {path}; fi"
    ))?;
    Ok(format!("{length} bytes sha256 {hash}"))
}
