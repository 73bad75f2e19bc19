// SPDX-License-Identifier: GPL-2.0-only

//! The write-intent map of a stream: changes wait for marks, a worker writes them, the consumer has them cleared.
//!
//! ```text
//!  change ── region safe? ── yes ─────────────────────────────────> gate, ring
//!               │ no                                                  ^
//!               └─ want the mark, queue the worker, sleep ── safe ────┘
//!  worker: all marks wanted meanwhile ── one write, FUA ── safe, wake everybody
//! ```
//!
//! # Why waiting for a mark can not deadlock
//!
//! A change that waits here holds nothing that others wait for: no slot of the gate, no place in the ring. (It holds a
//! bio of the stream's first set; whoever waits for one of those waits for changes at the gate or for this, and this
//! ends.) The worker has a rescuer thread and a bio of its own, and writes to a disk that is none of ours, so it needs
//! neither memory nor any change to end.
//!
//! # When the file can not be written
//!
//! Changes do not wait for a disk that fails, nor longer than [`PATIENCE_MS`] for one that hangs: from then on they go ahead
//! without marks. The file is voided if that can still be written; the state says [`abi::INTENT_FAILED`], and the consumer has
//! to remember that the marks are not to be relied on. Only if the disk of the intent file fails, nobody is there to
//! remember it, and the machine crashes as well, would a later start rely on a file that lacks marks.

use super::{State, Stream};
use crate::{
    abi,
    device::Device,
    ffi::{
        time,
        wait::{Sleep, Woken},
        work,
    },
    intent::CHUNK_BYTES,
    intent_store::{Map, Store, Wish},
};
use kernel::{prelude::*, sync::Arc, workqueue::WorkItem};

/// Longest time that a change waits for its mark, in milliseconds: longer than a disk's own retries usually take, far below
/// what applications and the hung-task detector bear.
const PATIENCE_MS: u64 = 10_000;

/// How long a change sleeps at a time, in milliseconds.
const RECHECK_MS: u32 = 1000;

/// Chunks that are written at once.
const BATCH: usize = 64;

/// Rounds of the worker before it lets others use its thread.
const TURNS: usize = 64;

/// Words of a map that are looked at with the lock held when marks are cleared: 256 regions, each of which may take
/// sixteen words of the dirty map.
const WORDS_PER_STEP: usize = 4;

/// Words of a map that are looked at with the lock held when only they are looked at.
const WORDS_PER_LOOK: usize = 4096;

/// What [`Stream::set_intents`] is asked for.
pub(crate) struct IntentWish {
    pub(crate) fd: i32,
    pub(crate) format: bool,
    pub(crate) region_bytes: u32,
    pub(crate) hot_max: u32,
    pub(crate) idle_ms: u32,
    pub(crate) source: [u8; 16],
}

/// What the mutex guards.
pub(super) struct Intents {
    store: Store,
    hot_max: u32,
    idle_ms: u32,
    /// The stream's position at the end of the last round of clearing, and when that was.
    round_end: u64,
    round_ns: u64,
}

impl WorkItem for Stream {
    type Pointer = Arc<Stream>;

    fn run(stream: Arc<Stream>) {
        if stream.write_marks() {
            stream.queue_worker();
        }
    }
}

