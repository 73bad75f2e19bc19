// SPDX-License-Identifier: GPL-2.0-only

//! A capture stream: one ring, one sequence, one consumer, any number of devices.
//!
//! What the devices of a stream share is here: admission of changes (gate, ring, gap), their
//! completion, the consumer's wake-up. How a change travels is in `change.rs`, what the consumer
//! calls in `consumer.rs`.
//!
//! # Locking
//!
//! One spinlock, taken with interrupts off, guards [`State`]. It is held for a bounded number of
//! steps: a search in the gate, arithmetic in the ring, at most 16 Ki words of a dirty map (the
//! largest discard of 4 GiB). No other lock is taken while it is held.

mod intents;

use crate::{
    abi,
    change::InFlight,
    device::Device,
    dirty::DirtyMap,
    ffi::{
        bio::{Accounting, Parking, UpperBio},
        bio_set::BioSet,
        module_ref::ModuleRef,
        pages::{full_fence, Pages},
        time,
        wait::{Sleep, WaitQueue, Woken},
    },
    gate::{Gate, Node, Refused, SlotId, Ticket},
    intent_store::Map,
    ring::{Meta, NoRoom, Ring, Shared},
};
use core::sync::atomic::{AtomicU64, Ordering};
pub(crate) use intents::IntentWish;
use intents::Intents;
use kernel::{
    impl_has_work, new_mutex, new_poll_condvar, new_spinlock_irq, new_work,
    prelude::*,
    sync::{poll::PollCondVar, Arc, Mutex, SpinLockIrq},
    workqueue::Work,
};

/// Changes in flight of one stream at a time; more wait. Twice what a busy NVMe queue pair holds.
const IN_FLIGHT_MAX: u32 = 4096;

/// Devices of one stream.
pub(crate) const LANES_MAX: u32 = 256;

/// log2 of the sectors in a lane of the gate: 2^54 sectors are 2^63 bytes, the block layer's limit.
const LANE_SHIFT: u32 = 54;

/// The lane in which flushes, which have no range, take one key each, so that they have a slot.
const LANE_FLUSH: u32 = LANES_MAX;

/// SYNC may use at most this part of the payload area: one half.
const SYNC_SHARE: u64 = 2;

/// How long a writer sleeps for room before it looks again at what the consumer released, in
/// milliseconds. The consumer's KICK comes first if it keeps to the protocol.
const ROOM_RECHECK_MS: u32 = 10;

/// How long a writer sleeps at the gate at a time, in milliseconds; far below the hung-task
/// detector's two minutes, so that only a hung backing device shows there.
const GATE_RECHECK_MS: u32 = 1000;

/// Offset of a descriptor's flags and of its state.
const DESC_FLAGS_AT: usize = core::mem::offset_of!(abi::Desc, flags);
const DESC_STATE_AT: usize = core::mem::offset_of!(abi::Desc, state);

const NEXT_SEQ_AT: usize = core::mem::offset_of!(abi::ProducerPage, next_seq);
const COMMITTED_AT: usize = core::mem::offset_of!(abi::ProducerPage, committed);
const EPOCH_AT: usize = core::mem::offset_of!(abi::ProducerPage, epoch);
const SPACE_WANTED_AT: usize = core::mem::offset_of!(abi::ProducerPage, space_wanted);
const RELEASED_AT: usize = core::mem::offset_of!(abi::ConsumerPage, released);
const WAKE_SEQ_AT: usize = core::mem::offset_of!(abi::ConsumerPage, wake_seq);

/// The words of a dirty map.
pub(crate) type DirtyWords = KVVec<AtomicU64>;

/// What the lock guards.
pub(crate) struct State {
    ring: Ring<KVVec<Meta>>,
    gate: Gate<KVVec<Node>>,
    /// Dirty maps by lane.
    lanes: KVVec<Option<Arc<DirtyMap<DirtyWords>>>>,
    /// Write-intent maps by lane, with the device's slot in the file.
    maps: KVVec<Option<(u32, KBox<Map>)>>,
    /// Changes wait until their regions are marked.
    intent_on: bool,
    /// The file could not be written.
    intent_failed: bool,
    /// What the store last told.
    intent_status: abi::IntentStatus,
    epoch: u64,
    policy: u32,
    throttle: Throttle,
    /// A consumer has the stream open.
    consumer: bool,
    /// It wrote a `released` that can not be.
    bad_consumer: bool,
    next_flush: u64,
    next_device: u32,
    room_waiters: u32,
    counters: Counters,
}

/// When and how much [`abi::POLICY_THROTTLE`] delays changes.
#[derive(Clone, Copy)]
struct Throttle {
    /// In percent of the ring.
    start: u32,
    stop: u32,
    delay_ms: u32,
    /// It has begun and not ended.
    active: bool,
}

impl Throttle {
    const DEFAULT: Self = Self {
        start: abi::THROTTLE_START_DEFAULT,
        stop: abi::THROTTLE_STOP_DEFAULT,
        delay_ms: abi::THROTTLE_DELAY_MS_DEFAULT,
        active: false,
    };

    /// Checks what was asked for.
    fn new(start: u32, stop: u32, delay_ms: u32) -> Result<Self> {
        let or = |value, default| if value == 0 { default } else { value };
        let start = or(start, abi::THROTTLE_START_DEFAULT);
        let stop = or(stop, abi::THROTTLE_STOP_DEFAULT.min(start / 2));
        let delay_ms = or(delay_ms, abi::THROTTLE_DELAY_MS_DEFAULT);
        if start > 100 || stop >= start || delay_ms > abi::THROTTLE_DELAY_MS_MAX {
            return Err(EINVAL);
        }
        Ok(Self {
            start,
            stop,
            delay_ms,
            active: false,
        })
    }

