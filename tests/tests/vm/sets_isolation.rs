// SPDX-License-Identifier: GPL-2.0-only

//! Several sets and several sources at one target: a slow one, one that stands still in the middle of a frame, and hostile
//! ones do not hurt the others.

use anyhow::{Context, Result, ensure};
use dtloop_tests::{Disk, Job, Link, Vm, note, patience, wait_until};
use serde_json::Value;

use crate::replication_rig::{DEV, IMAGE, Rig};

const MIB: u64 = 32;

/// The second set of the first source, and the one set of the other source: set and loop number.
const OTHERS: [(&str, u32); 2] = [("second", 102), ("third", 103)];

/// The option that finds the agent of a set.
fn socket_of(set: &str) -> &'static str {
    if set == "third" {
        "--socket /run/dtloop/other.sock"
    } else {
        ""
    }
}

/// Three sets of two sources, all mirrored and under load.
struct House {
    rig: Rig,
    loads: Vec<Job>,
}

impl House {
    fn start() -> Result<Self> {
        let link = Link::new("source", "target")?;
        let [source, target] = Vm::start_all([
            Vm::builder("source")
                .link(&link)
                .disk(Disk::new("disk", MIB))
                .disk(Disk::new("second", MIB))
                .disk(Disk::new("third", MIB)),
            Vm::builder("target").link(&link),
        ])?;
        let rig = Rig::with(source, Some(target), MIB)?;
        let volume = |name: &str, path: &str| {
            format!("[[volume]]\nname = \"{name}\"\npath = \"{path}\"\nsize = \"{MIB}MiB\"\n")
        };
        let volumes = [
            volume("vol", IMAGE),
            volume("second", "/srv/second.img"),
            volume("third", "/srv/third.img"),
        ];
        rig.configure_target(&volumes.concat())?;
        rig.start_target()?;
        rig.attach("")?;
        for (set, number) in OTHERS {
            rig.attach_other(set, number, &format!("--set {set} --volume {set}"))?;
        }
        rig.add_set("second")?;
        rig.start_agent()?;
        rig.start_other_agent("other", "third")?;
        rig.mirror("--full --set default")?;
        rig.mirror("--full --set second")?;
        rig.mirror("--full --set third --socket /run/dtloop/other.sock")?;
        let mut house = Self { rig, loads: vec![] };
        for (number, per_second) in [(101, 40), (102, 40), (103, 100)] {
            let writer = format!(
                "exec dtstamp write /dev/loop{number} --overlap --most 32768 --per-second {per_second}"
            );
            house.loads.push(house.rig.source().spawn(writer)?);
        }
        Ok(house)
    }

    /// Waits until the target has what was written to a set until now.
    fn wait(&self, name: &str) -> Result<()> {
        let socket = socket_of(name);
        self.rig
            .expect(&format!("wait --set {name} {socket} --timeout 3m"), 0)
            .map(drop)
    }

    fn set(&self, name: &str) -> Result<Value> {
        let socket = socket_of(name);
        let text = self
            .rig
            .source()
            .sh(format!("dtloop {socket} status --json"))?;
        let status: Value = serde_json::from_str(&text)?;
        let sets = status["sets"].as_array().context("no sets")?;
        let set = sets.iter().find(|set| set["name"] == name);
        Ok(set.with_context(|| format!("no set {name}: {status}"))?["agent"].clone())
    }

    fn applied(&self, name: &str) -> Result<u64> {
        self.set(name)?["applied_seq"]
            .as_u64()
            .context("no position")
    }