impl Stream {
    /// Gives the stream its intent file; see [`abi::StreamIntent`]. Gives `FOUND_*`. `devices` are those in the table
    /// at a moment after [`Stream::joined`] gave `joined`.
    ///
    /// `EAGAIN` while another one is being attached. That one may have looked for an intent file before this one was
    /// there, and its changes would go unmarked. Who joins once the mutex is held looks after it.
    pub(crate) fn set_intents(
        self: &Arc<Self>,
        wish: &IntentWish,
        devices: &[Arc<Device>],
        joined: u32,
    ) -> Result<u32> {
        let region_bytes = match wish.region_bytes {
            0 => abi::REGION_BYTES_DEFAULT,
            bytes => bytes,
        };
        let sizes = abi::REGION_BYTES_MIN..=abi::REGION_BYTES_MAX;
        if !region_bytes.is_power_of_two() || !sizes.contains(&region_bytes) {
            return Err(EINVAL);
        }
        let mut guard = self.intents.lock();
        if guard.is_some() {
            return Err(EBUSY);
        }
        if !self.state.lock().are_all(devices, joined) {
            return Err(EAGAIN);
        }
        let mut store = Store::open(&Wish {
            fd: wish.fd,
            format: wish.format,
            shift: region_bytes.ilog2() - abi::SECTOR_BYTES.ilog2(),
            source: wish.source,
            set: self.name,
            stream: self.uuid,
        })?;
        let joined = devices.iter().try_for_each(|device| {
            let Some((mut map, slot, _)) = self.join_store(
                &mut store,
                device.label(),
                device.identity(),
                device.sectors(),
            )?
            else {
                return Ok(());
            };
            // Nobody has kept marks so far.
            map.mark_all();
            self.place_map(device.lane(), Some((slot, map)));
            Ok::<_, Error>(())
        });
        let begun = joined
            .and_then(|()| self.write_batches(&mut store).map(|_| ()))
            // Last: until then the file is nobody's.
            .and_then(|()| store.begin());
        if let Err(e) = begun {
            for device in devices {
                self.place_map(device.lane(), None);
            }
            return Err(e);
        }
        let found = store.found();
        let or = |value, default| if value == 0 { default } else { value };
        let intents = Intents {
            store,
            hot_max: or(wish.hot_max, abi::HOT_REGIONS_DEFAULT),
            idle_ms: or(wish.idle_ms, abi::INTENT_IDLE_MS_DEFAULT),
            round_end: u64::MAX,
            round_ns: time::monotonic_ns(),
        };
        self.show(&intents);
        *guard = Some(intents);
        self.state.lock().intent_on = true;
        Ok(found)
    }

    /// Gives the intent file back: the stream is being destroyed, and has no devices.
    pub(crate) fn close_intents(&self) {
        self.state.lock().intent_on = false;
        let intents = self.intents.lock().take();
        drop(intents);
    }

    /// Puts the map of a lane in its place, and drops the former one; drops that of a device which has left.
    fn place_map(&self, lane: u32, map: Option<(u32, KBox<Map>)>) {
        let former = {
            let mut state = self.state.lock();
            let is_taken = matches!(state.lanes.get(lane as usize), Some(Some(_)));
            match state.maps.get_mut(lane as usize) {
                Some(place) if is_taken => core::mem::replace(place, map),
                _ => map,
            }
        };
        // Outside the lock: freeing may sleep.
        drop(former);
    }

    /// Finds the marks of a device that joins; gives `FOUND_*`. Before its disk is there.
    pub(crate) fn join_intents(
        &self,
        lane: u32,
        label: &[u8; abi::NAME_BYTES],
        identity: &[u8; 16],
        sectors: u64,
    ) -> Result<u32> {
        let mut guard = self.intents.lock();
        let Some(intents) = (*guard).as_mut() else {
            return Ok(abi::FOUND_NONE);
        };
        let Some((map, slot, found)) =
            self.join_store(&mut intents.store, label, identity, sectors)?
        else {
            return Ok(abi::FOUND_NONE);
        };
        self.place_map(lane, Some((slot, map)));
        Ok(found)
    }

    fn join_store(
        &self,
        store: &mut Store,
        label: &[u8; abi::NAME_BYTES],
        identity: &[u8; 16],
        sectors: u64,
    ) -> Result<Option<(KBox<Map>, u32, u32)>> {
        store.join(*label, *identity, sectors, |slot| {
            let state = self.state.lock();
            let mut maps = state.maps.iter().flatten();
            maps.any(|(taken, _)| *taken == slot)
        })
    }

    /// The device has another size; its gate is closed.
    pub(crate) fn resize_intents(&self, lane: u32, sectors: u64) -> Result {
        let mut guard = self.intents.lock();
        let Some(intents) = (*guard).as_mut() else {
            return Ok(());
        };
        let slot = {
            let state = self.state.lock();
            match state.maps.get(lane as usize) {
                Some(Some((slot, _))) => *slot,
                _ => return Ok(()),
            }
        };
        let mut map = intents.store.resized(slot, sectors)?;
        let former = {
            let mut state = self.state.lock();
            let place = state.maps.get_mut(lane as usize).and_then(Option::as_mut);
            place.map(|place| {
                // As long as nobody writes the file, which the mutex sees to.
                map.take_over(&place.1);
                core::mem::replace(&mut place.1, map)
            })
        };
        drop(former);
        Ok(())
    }