    /// The delay of a change in milliseconds when `fill` percent of the ring are in use: it begins at the start level,
    /// ends below the stop level, and grows in between from nothing to its largest at a full ring. `None`: no delay.
    fn delay(&mut self, fill: u32) -> Option<u32> {
        self.active = fill >= self.start || (self.active && fill >= self.stop);
        let above = fill.saturating_sub(self.stop);
        let range = 100_u32.saturating_sub(self.stop).max(1);
        let delay = u64::from(self.delay_ms).wrapping_mul(u64::from(above));
        let delay = delay.checked_div(u64::from(range)).unwrap_or(0);
        // At least a millisecond: less is no delay for a sleep.
        self.active.then(|| (delay as u32).clamp(1, self.delay_ms))
    }
}

/// Counted under the lock.
#[derive(Default)]
struct Counters {
    gaps: u64,
    gap_changes: u64,
    gap_sectors: u64,
    room_waits: u64,
    room_wait_ns: u64,
    room_wait_ns_max: u64,
    throttles: u64,
    throttle_ns: u64,
    throttle_ns_max: u64,
    wakeups: u64,
    bad_releases: u64,
    intent_wait_ns: u64,
    intent_wait_ns_max: u64,
    intent_hits: u64,
    intent_rounds: u64,
    intent_cleared: u64,
}

/// A place in the stream.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) seq: u64,
    pub(crate) epoch: u64,
    /// Position of the payload, as in the descriptor.
    pub(crate) pos: u64,
}

/// What became of a change that asked to go ahead.
pub(crate) enum Admitted {
    /// It goes into the stream.
    Captured(SlotId, Place),
    /// No room: its range was marked dirty.
    Tracked(SlotId),
}

/// The words that the ring shares with the consumer.
struct Words<'a> {
    head: &'a Pages,
    consumer_page: &'a Pages,
}

impl Words<'_> {
    #[inline]
    fn consumer(&self, at: usize, ordering: Ordering) -> u64 {
        self.consumer_page
            .atomic(at)
            .map_or(0, |word| word.load(ordering))
    }
}

impl Shared for Words<'_> {
    #[inline]
    fn store_committed(&self, seq: u64) {
        store(self.head, COMMITTED_AT, seq);
    }

    #[inline]
    fn load_released(&self) -> u64 {
        self.consumer(RELEASED_AT, Ordering::Acquire)
    }

    #[inline]
    fn load_wake_seq(&self) -> u64 {
        self.consumer(WAKE_SEQ_AT, Ordering::Relaxed)
    }

    #[inline]
    fn store_space_wanted(&self, wanted: bool) {
        store(self.head, SPACE_WANTED_AT, u64::from(wanted));
    }

    #[inline]
    fn full_fence(&self) {
        full_fence();
    }
}

/// Stores a word that the consumer may look at.
#[inline]
fn store(pages: &Pages, at: usize, value: u64) {
    if let Some(word) = pages.atomic(at) {
        word.store(value, Ordering::Release);
    }
}

/// What somebody has to wait for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Obstacle {
    Gate,
    /// A region that is not marked.
    Intent,
    /// The ring fills: so many milliseconds.
    Delay(u32),
    /// With what was released when there was no room.
    Room {
        released: u64,
    },
}

/// A range of a device in the gate of its stream.
#[derive(Clone, Copy)]
pub(crate) struct GateRange {
    start: u64,
    end: u64,
}

/// What a change asks the stream for.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) start: u64,
    /// 0 for a flush.
    pub(crate) sectors: u64,
    pub(crate) payload_bytes: u32,
    pub(crate) nowait: bool,
}

/// How a SYNC read fared.
pub(crate) enum SyncAdmitted {
    /// It may go ahead.
    Ready(SlotId, Place),
    /// The share of the ring that SYNC may use is full, or the ring is.
    NoRoom,
}

/// A capture stream.
#[pin_data]
pub(crate) struct Stream {
    id: u32,
    name: [u8; abi::NAME_BYTES],
    uuid: [u8; 16],
    desc_count: u32,
    desc_mask: u64,
    payload_bytes: u64,
    /// [`abi::ConsumerPage`].
    consumer_page: Pages,
    /// [`abi::ProducerPage`], then the descriptors.
    head: Pages,
    payload: Pages,
    /// Upper bios by slot of the gate.
    parking: KVVec<Parking>,
    #[pin]
    state: SpinLockIrq<State>,
    #[pin]
    gate_wait: WaitQueue,
    #[pin]
    room_wait: WaitQueue,
    /// Changes whose regions are being marked.
    #[pin]
    intent_wait: WaitQueue,
    #[pin]
    intents: Mutex<Option<Intents>>,
    #[pin]
    intent_work: Work<Stream>,
    #[pin]
    readable: PollCondVar,
    /// For changes that were not admitted yet: what they hold may wait at the gate.
    #[pin]
    bios: BioSet<InFlight>,
    /// For changes that are in the gate and are not captured. A set of its own: those who hold a bio
    /// of the other one may be waiting for just this change to end.
    #[pin]
    clones: BioSet<InFlight>,
    /// For SYNC. A set of its own: writers that wait for room in the ring hold bios of the first one,
    /// and only the consumer, which asks for SYNC, can make that room.
    #[pin]
    syncs: BioSet<InFlight>,
    // Last: while anything of the stream exists, so does the module.
    _module: ModuleRef,
}

impl_has_work! {
    impl HasWork<Stream> for Stream { self.intent_work }
}