    /// Fails unless these sets get on.
    fn get_on(&self, names: &[&str], meanwhile: &str) -> Result<()> {
        for name in names {
            let before = self.applied(name)?;
            wait_until(
                &format!("progress of {name} while {meanwhile}"),
                patience(15),
                || Ok(self.applied(name)? > before + 40),
            )?;
            // Not only records: also what was written just now arrives.
            self.wait(name)?;
        }
        note(format!("{names:?} got on while {meanwhile}"));
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        for load in self.loads.drain(..) {
            load.kill(15)?;
            let text = load.finish(patience(30))?;
            let report: Value = serde_json::from_str(&text)?;
            ensure!(report["errors"] == 0, "{report}");
        }
        for set in ["default", "second", "third"] {
            self.wait(set)?;
        }
        let rig = self.rig;
        for (set, number) in OTHERS {
            rig.alike(
                &format!("/dev/loop{number}"),
                &format!("/srv/{set}.img"),
                &[],
            )?;
        }
        rig.alike(DEV, IMAGE, &[])?;
        rig.source()
            .sh("dtguest settle; dtloop detach 102; dtloop detach 103
             pid=$(cat /run/other.pid); kill $pid; while [ -e /proc/$pid ]; do sleep 0.05; done")?;
        rig.finish_with_sets(&["second", "third"])
    }
}

#[test]
fn a_slow_source_does_not_hurt_the_others() -> Result<()> {
    let house = House::start()?;
    let vm = house.rig.source();
    // It stands still, sooner or later in the middle of a frame, and its connection stays open.
    vm.sh("kill -STOP $(cat /run/other.pid)")?;
    house.get_on(&["default", "second"], "another source stands still")?;
    // It crawls: a moment of work in each second.
    let crawl = vm.spawn(
        "while :; do kill -CONT $(cat /run/other.pid); sleep 0.02; kill -STOP $(cat /run/other.pid); sleep 1; done",
    )?;
    house.get_on(&["default", "second"], "another source crawls")?;
    crawl.kill(9)?;
    crawl.wait(patience(10))?;
    vm.sh("kill -CONT $(cat /run/other.pid)")?;
    house.get_on(&["default", "second", "third"], "all are well")?;
    house.end()
}

/// Holds more connections than the target serves, silent ones, and opens each anew as soon as it is closed. Every other
/// time it shouts first.
const FLOOD: &str = r#"exec perl -MIO::Socket::INET -MIO::Select -e '
    my ($host) = @ARGV;
    $SIG{PIPE} = "IGNORE";
    $| = 1;
    my @say = ("", "DTLP", "DTLP" . "\0" x 30, "x" x 48, join("", map { chr rand 256 } 1 .. 4000));
    my ($held, $opened) = (IO::Select->new, 0);
    while (1) {
        if ($held->count < 300) {
            my $door = IO::Socket::INET->new(PeerAddr => $host, PeerPort => 7788, Timeout => 2) or next;
            syswrite $door, $say[++$opened % 50 ? rand 3 : rand 5];
            $held->add($door);
            print "crowded\n" if $opened == 300;
        }
        for my $door ($held->can_read(0)) {
            next if sysread $door, my $answer, 4096;
            $held->remove($door);
            close $door;
        }
        # They are to be a burden for the target, not for the processors that all machines of a test share.
        select undef, undef, undef, 0.002;
    }'"#;

#[test]
fn hostile_visitors_do_not_hurt_the_others() -> Result<()> {
    let house = House::start()?;
    let rig = &house.rig;
    let mut floods = [
        rig.target()
            .spawn(format!("ulimit -n 4096; {FLOOD} 127.0.0.1"))?,
        rig.source()
            .spawn(format!("ulimit -n 4096; {FLOOD} target"))?,
    ];
    rig.target().wait_sh(
        patience(30),
        "grep -q 'was turned away' /var/log/dttarget.log",
    )?;
    house.get_on(&["default", "second", "third"], "visitors shout")?;
    // Who has to come in anew gets in.
    wait_until("a crowd at the door", patience(60), || {
        Ok(floods
            .iter_mut()
            .all(|flood| flood.printed().contains("crowded")))
    })?;
    rig.kill_agent()?;
    let count = "grep -c 'tried again' /var/log/dtagent.log || true";
    let before = rig.source().sh(count)?;
    rig.start_agent()?;
    house.get_on(&["default", "second", "third"], "visitors crowd the door")?;
    ensure!(
        rig.source().sh(count)? == before,
        "the agent was turned away: {}",
        rig.agent_log()?
    );
    for mut flood in floods {
        ensure!(flood.is_running(), "a flood has dried up");
        flood.kill(9)?;
        flood.wait(patience(10))?;
    }
    let target = rig.target().sh(
        "pid=$(cat /run/dttarget.pid); awk '/VmRSS|Threads/ { print $1 $2 }' /proc/$pid/status; ls /proc/$pid/fd | wc -l",
    )?;
    note(format!(
        "the target afterwards: {}",
        target.replace('\n', " ")
    ));
    // Nor do they fill the log.
    let lines = rig.target().sh("wc -l </var/log/dttarget.log")?;
    ensure!(
        lines.parse::<u32>().is_ok_and(|lines| lines < 300),
        "{lines} lines in the target's log"
    );
    house.end()
}
