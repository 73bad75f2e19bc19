// SPDX-License-Identifier: GPL-2.0-only

//! Adaptive compression over a simulated link: never slower than without, near the best where there is something to
//! gain.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test with positive figures"
)]

use std::time::Duration;

use dtloop_core::adaptive::{Adaptive, Batch, Plan};

const MIB: f64 = 1024.0 * 1024.0;

/// Raw bytes of a sample.
const SAMPLE: f64 = 65536.0;

/// Raw bytes of a batch: about a tenth of a second, as the agent makes them.
fn batch_bytes(world: &World) -> f64 {
    (world.link / 10.0).clamp(65536.0, MIB / 2.0)
}

/// The methods of the agent, with what they do to data that shrinks: speed in bytes per second, ratio.
#[derive(Clone, Copy, Debug)]
struct Cpu {
    speed: f64,
    ratio: f64,
}

/// A link with a socket buffer, and a target that takes so many raw bytes per second.
#[derive(Clone, Copy, Debug)]
struct World {
    link: f64,
    buffer: f64,
    target: f64,
    /// Seconds for a raw byte that the target needs to unpack.
    unpack: f64,
    methods: [Cpu; 4],
}

struct Run {
    world: World,
    controller: Adaptive,
    now: f64,
    queued: f64,
    raw: f64,
    packed_batches: u32,
    /// Always this, whatever the controller says.
    forced: Option<Plan>,
}

impl Run {
    fn new(world: World) -> Self {
        Self {
            world,
            controller: Adaptive::new(world.methods.len()),
            now: 0.0,
            queued: 0.0,
            raw: 0.0,
            packed_batches: 0,
            forced: None,
        }
    }

    fn pass(&mut self, time: f64, drain: f64) {
        self.now += time;
        self.queued = (self.queued - time * drain).max(0.0);
    }

    /// Wire bytes per second that leave the buffer, for what is packed by this ratio.
    fn drain(&self, ratio: f64) -> f64 {
        let unpack = if ratio > 1.0 { self.world.unpack } else { 0.0 };
        let raw = 1.0 / (1.0 / self.world.target + unpack);
        self.world.link.min(raw / ratio)
    }

    fn batch(&mut self) {
        let begin = self.now;
        let raw = batch_bytes(&self.world);
        let (mut packing, mut ratio) = (0.0, 1.0);
        match self.forced.unwrap_or_else(|| self.controller.plan()) {
            Plan::Plain => {}
            Plan::Sample(method) => {
                let cpu = self.world.methods[method];
                let time = SAMPLE / cpu.speed;
                self.pass(time, self.drain(1.0));
                let packed = (SAMPLE / cpu.ratio) as usize;
                let took = Duration::from_secs_f64(time);
                self.controller
                    .on_sample(method, SAMPLE as usize, packed, took);
            }
            Plan::Pack(method) => {
                let cpu = self.world.methods[method];
                packing = raw / cpu.speed;
                self.pass(packing, self.drain(cpu.ratio));
                ratio = cpu.ratio.max(1.0);
                self.packed_batches += 1;
            }
        }
        // Gathering records and the system call.
        self.pass(50e-6, self.drain(ratio));
        let wire = raw / ratio;
        let over = (self.queued + wire - self.world.buffer).max(0.0);
        let blocked = over / self.drain(ratio);
        self.now += blocked;
        self.queued = self.queued + wire - over;
        self.raw += raw;
        let duration = Duration::from_secs_f64;
        self.controller.on_batch(&Batch {
            raw: raw as u64,
            wire: wire as u64,
            busy: duration(self.now - begin),
            pressed: duration(blocked),
            packing: duration(packing),
        });
    }

    /// Seconds that so many raw bytes take, to the last one on the wire.
    fn send(mut self, raw: f64) -> (f64, Adaptive, u32) {
        while self.raw < raw {
            self.batch();
        }
        (self.now, self.controller, self.packed_batches)
    }
}

/// Seconds for that many raw bytes when every batch goes by one method, or plain.
fn fixed(world: &World, plan: Plan, raw: f64) -> f64 {
    let mut run = Run::new(*world);
    run.forced = Some(plan);
    run.send(raw).0
}

fn shrinking() -> [Cpu; 4] {
    let cpu = |speed: f64, ratio| Cpu {
        speed: speed * MIB,
        ratio,
    };
    [
        cpu(450.0, 2.0),
        cpu(400.0, 2.8),
        cpu(200.0, 3.1),
        cpu(40.0, 3.4),
    ]
}

fn noise() -> [Cpu; 4] {
    let cpu = |speed: f64| Cpu {
        speed: speed * MIB,
        ratio: 0.99,
    };
    [cpu(900.0), cpu(700.0), cpu(300.0), cpu(60.0)]
}