impl Stream {
    /// Makes a stream. Must not be called from atomic context.
    pub(crate) fn new(id: u32, create: &abi::StreamCreate) -> Result<Arc<Self>> {
        let payload_bytes = match create.payload_bytes {
            0 => abi::RING_BYTES_DEFAULT,
            bytes => bytes,
        };
        if !payload_bytes.is_power_of_two()
            || !(abi::RING_BYTES_MIN..=abi::RING_BYTES_MAX).contains(&payload_bytes)
        {
            return Err(EINVAL);
        }
        let desc_count = match create.desc_count {
            0 => u32::try_from(payload_bytes / abi::PAGE_BYTES as u64)?,
            count => count,
        };
        if !desc_count.is_power_of_two() || !(256..=1 << 20).contains(&desc_count) {
            return Err(EINVAL);
        }
        check_policy(create.policy)?;
        check_name(&create.name, 1)?;
        let mut uuid = [0; 16];
        time::random_bytes(&mut uuid);
        let head_bytes = abi::PAGE_BYTES + desc_count as usize * abi::DESC_BYTES;
        let sync_bytes_max = payload_bytes / SYNC_SHARE;
        let gate = Gate::new(filled(
            Gate::<KVVec<Node>>::nodes_for(IN_FLIGHT_MAX),
            || Node::EMPTY,
        )?);
        let ring = Ring::new(
            filled(desc_count as usize, || Meta::EMPTY)?,
            payload_bytes,
            sync_bytes_max,
        )
        .ok_or(EINVAL)?;
        let state = State {
            ring,
            gate,
            lanes: filled(LANES_MAX as usize, || None)?,
            maps: filled(LANES_MAX as usize, || None)?,
            intent_on: false,
            intent_failed: false,
            intent_status: abi::IntentStatus::default(),
            epoch: 1,
            policy: create.policy,
            throttle: Throttle::DEFAULT,
            consumer: false,
            bad_consumer: false,
            next_flush: 0,
            next_device: 1,
            room_waiters: 0,
            counters: Counters::default(),
        };
        let nodes = Gate::<KVVec<Node>>::nodes_for(IN_FLIGHT_MAX);
        let parking = filled(nodes, Parking::new)?;
        let consumer_page = Pages::new(abi::PAGE_BYTES)?;
        let head = Pages::new(head_bytes)?;
        let payload = Pages::new(usize::try_from(payload_bytes)?)?;
        let desc_mask = u64::from(desc_count).wrapping_sub(1);
        let module = ModuleRef::try_get()?;
        let stream = Arc::pin_init(
            try_pin_init!(Self {
                id,
                name: create.name,
                uuid,
                desc_count,
                desc_mask,
                payload_bytes,
                consumer_page,
                head,
                payload,
                parking,
                state <- new_spinlock_irq!(state, "dtloop_stream"),
                gate_wait <- WaitQueue::new(c"dtloop_gate", kernel::static_lock_class!()),
                room_wait <- WaitQueue::new(c"dtloop_room", kernel::static_lock_class!()),
                intent_wait <- WaitQueue::new(c"dtloop_intent", kernel::static_lock_class!()),
                intents <- new_mutex!(None, "dtloop_intents"),
                intent_work <- new_work!("dtloop_intent_work"),
                readable <- new_poll_condvar!("dtloop_readable"),
                bios <- BioSet::new(),
                clones <- BioSet::new(),
                syncs <- BioSet::new(),
                _module: module,
            }),
            GFP_KERNEL,
        )?;
        stream.head.write(
            0,
            abi::ProducerPage {
                magic: abi::RING_MAGIC,
                abi_version: abi::ABI_VERSION,
                stream_id: id,
                stream_uuid: uuid,
                reserved0: [0; 4],
                next_seq: abi::SEQ_FIRST,
                committed: abi::SEQ_FIRST,
                epoch: 1,
                space_wanted: 0,
                reserved1: [0; 4],
                reserved2: [0; 496],
            },
        );
        store(&stream.consumer_page, RELEASED_AT, abi::SEQ_FIRST);
        Ok(stream)
    }

    /// Id.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Name of the set.
    pub(crate) fn name(&self) -> &[u8; abi::NAME_BYTES] {
        &self.name
    }

    /// Where the lower bios of captured changes come from.
    #[inline]
    pub(crate) fn bios(&self) -> &BioSet<InFlight> {
        &self.bios
    }

    /// Where those of changes come from that go by the stream.
    pub(crate) fn clones(&self) -> &BioSet<InFlight> {
        &self.clones
    }

    /// Where those of SYNC come from.
    pub(crate) fn syncs(&self) -> &BioSet<InFlight> {
        &self.syncs
    }

    /// The payload area.
    #[inline]
    pub(crate) fn payload(&self) -> &Pages {
        &self.payload
    }

    /// Largest payload of one record in bytes: [`abi::RECORD_BYTES_MAX`] or a quarter of the area.
    #[inline]
    pub(crate) fn record_bytes_max(&self) -> u32 {
        // The smallest area is four of the largest records.
        abi::RECORD_BYTES_MAX
    }

    /// Byte of the payload area that a payload position is at.
    #[inline]
    pub(crate) fn payload_offset(&self, pos: u64) -> usize {
        (pos & self.payload_bytes.wrapping_sub(1)) as usize
    }

    /// Where the upper bio of a slot is parked.
    #[inline]
    pub(crate) fn parking(&self, slot: SlotId) -> Option<&Parking> {
        self.parking.get(slot.index())
    }