    /// Has the status say what the store knows: asking must not wait for a disk that hangs.
    fn show(&self, intents: &Intents) {
        let mut status = abi::IntentStatus::default();
        intents.store.status(&mut status);
        status.hot_max = intents.hot_max;
        status.idle_ms = intents.idle_ms;
        self.state.lock().intent_status = status;
    }

    // -----------------------------------------------------------------------------------------
    // Marks
    // -----------------------------------------------------------------------------------------

    /// Asks for the regions of a range to be marked; true: they are, or marks do not matter.
    #[cold]
    pub(super) fn ask_for_mark(
        &self,
        device: &Device,
        start: u64,
        sectors: u64,
        first_try: bool,
    ) -> bool {
        let safe = {
            let mut state = self.state.lock();
            let on = state.intent_on;
            match state.maps.get_mut(device.lane() as usize) {
                Some(Some((_, map))) if on => map.mark(start, sectors, first_try),
                _ => true,
            }
        };
        if !safe {
            device.stream_ref().queue_worker();
        }
        safe
    }

    fn queue_worker(self: &Arc<Self>) {
        if let Some(queue) = work::io_queue() {
            // Refused when it is queued already: it looks at the marks after that.
            drop(queue.enqueue(self.clone()));
        }
    }

    /// Waits until the regions of a range are marked, or marks do not matter any more.
    #[cold]
    pub(super) fn wait_for_mark(&self, device: &Device, start: u64, sectors: u64) {
        let since = time::monotonic_ns();
        let mut safe = self.ask_for_mark(device, start, sectors, true);
        let mut waited = 0;
        while !safe && waited < PATIENCE_MS * 1_000_000 {
            let woken = self
                .intent_wait
                .wait(Sleep::Uninterruptible, RECHECK_MS, || {
                    // It asks each time: one of its marks may have been taken away while it waited for another.
                    let safe = self.ask_for_mark(device, start, sectors, false);
                    (safe || device.is_failing()).then_some(())
                });
            safe = matches!(woken, Woken::Ready(()));
            waited = time::monotonic_ns().saturating_sub(since);
        }
        if !safe {
            self.give_up_marks("its disk did not answer in time");
        }
        let counters = &mut self.state.lock().counters;
        counters.intent_wait_ns = counters.intent_wait_ns.saturating_add(waited);
        counters.intent_wait_ns_max = counters.intent_wait_ns_max.max(waited);
    }

    /// From here on changes do not wait for marks.
    #[cold]
    fn give_up_marks(&self, why: &str) {
        {
            let mut state = self.state.lock();
            if state.intent_failed || !state.intent_on {
                return;
            }
            state.intent_on = false;
            state.intent_failed = true;
        }
        pr_err!(
            "stream {}: the intent file can not be written, {why}: changes go on without marks, and after a crash the whole devices have to be compared\n",
            self.id
        );
        self.intent_wait.wake_all();
        if self.state.lock().consumer {
            self.readable.notify_all();
        }
    }

    /// Writes the marks that are wanted. True: there are more.
    fn write_marks(&self) -> bool {
        let mut guard = self.intents.lock();
        let Some(intents) = (*guard).as_mut() else {
            return false;
        };
        let result = self.write_batches(&mut intents.store);
        self.show(intents);
        if result.is_err() {
            self.give_up_marks("its disk failed a write");
        }
        if self.state.lock().intent_failed {
            // Perhaps it can be written again by now; nobody relies on it.
            let _voided = intents.store.void();
            return false;
        }
        matches!(result, Ok(true))
    }