fn worlds() -> Vec<World> {
    let mut worlds = vec![];
    for methods in [shrinking(), noise()] {
        for link in [0.125, 1.0, 12.0, 120.0, 500.0, 1200.0, 8000.0] {
            for buffer in [0.25, 4.0, 16.0] {
                for (target, unpack) in [(1e6, 0.0), (150.0, 1.0 / 1000.0), (60.0, 1.0 / 300.0)] {
                    worlds.push(World {
                        link: link * MIB,
                        buffer: buffer * MIB,
                        target: target * MIB,
                        unpack: unpack / MIB,
                        methods,
                    });
                }
            }
        }
    }
    worlds
}

#[test]
fn it_is_never_slower_than_plain_and_near_the_best() {
    for world in worlds() {
        // About half a minute plain, so that it counts in percent.
        let raw = (world.link.min(world.target) * 30.0).max(world.buffer * 20.0);
        let plain = fixed(&world, Plan::Plain, raw);
        let best = (0..4)
            .map(|m| fixed(&world, Plan::Pack(m), raw))
            .fold(plain, f64::min);
        let (took, controller, packed) = Run::new(world).send(raw);
        // The buffer's content, which `fixed` does not know, and a batch.
        let slack = 0.15 + batch_bytes(&world) / world.link;
        let (busy, lost) = controller.account();
        let what = format!(
            "{took:.2} s, plain {plain:.2}, best {best:.2}, {packed} packed, lost {lost:?} of {busy:?}: {world:?}"
        );
        assert!(took <= plain * 1.02 + slack, "slower than plain: {what}");
        assert!(
            lost <= busy / 40 + Duration::from_millis(250),
            "costs too much: {what}"
        );
        // Where there is half to be gained, most of it is.
        if best < plain * 0.5 {
            assert!(
                took <= best * 1.5 + 0.1 * plain + slack,
                "far from the best: {what}"
            );
        }
    }
}

#[test]
fn a_link_that_is_not_the_bottleneck_is_never_compressed_for() {
    let world = World {
        link: 1e6 * MIB,
        buffer: 4.0 * MIB,
        target: 1e6 * MIB,
        unpack: 0.0,
        methods: shrinking(),
    };
    let (_, controller, packed) = Run::new(world).send(5000.0 * MIB);
    assert_eq!((packed, controller.account().1), (0, Duration::ZERO));
}

#[test]
fn data_and_link_may_change_on_the_way() {
    let slow = World {
        link: 10.0 * MIB,
        buffer: MIB,
        target: 1e6 * MIB,
        unpack: 0.0,
        methods: shrinking(),
    };
    let mut run = Run::new(slow);
    let seconds = |run: &mut Run, world: World, raw: f64| {
        run.world = world;
        let (begin, until) = (run.now, run.raw + raw);
        while run.raw < until {
            run.batch();
        }
        run.now - begin
    };
    let first = seconds(&mut run, slow, 300.0 * MIB);
    assert!(first < 14.0, "packed: {first}");
    // What does not shrink: plain within a second or so.
    let packed = run.packed_batches;
    let second = seconds(
        &mut run,
        World {
            methods: noise(),
            ..slow
        },
        300.0 * MIB,
    );
    assert!(second < 31.0, "{second}");
    assert!(
        run.packed_batches - packed < 10,
        "{}",
        run.packed_batches - packed
    );
    // It shrinks again: found out, if not at once.
    let third = seconds(&mut run, slow, 600.0 * MIB);
    assert!(third < 45.0, "{third}");
    // The link becomes fast: plain again by a recheck.
    let fast = World {
        link: 5000.0 * MIB,
        ..slow
    };
    seconds(&mut run, fast, 10_000.0 * MIB);
    let packed = run.packed_batches;
    let fifth = seconds(&mut run, fast, 5_000.0 * MIB);
    assert_eq!(run.packed_batches, packed, "packs for a link that is fast");
    assert!(fifth < 1.1, "{fifth}");
}

#[test]
fn little_demand_is_not_compressed_for() {
    let world = World {
        link: 10.0 * MIB,
        buffer: MIB,
        target: 1e6 * MIB,
        unpack: 0.0,
        methods: shrinking(),
    };
    let mut run = Run::new(world);
    while run.raw < 100.0 * MIB {
        run.batch();
    }
    assert!(matches!(run.controller.plan(), Plan::Pack(_)));
    for _ in 0..20 {
        run.batch();
        let idle = 0.5;
        run.pass(idle, world.link);
        run.controller.on_idle(Duration::from_secs_f64(idle));
    }
    assert_eq!(run.controller.plan(), Plan::Plain);
    assert!(run.packed_batches.checked_sub(1).unwrap() > 10);
}