    #[inline]
    fn words(&self) -> Words<'_> {
        Words {
            head: &self.head,
            consumer_page: &self.consumer_page,
        }
    }

    #[inline]
    fn desc_at(&self, seq: u64) -> usize {
        let index = (seq & self.desc_mask) as usize;
        index
            .wrapping_mul(abi::DESC_BYTES)
            .wrapping_add(abi::PAGE_BYTES)
    }

    /// Writes the descriptor of a place that the caller was given and has not completed.
    #[inline]
    pub(crate) fn write_desc(&self, desc: &abi::Desc) {
        self.head.write(self.desc_at(desc.seq), *desc);
    }

    /// Reads the descriptor of a record that is complete and not released.
    pub(crate) fn read_desc(&self, seq: u64) -> Option<abi::Desc> {
        self.head.read(self.desc_at(seq))
    }

    // -----------------------------------------------------------------------------------------
    // Admission
    // -----------------------------------------------------------------------------------------

    /// Lets a change of `device` go ahead: through the gate, and into the ring or, when that is
    /// full and the policy does not wait, into the dirty map.
    ///
    /// `EAGAIN` if it would have to wait and must not; `EIO` if the device is being torn off.
    /// The entry into the gate and the reservation happen under one lock, so the order of records
    /// of overlapping changes is the order in which they pass the gate.
    pub(crate) fn admit(&self, device: &Device, request: &Request) -> Result<Admitted> {
        let obstacle = {
            let mut state = self.state.lock();
            let range = range_of(&mut state, device, request);
            let delay = if state.policy == abi::POLICY_THROTTLE {
                self.delay(&mut state)
            } else {
                None
            };
            match delay {
                Some(ms) => Obstacle::Delay(ms),
                None => match self.try_first(&mut state, device, request, range) {
                    Ok(admitted) => return Ok(admitted),
                    Err(obstacle) => obstacle,
                },
            }
        };
        if device.is_failing() {
            return Err(EIO);
        }
        if request.nowait {
            if obstacle == Obstacle::Intent {
                // When it comes again, it need not wait long.
                self.ask_for_mark(device, request.start, request.sectors, true);
            }
            return Err(EAGAIN);
        }
        self.admit_slowly(device, request, obstacle)
    }

    /// How long a change is to be delayed now, in milliseconds.
    #[cold]
    fn delay(&self, state: &mut State) -> Option<u32> {
        if !state.consumer || state.bad_consumer {
            return None;
        }
        self.take_up_releases(state);
        let part = |used: u64, of: u64| used.saturating_mul(100).checked_div(of).unwrap_or(0);
        let records = state.ring.next_seq().wrapping_sub(state.ring.released());
        let fill = part(state.ring.used_bytes(), self.payload_bytes)
            .max(part(records, u64::from(self.desc_count)));
        state.throttle.delay(fill.min(100) as u32)
    }

    /// Delays a change: what is left of it is spared when the ring has drained meanwhile.
    fn sleep_off(&self, device: &Device, delay_ms: u32) {
        let since = time::monotonic_ns();
        let until = since.saturating_add(u64::from(delay_ms) * 1_000_000);
        loop {
            let left = until.saturating_sub(time::monotonic_ns()) / 1_000_000;
            let step = (left as u32).min(ROOM_RECHECK_MS);
            if step == 0 {
                break;
            }
            let woken = self.room_wait.wait(Sleep::Killable, step, || {
                let mut state = self.state.lock();
                let over = device.is_failing() || self.delay(&mut state).is_none();
                over.then_some(())
            });
            if woken != Woken::TimedOut {
                break;
            }
        }
        let waited = time::monotonic_ns().saturating_sub(since);
        let counters = &mut self.state.lock().counters;
        counters.throttles = counters.throttles.wrapping_add(1);
        counters.throttle_ns = counters.throttle_ns.saturating_add(waited);
        counters.throttle_ns_max = counters.throttle_ns_max.max(waited);
    }

    /// The first try of a change, which counts whether its regions were marked.
    #[inline]
    fn try_first(
        &self,
        state: &mut State,
        device: &Device,
        request: &Request,
        range: GateRange,
    ) -> Result<Admitted, Obstacle> {
        let outcome = self.try_admit(state, device, request, range, None, true);
        if state.intent_on && request.sectors != 0 && !matches!(outcome, Err(Obstacle::Intent)) {
            state.counters.intent_hits = state.counters.intent_hits.wrapping_add(1);
        }
        outcome
    }

    #[inline]
    fn try_admit(
        &self,
        state: &mut State,
        device: &Device,
        request: &Request,
        range: GateRange,
        ticket: Option<&Ticket>,
        may_wait: bool,
    ) -> Result<Admitted, Obstacle> {
        if state.intent_on && request.sectors != 0 {
            // Under the lock under which marks are cleared: whoever is in from here on is seen there.
            if let Some(Some((_, map))) = state.maps.get_mut(device.lane() as usize) {
                if !map.touch(request.start, request.sectors) {
                    return Err(Obstacle::Intent);
                }
            }
        }
        let entered = match ticket {
            None => state.gate.try_enter(range.start, range.end),
            Some(ticket) => state.gate.try_enter_queued(ticket),
        };
        let slot = entered.map_err(|_: Refused| Obstacle::Gate)?;
        if let Some(place) = self.try_reserve(state, request.payload_bytes, false) {
            return Ok(Admitted::Captured(slot, place));
        }
        let wait =
            may_wait && state.policy == abi::POLICY_BLOCK && state.consumer && !state.bad_consumer;
        if wait {
            // Of a device that is being torn off as well: the caller then fails the change.
            if state.gate.leave(slot) {
                self.gate_wait.wake_all();
            }
            return Err(Obstacle::Room {
                released: state.ring.released(),
            });
        }
        // Marked under the same lock that counts the gap: whoever sees the GAP record finds the
        // blocks in the map.
        if request.sectors != 0 {
            if let Some(Some(map)) = state.lanes.get(device.lane() as usize) {
                map.mark(request.start, request.sectors);
            }
        }
        state
            .ring
            .miss(device.id(), request.sectors, time::real_ns());
        state.counters.gap_changes = state.counters.gap_changes.wrapping_add(1);
        state.counters.gap_sectors = state.counters.gap_sectors.saturating_add(request.sectors);
        if self.want_room(state) {
            // Released just now: nobody may come to write the GAP record for a while.
            self.close_gap(state);
        }
        Ok(Admitted::Tracked(slot))
    }

    /// Takes a place in the ring; before it, the GAP record if one is due.
    #[inline]
    fn try_reserve(&self, state: &mut State, payload_bytes: u32, sync: bool) -> Option<Place> {
        let reserved = match state.ring.reserve(payload_bytes, sync) {
            Ok(reserved) => reserved,
            Err(NoRoom::TooLarge) => return None,
            Err(NoRoom::Ring | NoRoom::SyncShare | NoRoom::Gap) => {
                self.take_up_releases(state);
                self.close_gap(state);
                state.ring.reserve(payload_bytes, sync).ok()?
            }
        };
        store(&self.head, NEXT_SEQ_AT, state.ring.next_seq());
        Some(Place {
            seq: reserved.seq,
            epoch: state.epoch,
            pos: reserved.pos,
        })
    }

    /// Writes the GAP record if one is due and there is room enough to go on capturing after it.
    #[cold]
    fn close_gap(&self, state: &mut State) {
        let Some((reserved, gap)) = state.ring.reserve_gap() else {
            return;
        };
        state.counters.gaps = state.counters.gaps.wrapping_add(1);
        self.write_desc(&abi::Desc {
            seq: reserved.seq,
            epoch: state.epoch,
            start_sector: gap.sectors,
            time_ns: gap.since_ns,
            device: gap.device,
            op: abi::OP_GAP,
            flags: if gap.devices_changed {
                abi::F_DEVICES
            } else {
                0
            },
            state: abi::STATE_COMMITTED,
            aux: gap.changes,
            ..abi::Desc::default()
        });
        state.ring.complete(reserved.seq);
        store(&self.head, NEXT_SEQ_AT, state.ring.next_seq());
        if self.publish(state) {
            self.readable.notify_all();
        }
    }

    /// Looks at what the consumer has released.
    fn take_up_releases(&self, state: &mut State) {
        if !state.bad_consumer && state.ring.pull_release(&self.words()).is_err() {
            self.refuse_consumer(state);
        }
    }

    /// Asks the consumer for a KICK. True: it has released something already.
    fn want_room(&self, state: &mut State) -> bool {
        if state.bad_consumer {
            return false;
        }
        match state.ring.want_room(&self.words()) {
            Ok(moved) => moved,
            Err(_) => {
                self.refuse_consumer(state);
                false
            }
        }
    }

    /// The consumer broke the protocol: nothing is taken from it until the stream is opened anew.
    #[cold]
    fn refuse_consumer(&self, state: &mut State) {
        state.bad_consumer = true;
        state.counters.bad_releases = state.counters.bad_releases.wrapping_add(1);
        pr_warn!(
            "stream {}: the consumer released records that are not complete or were released before; it has to open the stream anew\n",
            self.id
        );
    }

    /// The way of a change that met an obstacle. Task context, and the task may wait.
    #[cold]
    fn admit_slowly(
        &self,
        device: &Device,
        request: &Request,
        first: Obstacle,
    ) -> Result<Admitted> {
        let range = range_of(&mut self.state.lock(), device, request);
        let mut obstacle = first;
        let mut may_wait = true;
        let mut room_since = None;
        let admitted = loop {
            let outcome = match obstacle {
                Obstacle::Delay(ms) => {
                    self.sleep_off(device, ms);
                    let mut state = self.state.lock();
                    self.try_first(&mut state, device, request, range)
                        .map_err(Some)
                }
                Obstacle::Intent => {
                    self.wait_for_mark(device, request.start, request.sectors);
                    let mut state = self.state.lock();
                    self.try_admit(&mut state, device, request, range, None, may_wait)
                        .map_err(Some)
                }
                Obstacle::Gate => {
                    device.counters().gate_waits.fetch_add(1, Ordering::Relaxed);
                    self.wait_at_gate(device, range, Sleep::Uninterruptible, |state, ticket| {
                        self.try_admit(state, device, request, range, ticket, may_wait)
                    })
                }
                Obstacle::Room { released } => {
                    room_since.get_or_insert_with(time::monotonic_ns);
                    may_wait = self.wait_for_room(device, released);
                    let mut state = self.state.lock();
                    self.try_admit(&mut state, device, request, range, None, may_wait)
                        .map_err(Some)
                }
            };
            match outcome {
                Ok(admitted) => break Ok(admitted),
                Err(Some(next)) => obstacle = next,
                Err(None) => break Err(EIO),
            }
            if device.is_failing() {
                break Err(EIO);
            }
        };
        if let Some(since) = room_since {
            let waited = time::monotonic_ns().saturating_sub(since);
            let counters = &mut self.state.lock().counters;
            counters.room_waits = counters.room_waits.wrapping_add(1);
            counters.room_wait_ns = counters.room_wait_ns.saturating_add(waited);
            counters.room_wait_ns_max = counters.room_wait_ns_max.max(waited);
        }
        admitted
    }

    /// Waits in the gate's queue until `enter` succeeds or meets another obstacle. `Err(None)`: the
    /// device is being torn off, or the task killed.
    fn wait_at_gate<T>(
        &self,
        device: &Device,
        range: GateRange,
        sleep: Sleep,
        mut enter: impl FnMut(&mut State, Option<&Ticket>) -> Result<T, Obstacle>,
    ) -> Result<T, Option<Obstacle>> {
        let mut ticket = None;
        let mut attempt = || {
            let mut state = self.state.lock();
            if device.is_failing() {
                return Some(Err(None));
            }
            if ticket.is_none() {
                ticket = state.gate.queue(range.start, range.end);
            }
            match enter(&mut state, ticket.as_ref()) {
                // With a ticket, it is used up by whatever got past the gate.
                Ok(value) => {
                    ticket = None;
                    Some(Ok(value))
                }
                Err(room @ Obstacle::Room { .. }) => {
                    ticket = None;
                    Some(Err(Some(room)))
                }
                // The ticket is given back below.
                Err(other @ (Obstacle::Intent | Obstacle::Delay(_))) => Some(Err(Some(other))),
                Err(Obstacle::Gate) => None,
            }
        };
        let outcome = loop {
            match self.gate_wait.wait(sleep, GATE_RECHECK_MS, &mut attempt) {
                Woken::Ready(outcome) => break outcome,
                Woken::TimedOut => {}
                Woken::Killed => break Err(None),
            }
        };
        if let Some(ticket) = ticket {
            if self.state.lock().gate.cancel(ticket) {
                self.gate_wait.wake_all();
            }
        }
        outcome
    }

    /// Sleeps until there may be room. False when waiting makes no sense any more, as the task is
    /// being killed: the change is then tracked, not lost.
    fn wait_for_room(&self, device: &Device, before: u64) -> bool {
        {
            let mut state = self.state.lock();
            state.room_waiters = state.room_waiters.wrapping_add(1);
        }
        let woken = self.room_wait.wait(Sleep::Killable, ROOM_RECHECK_MS, || {
            let mut state = self.state.lock();
            self.want_room(&mut state);
            let moved = state.ring.released() != before;
            let hopeless = !state.consumer || state.bad_consumer || device.is_failing();
            (moved || hopeless).then_some(())
        });
        {
            let mut state = self.state.lock();
            state.room_waiters = state.room_waiters.wrapping_sub(1);
        }
        woken != Woken::Killed
    }

    /// Lets a SYNC read go ahead. Waits for changes in flight in its range; `EINTR` if the task is
    /// killed meanwhile.
    pub(crate) fn admit_sync(
        &self,
        device: &Device,
        start: u64,
        sectors: u32,
        payload_bytes: u32,
    ) -> Result<SyncAdmitted> {
        let range = device_range(device, start, u64::from(sectors));
        let admitted = self.wait_at_gate(device, range, Sleep::Killable, |state, ticket| {
            let entered = match ticket {
                None => state.gate.try_enter(range.start, range.end),
                Some(ticket) => state.gate.try_enter_queued(ticket),
            };
            let slot = entered.map_err(|_| Obstacle::Gate)?;
            if let Some(place) = self.try_reserve(state, payload_bytes, true) {
                return Ok(SyncAdmitted::Ready(slot, place));
            }
            if state.gate.leave(slot) {
                self.gate_wait.wake_all();
            }
            Ok(SyncAdmitted::NoRoom)
        });
        admitted.map_err(|_| if device.is_failing() { ENXIO } else { EINTR })
    }

    /// Closes the gate for the whole of a device, so that its dirty map may be replaced.
    pub(crate) fn close_gate(&self, device: &Device) -> Result<SlotId> {
        let range = device_range(device, 0, 1 << LANE_SHIFT);
        self.wait_at_gate(device, range, Sleep::Killable, |state, ticket| {
            match ticket {
                None => state.gate.try_enter(range.start, range.end),
                Some(ticket) => state.gate.try_enter_queued(ticket),
            }
            .map_err(|_| Obstacle::Gate)
        })
        .map_err(|_| EINTR)
    }

    /// Opens the gate again.
    pub(crate) fn open_gate(&self, slot: SlotId) {
        if self.state.lock().gate.leave(slot) {
            self.gate_wait.wake_all();
        }
    }

    // -----------------------------------------------------------------------------------------
    // Completion
    // -----------------------------------------------------------------------------------------

    /// Ends a change: its record becomes complete, its range leaves the gate. May be called from
    /// interrupt context.
    ///
    /// `errno` is 0 or what the backing device answered; `dirty`: mark the range, as its content is
    /// not in the stream; `clean`: the record holds the content of the range, clear it.
    ///
    /// Gives the upper bio that was parked for it, if a forced detach did not take it.
    #[inline]
    pub(crate) fn complete(&self, done: &Completion<'_>) -> Option<(UpperBio, Accounting)> {
        let place = done.seq;
        if let Some(seq) = place {
            let desc = self.desc_at(seq);
            if done.errno == 0 {
                self.head.write(desc + DESC_STATE_AT, abi::STATE_COMMITTED);
            } else {
                let flags = done.flags | u16::from(done.errno) << abi::F_ERRNO_SHIFT;
                self.head.write(desc + DESC_FLAGS_AT, flags);
                self.head.write(desc + DESC_STATE_AT, abi::STATE_FAILED);
            }
        }
        let (wake, waiters, upper) = {
            let mut state = self.state.lock();
            if done.dirty || done.clean {
                if let Some(Some(map)) = state.lanes.get(done.device.lane() as usize) {
                    if done.dirty {
                        map.mark(done.start, done.sectors);
                    } else {
                        map.clear_covered(done.start, done.sectors);
                    }
                }
                // What a SYNC record holds is not on the target before that record is.
                if let Some(Some((_, map))) = state.maps.get_mut(done.device.lane() as usize) {
                    map.note(done.start, done.sectors);
                }
            }
            if done.closes_epoch && done.errno == 0 {
                state.epoch = state.epoch.wrapping_add(1);
                store(&self.head, EPOCH_AT, state.epoch);
            }
            let moved = place.is_some_and(|seq| state.ring.complete(seq));
            let wake = moved && self.publish(&mut state);
            // Under the lock, so that the slot does not change hands while a forced detach looks.
            let upper = self.parking(done.slot).and_then(Parking::take);
            (wake, state.gate.leave(done.slot), upper)
        };
        if wake {
            self.readable.notify_all();
        }
        if waiters {
            self.gate_wait.wake_all();
        }
        upper
    }

    /// Tells the consumer how far records are complete; true: wake it.
    #[inline]
    fn publish(&self, state: &mut State) -> bool {
        let wake = state.ring.publish(&self.words()) && state.consumer;
        state.counters.wakeups = state.counters.wakeups.wrapping_add(u64::from(wake));
        wake
    }

    /// Writes a record that is complete at once. False when there is no room: the change of the
    /// devices is then told by the next GAP record.
    pub(crate) fn note(&self, desc: &abi::Desc) -> bool {
        let (noted, wake) = {
            let mut state = self.state.lock();
            match self.try_reserve(&mut state, 0, false) {
                Some(place) => {
                    self.write_desc(&abi::Desc {
                        seq: place.seq,
                        epoch: place.epoch,
                        time_ns: time::real_ns(),
                        state: abi::STATE_COMMITTED,
                        ..*desc
                    });
                    state.ring.complete(place.seq);
                    (true, self.publish(&mut state))
                }
                None => {
                    state.ring.miss_devices(time::real_ns());
                    if self.want_room(&mut state) {
                        self.close_gap(&mut state);
                    }
                    (false, false)
                }
            }
        };
        if wake {
            self.readable.notify_all();
        }
        noted
    }

    /// Wakes everybody who waits, so that they look at the state anew.
    pub(crate) fn wake_everybody(&self) {
        self.gate_wait.wake_all();
        self.room_wait.wake_all();
        self.intent_wait.wake_all();
        self.readable.notify_all();
    }

    // -----------------------------------------------------------------------------------------
    // Devices and their dirty maps
    // -----------------------------------------------------------------------------------------

    /// Gives a device a lane, an id and its dirty map there.
    pub(crate) fn join(&self, map: Arc<DirtyMap<DirtyWords>>) -> Result<(u32, u32)> {
        let mut state = self.state.lock();
        let lane = state.lanes.iter().position(Option::is_none).ok_or(ENOSPC)?;
        if state.next_device == u32::MAX {
            return Err(ENOSPC);
        }
        if let Some(place) = state.lanes.get_mut(lane) {
            *place = Some(map);
        }
        let id = state.next_device;
        state.next_device = id.wrapping_add(1);
        Ok((lane as u32, id))
    }

    /// Grows with each device that joins.
    pub(crate) fn joined(&self) -> u32 {
        self.state.lock().next_device
    }

    /// Frees a lane; nothing of its device is in flight. Its marks stay in the intent file.
    ///
    /// It does not wait for that file, whose disk may hang: whoever puts an intent map in a lane holds the mutex
    /// that the worker holds, so a worker that is writing marks of this device finds no map when it is done.
    pub(crate) fn leave(&self, lane: u32) {
        let lane = lane as usize;
        let maps = {
            let mut state = self.state.lock();
            let dirty = state.lanes.get_mut(lane).and_then(Option::take);
            (dirty, state.maps.get_mut(lane).and_then(Option::take))
        };
        // Outside the lock: freeing may sleep.
        drop(maps);
    }

    /// Replaces the dirty map of a device whose gate is closed, keeping what is marked.
    ///
    /// The caller holds the registry's lock as well, which keeps IOC_DIRTY_SET out: nobody changes
    /// the old map while it is copied.
    pub(crate) fn replace_map(&self, device: &Device, map: Arc<DirtyMap<DirtyWords>>) {
        let lane = device.lane() as usize;
        let old = self.state.lock().lanes.get(lane).cloned().flatten();
        if let Some(old) = &old {
            map.copy_from(old);
        }
        let place = self
            .state
            .lock()
            .lanes
            .get_mut(lane)
            .map(|place| place.replace(map));
        // Outside the lock: freeing may sleep.
        drop((old, place));
    }

    /// Runs `f` on the dirty map of a device, under the lock: `f` must be short.
    pub(crate) fn with_map<T>(
        &self,
        device: &Device,
        f: impl FnOnce(&DirtyMap<DirtyWords>) -> T,
    ) -> Option<T> {
        let state = self.state.lock();
        match state.lanes.get(device.lane() as usize) {
            Some(Some(map)) => Some(f(map)),
            _ => None,
        }
    }

    // -----------------------------------------------------------------------------------------
    // The consumer's side
    // -----------------------------------------------------------------------------------------

    /// Makes the caller the consumer; `EBUSY` if there is one. Gives the first unreleased record.
    pub(crate) fn open_consumer(&self) -> Result<u64> {
        let mut state = self.state.lock();
        if state.consumer {
            return Err(EBUSY);
        }
        state.consumer = true;
        state.bad_consumer = false;
        let released = state.ring.released();
        // What the last consumer left there may be anything.
        store(&self.consumer_page, RELEASED_AT, released);
        store(&self.consumer_page, WAKE_SEQ_AT, 0);
        Ok(released)
    }

    /// Ends the consumer. What it released counts; the rest stays for its successor.
    pub(crate) fn close_consumer(&self) {
        {
            let mut state = self.state.lock();
            self.take_up_releases(&mut state);
            state.consumer = false;
            state.bad_consumer = false;
        }
        self.wake_everybody();
    }

    /// The consumer released something, or looks for work: take it up, write the GAP record that is
    /// due, and wake who waits for room. Gives `committed`.
    pub(crate) fn kick(&self) -> Result<u64> {
        let (committed, wake_room) = {
            let mut state = self.state.lock();
            self.take_up_releases(&mut state);
            if state.bad_consumer {
                return Err(EBADMSG);
            }
            self.close_gap(&mut state);
            let waiters = state.room_waiters != 0;
            if !waiters && !state.ring.gap().is_open() {
                state.ring.want_no_room(&self.words());
            }
            (state.ring.committed(), waiters)
        };
        if wake_room {
            self.room_wait.wake_all();
        }
        Ok(committed)
    }

    /// For `poll`: whether the record that the consumer waits for is complete.
    pub(crate) fn wake_due(&self) -> bool {
        let wake_seq = self.words().load_wake_seq();
        self.state.lock().ring.readable(wake_seq)
    }

    /// Everything below is complete.
    pub(crate) fn committed(&self) -> u64 {
        self.state.lock().ring.committed()
    }

    /// Says on the consumer's behalf that it is done with what is below `seq`.
    pub(crate) fn release(&self, seq: u64) {
        store(&self.consumer_page, RELEASED_AT, seq);
    }

    /// Where `poll` and `read` wait.
    pub(crate) fn readable(&self) -> &PollCondVar {
        &self.readable
    }

    /// Asks on the consumer's behalf to be woken when record `seq` is complete.
    pub(crate) fn wake_at(&self, seq: u64) {
        store(&self.consumer_page, WAKE_SEQ_AT, seq);
        full_fence();
    }

    /// Sleeps until record `seq` is complete or the stream changes otherwise. `EINTR` on a signal.
    pub(crate) fn wait_committed(&self, seq: u64) -> Result {
        self.wake_at(seq);
        let mut state = self.state.lock();
        while state.ring.committed() <= seq {
            if self.readable.wait_interruptible(&mut state) {
                return Err(EINTR);
            }
        }
        Ok(())
    }

    /// The areas that a consumer maps: consumer page, head, payload.
    pub(crate) fn areas(&self) -> (&Pages, &Pages, &Pages) {
        (&self.consumer_page, &self.head, &self.payload)
    }

    /// Sets the full-ring policy.
    pub(crate) fn set_policy(&self, request: &abi::StreamSet) -> Result {
        check_policy(request.policy)?;
        let throttle = Throttle::new(
            request.throttle_start,
            request.throttle_stop,
            request.throttle_delay_ms,
        )?;
        {
            let mut state = self.state.lock();
            state.policy = request.policy;
            state.throttle = throttle;
        }
        self.room_wait.wake_all();
        Ok(())
    }

    /// Whether it may be destroyed: see [`abi::StreamDestroy`].
    pub(crate) fn check_destroy(&self, discard: bool) -> Result {
        let mut state = self.state.lock();
        if state.consumer || state.lanes.iter().any(Option::is_some) {
            return Err(EBUSY);
        }
        self.take_up_releases(&mut state);
        let empty = state.ring.released() == state.ring.next_seq() && !state.ring.gap().is_open();
        if empty || discard {
            Ok(())
        } else {
            Err(ENOTEMPTY)
        }
    }

    /// Everything about the stream.
    pub(crate) fn status(&self) -> abi::StreamStatus {
        let mut state = self.state.lock();
        self.take_up_releases(&mut state);
        let mut flags = 0;
        if state.consumer {
            flags |= abi::STREAM_CONSUMER;
        }
        if state.ring.gap().is_open() {
            flags |= abi::STREAM_GAP;
        }
        if state.bad_consumer {
            flags |= abi::STREAM_BAD_CONSUMER;
        }
        if state.policy == abi::POLICY_THROTTLE && self.delay(&mut state).is_some() {
            flags |= abi::STREAM_THROTTLING;
        }
        let head_bytes = self.head.bytes() as u64;
        let devices = state.lanes.iter().filter(|lane| lane.is_some()).count();
        let counters = &state.counters;
        abi::StreamStatus {
            stream_id: self.id,
            flags,
            name: self.name,
            stream_uuid: self.uuid,
            policy: state.policy,
            desc_count: self.desc_count,
            payload_bytes: self.payload_bytes,
            desc_offset: abi::PAGE_BYTES as u64,
            payload_offset: head_bytes,
            ring_bytes: head_bytes + self.payload_bytes,
            next_seq: state.ring.next_seq(),
            committed: state.ring.committed(),
            released: state.ring.released(),
            epoch: state.epoch,
            used_bytes: state.ring.used_bytes(),
            sync_bytes: state.ring.sync_bytes(),
            sync_bytes_max: state.ring.sync_bytes_max(),
            gaps: counters.gaps,
            gap_changes: counters.gap_changes,
            gap_sectors: counters.gap_sectors,
            room_waits: counters.room_waits,
            room_wait_ns: counters.room_wait_ns,
            room_wait_ns_max: counters.room_wait_ns_max,
            wakeups: counters.wakeups,
            bad_releases: counters.bad_releases,
            devices: devices as u32,
            throttle_start: state.throttle.start,
            throttle_stop: state.throttle.stop,
            throttle_delay_ms: state.throttle.delay_ms,
            throttles: counters.throttles,
            throttle_ns: counters.throttle_ns,
            throttle_ns_max: counters.throttle_ns_max,
            reserved: [0; 4],
        }
    }

    /// Ends with `EIO` what applications wait for on `device`: the changes whose data was copied
    /// go on to the backing device, but nobody waits for them any more.
    pub(crate) fn fail_outstanding(&self, device: &Device) {
        self.wake_everybody();
        for parking in self.parking.iter() {
            let parked = {
                let _state = self.state.lock();
                parking.take_if(device.id())
            };
            if let Some((bio, started)) = parked {
                bio.end_accounted(started, EIO.into());
            }
        }
    }
}