    /// Writes batch after batch. True: there are more.
    fn write_batches(&self, store: &mut Store) -> Result<bool> {
        for _ in 0..TURNS {
            let mut batch = [(0_u32, 0_usize); BATCH];
            let mut count = 0;
            let mut at = (0, 0);
            while let Some(place) = batch.get_mut(count) {
                let mut bits = [0; CHUNK_BYTES];
                let Some((begun, marks)) = self.begin_chunk(at, &mut bits) else {
                    break;
                };
                *place = begun;
                count += 1;
                at = (begun.0, begun.1 + 1);
                store.put_marks(marks.place, marks.slot, begun.1 as u32, marks.acked, &bits);
            }
            if count == 0 {
                return Ok(false);
            }
            let result = store.flush();
            {
                let mut state = self.state.lock();
                for (lane, chunk) in batch.iter().take(count) {
                    if let Some(Some((_, map))) = state.maps.get_mut(*lane as usize) {
                        map.written(*chunk, result.is_ok());
                    }
                }
            }
            self.intent_wait.wake_all();
            result?;
        }
        Ok(true)
    }

    /// Begins to write the next chunk behind `at` that needs it.
    fn begin_chunk(
        &self,
        at: (u32, usize),
        bits: &mut [u8; CHUNK_BYTES],
    ) -> Option<((u32, usize), Marks)> {
        let mut state = self.state.lock();
        let (first, mut from) = at;
        for lane in first..state.maps.len() as u32 {
            if let Some(Some((slot, map))) = state.maps.get_mut(lane as usize) {
                if let Some(chunk) = map.begin_write(from, bits) {
                    let marks = Marks {
                        place: map.place(chunk),
                        slot: *slot,
                        acked: map.acked(),
                    };
                    return Some(((lane, chunk), marks));
                }
            }
            from = 0;
        }
        None
    }

    // -----------------------------------------------------------------------------------------
    // The consumer's side
    // -----------------------------------------------------------------------------------------

    /// See [`abi::IntentClear`].
    pub(crate) fn clear_intents(
        self: &Arc<Self>,
        mut request: abi::IntentClear,
    ) -> Result<abi::IntentClear> {
        // The worker may be waiting for a disk that hangs; nothing is lost by coming again.
        let mut guard = self.intents.try_lock().ok_or(EAGAIN)?;
        let intents = (*guard).as_mut().ok_or(ENOENT)?;
        let (committed, failed, marked) = {
            let state = self.state.lock();
            (state.ring.committed(), state.intent_failed, marked(&state))
        };
        if request.acked > committed {
            return Err(EINVAL);
        }
        let now = time::monotonic_ns();
        let idle = now.saturating_sub(intents.round_ns) >= u64::from(intents.idle_ms) * 1_000_000;
        let hot = marked > u64::from(intents.hot_max);
        if intents.round_end == u64::MAX {
            // There is none before the first one.
            self.begin_round(intents, now);
        } else if request.acked >= intents.round_end && (idle || hot) && !failed {
            self.clear_round(intents, request.acked)?;
            self.begin_round(intents, now);
            self.queue_worker();
        }
        request.version = intents.store.version();
        request.marked = marked;
        Ok(request)
    }

    fn begin_round(&self, intents: &mut Intents, now: u64) {
        intents.round_end = self.state.lock().ring.next_seq();
        intents.round_ns = now;
    }

    /// A round of clearing; see `intent.rs`. The stream's position behind it is the end of the round.
    fn clear_round(&self, intents: &mut Intents, acked: u64) -> Result {
        intents.store.trim()?;
        let lanes = self.state.lock().maps.len();
        for lane in 0..lanes {
            let mut at = Some(0);
            while let Some(from) = at {
                let mut state = self.state.lock();
                at = clear_step(&mut state, lane, from, acked);
            }
        }
        let counters = &mut self.state.lock().counters;
        counters.intent_rounds = counters.intent_rounds.wrapping_add(1);
        Ok(())
    }

    /// The next suspect regions of a device: see [`abi::IOC_SUSPECT_NEXT`].
    pub(crate) fn next_suspect(&self, device: &Device, from: u64) -> Result<(u64, u64)> {
        let mut from = from;
        loop {
            let found = {
                let state = self.state.lock();
                match state.maps.get(device.lane() as usize) {
                    Some(Some((_, map))) => map.next_suspect(from, WORDS_PER_LOOK),
                    _ => return Err(ENOENT),
                }
            };
            match found {
                Ok(run) => return Ok(run),
                Err(None) => return Err(ENOENT),
                Err(Some(next)) => from = next,
            }
        }
    }

