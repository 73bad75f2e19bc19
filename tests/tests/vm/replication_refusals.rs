// SPDX-License-Identifier: GPL-2.0-only

//! What is refused is refused with a reason, and changes nothing.

use anyhow::{Result, bail, ensure};
use dtloop_tests::{patience, wait_until};

use crate::replication_rig::{IMAGE, Rig};

/// Waits until the agent gives a reason that holds these words.
fn wait_reason(rig: &Rig, words: &str) -> Result<()> {
    let mut last = String::new();
    let outcome = wait_until(words, patience(20), || {
        let (set, device) = (rig.set()?, rig.device()?);
        last = format!(
            "{} {} {}",
            set["connection"], device["agent"]["state"], device["agent"]["reason"]
        );
        Ok(last.contains(words))
    });
    if outcome.is_err() {
        bail!("no \"{words}\" in: {last}\n{}", rig.agent_log()?);
    }
    outcome
}

#[test]
fn volumes_that_do_not_fit_are_refused() -> Result<()> {
    let rig = Rig::alone(32)?;
    let volume = |name: &str, mib: u64| {
        format!("[[volume]]\nname = \"{name}\"\npath = \"{IMAGE}\"\nsize = \"{mib}MiB\"\n")
    };
    rig.configure_target(&volume("vol", 8))?;
    rig.start_target()?;
    rig.attach("")?;
    rig.start_agent()?;
    wait_reason(&rig, "33554432")?;
    rig.expect("mirror start --full", 7)?;
    rig.expect("wait --timeout 5s", 7)?;
    rig.expect("status --check", 3)?;

    rig.stop_target()?;
    rig.configure_target(&volume("other", 32))?;
    rig.start_target()?;
    wait_reason(&rig, "vol")?;
    rig.expect("mirror start --full", 7)?;
    ensure!(
        rig.target().sh(format!("tr -d '\\0' <{IMAGE} | wc -c"))? == "0",
        "a refused volume was written"
    );

    rig.stop_target()?;
    rig.configure_target(&volume("vol", 32))?;
    rig.start_target()?;
    wait_reason(&rig, "mirror-needed")?;
    rig.mirror("--full")?;
    rig.same()?;
    rig.finish()
}

#[test]
fn a_volume_has_one_source() -> Result<()> {
    let rig = Rig::mirrored(16, "")?;
    rig.write(0, 16)?;
    rig.same()?;
    rig.stop_agent()?;
    let before = rig.target().sh(format!("sha256sum <{IMAGE}"))?;
    // Another source: without the state that says who it is.
    rig.source()
        .sh("mv /var/lib/dtloop/agent /var/lib/dtloop/agent.first")?;
    rig.write(4, 4)?;
    rig.start_agent()?;
    wait_reason(&rig, "source")?;
    rig.expect("mirror start --full", 7)?;
    rig.expect("wait --timeout 5s", 7)?;
    ensure!(
        rig.target().sh(format!("sha256sum <{IMAGE}"))? == before,
        "another source has changed the volume"
    );
    rig.stop_agent()?;
    rig.source()
        .sh("rm -r /var/lib/dtloop/agent; mv /var/lib/dtloop/agent.first /var/lib/dtloop/agent")?;
    rig.start_agent()?;
    rig.same()?;
    rig.finish()
}

#[test]
fn strangers_are_sent_away() -> Result<()> {
    let rig = Rig::mirrored(16, "")?;
    let syncs = rig.counter("syncs")?;
    // Strangers at the target's door: noise, silence, half a greeting, a browser.
    rig.target().sh(
        "for say in 'head -c 100000 /dev/urandom' 'head -c 64 /dev/zero' true \"printf 'GET / HTTP/1.0\\r\\n\\r\\n'\"; do
             (exec 3<>/dev/tcp/127.0.0.1/7788; eval \"$say\" >&3 || true; timeout 20 cat <&3 >/dev/null || true) 2>/dev/null
         done",
    )?;
    rig.write(2, 2)?;
    rig.same()?;

    // And an agent at a stranger's door.
    rig.stop_target()?;
    let script = r#"exec perl -MIO::Socket::INET -e '
        my $door = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 7788, Listen => 5, ReuseAddr => 1) or die $!;
        while (my $guest = $door->accept) { print $guest "HTTP/1.0 400 Bad Request\r\n\r\n" . "x" x 200; close $guest }'"#;
    let stranger = rig.target().spawn(script)?;
    wait_reason(&rig, "does not speak the DTLOOP protocol")?;
    stranger.kill(9)?;
    stranger.wait(patience(10))?;
    rig.start_target()?;
    rig.write(5, 1)?;
    rig.same()?;
    ensure!(rig.counter("syncs")? == syncs, "it was mirrored again");
    rig.finish()
}