/// How a change ended; see [`Stream::complete`].
pub(crate) struct Completion<'a> {
    pub(crate) device: &'a Device,
    pub(crate) slot: SlotId,
    /// Its record, if it has one.
    pub(crate) seq: Option<u64>,
    /// The record's flags.
    pub(crate) flags: u16,
    pub(crate) errno: u8,
    pub(crate) start: u64,
    pub(crate) sectors: u64,
    pub(crate) dirty: bool,
    pub(crate) clean: bool,
    pub(crate) closes_epoch: bool,
}

fn range_of(state: &mut State, device: &Device, request: &Request) -> GateRange {
    if request.sectors == 0 {
        let key = (u64::from(LANE_FLUSH) << LANE_SHIFT) | state.next_flush;
        state.next_flush = state.next_flush.wrapping_add(1) & ((1 << LANE_SHIFT) - 1);
        return GateRange {
            start: key,
            end: key.wrapping_add(1),
        };
    }
    device_range(device, request.start, request.sectors)
}

fn device_range(device: &Device, start: u64, sectors: u64) -> GateRange {
    // Lanes and sectors are so small that nothing wraps.
    let start = (u64::from(device.lane()) << LANE_SHIFT).wrapping_add(start);
    GateRange {
        start,
        end: start.wrapping_add(sectors),
    }
}

/// `EINVAL` for a policy that does not exist.
fn check_policy(policy: u32) -> Result {
    match policy {
        abi::POLICY_TRACK | abi::POLICY_BLOCK | abi::POLICY_THROTTLE => Ok(()),
        _ => Err(EINVAL),
    }
}

/// `EINVAL` unless a name has at least `least` bytes, is zero-filled to its end, and is made of
/// `[A-Za-z0-9_.-]`.
pub(crate) fn check_name(name: &[u8; abi::NAME_BYTES], least: usize) -> Result {
    let length = name.iter().position(|byte| *byte == 0).ok_or(EINVAL)?;
    let (text, rest) = name.split_at_checked(length).ok_or(EINVAL)?;
    let good = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-".contains(byte);
    if length < least || !text.iter().all(good) || rest.iter().any(|byte| *byte != 0) {
        return Err(EINVAL);
    }
    Ok(())
}

/// A vector of `count` values.
pub(crate) fn filled<T>(count: usize, value: impl Fn() -> T) -> Result<KVVec<T>> {
    let mut values = KVVec::with_capacity(count, GFP_KERNEL)?;
    for _ in 0..count {
        values.push(value(), GFP_KERNEL)?;
    }
    Ok(values)
}