    /// See [`abi::IOC_SUSPECT_CLEAR`].
    pub(crate) fn clear_suspect(&self, device: &Device, start: u64, sectors: u64) -> Result {
        self.each_step(device, start, sectors, Map::settle)
    }

    /// See [`abi::IOC_SUSPECT_SET`].
    pub(crate) fn set_suspect(&self, device: &Device, start: u64, sectors: u64) -> Result {
        self.each_step(device, start, sectors, Map::suspect)
    }

    fn each_step(
        &self,
        device: &Device,
        start: u64,
        sectors: u64,
        step: impl Fn(&mut Map, u64, u64),
    ) -> Result {
        /// Sectors that are looked at with the lock held: 16 Ki regions of the smallest size, one of the largest.
        const STEP: u64 = 1 << crate::intent::SHIFT_MAX;

        let end = start
            .checked_add(sectors)
            .filter(|end| *end <= device.sectors())
            .ok_or(ERANGE)?;
        let mut at = start;
        while at < end {
            // Steps begin and end with regions of any size.
            let length = (STEP - at % STEP).min(end - at);
            let mut state = self.state.lock();
            match state.maps.get_mut(device.lane() as usize) {
                Some(Some((_, map))) => step(map, at, length),
                _ => return Err(ENOENT),
            }
            at += length;
        }
        Ok(())
    }

    /// Marked and suspect regions of a device.
    pub(crate) fn regions(&self, device: &Device) -> (u64, u64) {
        match self.state.lock().maps.get(device.lane() as usize) {
            Some(Some((_, map))) => (map.marked(), map.suspects()),
            _ => (0, 0),
        }
    }

    /// Everything about the intent map.
    pub(crate) fn intent_status(&self) -> abi::IntentStatus {
        let state = self.state.lock();
        let mut status = abi::IntentStatus {
            stream_id: self.id,
            ..state.intent_status
        };
        if state.intent_on {
            status.flags |= abi::INTENT_ON;
        }
        if state.intent_failed {
            status.flags |= abi::INTENT_FAILED;
        }
        for (_, map) in state.maps.iter().flatten() {
            status.marked = status.marked.wrapping_add(map.marked());
            status.suspect = status.suspect.wrapping_add(map.suspects());
            status.misses = status.misses.wrapping_add(map.misses());
        }
        status.hits = state.counters.intent_hits;
        status.wait_ns = state.counters.intent_wait_ns;
        status.wait_ns_max = state.counters.intent_wait_ns_max;
        status.rounds = state.counters.intent_rounds;
        status.cleared = state.counters.intent_cleared;
        status
    }
}

impl State {
    /// Whether `devices`, who were in the table after the number of those who had ever joined was `joined`, are all who
    /// have a lane. A lane's former owner left the table before the lane was free, so nobody is taken for another.
    fn are_all(&self, devices: &[Arc<Device>], joined: u32) -> bool {
        let known = |lane: usize| devices.iter().any(|device| device.lane() as usize == lane);
        let mut lanes = self.lanes.iter().enumerate();
        self.next_device == joined && lanes.all(|(lane, taken)| taken.is_none() || known(lane))
    }
}

/// Where the marks of a chunk belong.
struct Marks {
    place: u32,
    slot: u32,
    acked: u64,
}

/// Marked regions of all devices.
fn marked(state: &State) -> u64 {
    let maps = state.maps.iter().flatten();
    maps.map(|(_, map)| map.marked()).sum()
}

/// Clears marks of some words of the map in `lane`; gives where to go on.
fn clear_step(state: &mut State, lane: usize, from: usize, acked: u64) -> Option<usize> {
    let dirty = state.lanes.get(lane).and_then(Option::as_ref);
    let Some(Some((_, map))) = state.maps.get_mut(lane) else {
        return None;
    };
    let before = map.marked();
    let next = map.clear_step(from, WORDS_PER_STEP, acked, |start, sectors| {
        dirty.is_some_and(|dirty| dirty.count() != 0 && dirty.any(start, sectors))
    });
    let gone = before.wrapping_sub(map.marked());
    state.counters.intent_cleared = state.counters.intent_cleared.wrapping_add(gone);
    next
}
