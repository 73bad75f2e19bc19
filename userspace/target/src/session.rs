// SPDX-License-Identifier: GPL-2.0-only

//! A connection: handshake, then frames into the journal.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use dtloop_core::binding::Refusal;
use dtloop_core::chain::Link;
use dtloop_core::sequence::{Arrival, Hole, Sequencer};
use dtloop_core::set::Admission;
use dtloop_journal::{AppendError, BatchInfo, Position};
use dtloop_pack::Unpacker;
use dtloop_proto::frame::FrameError;
use dtloop_proto::header::HEADER_BYTES;
use dtloop_proto::limits::{BODY_BYTES_MAX, FRAME_BYTES_MAX};
use dtloop_proto::message::{
    HandshakeOption, Hello, OPTION_CHAIN, OPTION_IN_PLACE, Refuse, Welcome, bounded_text,
};
use dtloop_proto::packed::OPTION_CODECS;
use dtloop_proto::{Code, Codec, Decoded, Frame, Message, frame};
use dtloop_runtime::TcpStream;

use crate::applier::{Batch, Command, Durable, Item};
use crate::journal::JournalError;
use crate::outlet::Part;
use crate::replica::{Replica, Writer};
use crate::server::Shared;
use crate::strangers::Ticket;
use crate::transport::Connection;
use crate::unpack::{self, RunError};

/// Longest time for the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A source sends at least a ping in this time, or it is gone.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Pause before the journal is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// While it waits for the journal, the source hears that the target lives; longer than its time to a ping.
const ALIVE_EVERY: Duration = Duration::from_secs(7);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    /// The connection.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The source closed it.
    #[error("the source closed the connection")]
    Closed,
    /// The source said why.
    #[error("the source left: {0}")]
    Bye(String),
    /// It sent what is no frame.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// It sent a compressed run that is none.
    #[error("{0}")]
    Run(#[from] RunError),
    /// It left records out.
    #[error("{0}")]
    Hole(#[from] Hole),
    /// It sent a frame that has no place here.
    #[error("frame {0} has no place here")]
    Unexpected(&'static str),
    /// It was refused.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// The journal.
    #[error("{0}: {cause}", cause = journal_cause(.0))]
    Journal(#[from] JournalError),
    /// The set is being closed.
    #[error("the target ends")]
    Stopping,
}

fn append_cause(error: &AppendError) -> String {
    match error {
        AppendError::Io { source, .. } => source.to_string(),
        AppendError::Full { .. } | AppendError::Space { .. } => "no room".to_owned(),
    }
}

fn journal_cause(error: &JournalError) -> String {
    match error {
        JournalError::Append(error) => append_cause(error),
        JournalError::Stopped => "it was waiting for room".to_owned(),
    }
}

impl SessionEnd {
    /// What the source is told, if it makes sense to tell it anything.
    fn farewell(&self) -> Option<Refuse> {
        let code = match self {
            Self::Io(_) | Self::Closed | Self::Bye(_) => return None,
            Self::Frame(_) | Self::Run(_) | Self::Unexpected(_) => Code::MALFORMED,
            Self::Hole(_) => Code::SEQUENCE_HOLE,
            Self::Refused(refusal) => refusal.code,
            Self::Journal(JournalError::Append(_)) => Code::JOURNAL_IO,
            Self::Journal(JournalError::Stopped) | Self::Stopping => Code::SHUTTING_DOWN,
        };
        Some(Refuse {
            code,
            text: bounded_text(self.to_string()),
        })
    }
}

/// Bounds the time of each read and write before the hello; the ticket of a stranger bounds all of it.
///
/// # Errors
///
/// Those of the socket.
pub fn bound_handshake(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
    stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT))
}

/// Serves a connection to its end.
pub fn serve(shared: &Arc<Shared>, mut connection: Connection, peer: SocketAddr, ticket: Ticket) {
    let turned_away = |connection: &mut Connection, end: &SessionEnd| {
        shared.strangers.log(peer, end);
        refuse(connection, end);
        connection.dismiss();
    };
    let first = match receive_first(&mut connection) {
        Ok(first) => first,
        Err(end) => return turned_away(&mut connection, &end),
    };
    let (trust, pin) = (shared.trust.as_ref(), connection.pin());
    let hello = match (first, trust, pin) {
        (Message::Pair(pair), Some(trust), Some(pin)) if connection.pairs() => {
            match trust.pair(pin, &pair, shared.target_id) {
                Ok(paired) => {
                    say(&mut connection, &Message::Paired(paired));
                    connection.dismiss();
                }
                Err(refusal) => turned_away(&mut connection, &refusal.into()),
            }
            return;
        }
        (Message::Hello(hello), ..) if !connection.pairs() => hello,
        _ => return turned_away(&mut connection, &SessionEnd::Unexpected("before Hello")),
    };
    let guest = match (trust, pin) {
        (Some(trust), Some(pin)) => match trust.admit(&connection, pin, hello.source_id) {
            Ok(guest) => Some(guest),
            Err(refusal) => return turned_away(&mut connection, &refusal.into()),
        },
        (Some(_), None) => return,
        (None, _) => None,
    };
    drop(ticket);
    connection.expect_much();
    let name = guest.as_ref().map_or("", |guest| &guest.name);
    let (set, source) = (hello.set.clone(), hello.source_id);
    let who = format!("Set \"{set}\" of source {source} {name} at {peer}");
    match receive(shared, connection, hello) {
        end @ (SessionEnd::Closed
        | SessionEnd::Bye(_)
        | SessionEnd::Stopping
        | SessionEnd::Io(_)) => {
            tracing::info!("{who} is disconnected: {end}.");
        }
        // It may come again and again, as long as the reason lasts.
        end @ SessionEnd::Refused(_) => shared
            .strangers
            .complain(&format!("{who} was refused: {end}.")),
        end => {
            tracing::error!("{who} is disconnected: {end}.");
        }
    }
}

fn say(connection: &mut Connection, message: &Message) {
    let mut out = vec![];
    if frame::encode_message(&mut out, 0, 0, message).is_ok() {
        // The peer may be gone, which is as good.
        let _ = connection.write_all(&out);
    }
}

fn refuse(connection: &mut Connection, end: &SessionEnd) {
    if let Some(refuse) = end.farewell() {
        say(connection, &Message::Refuse(refuse));
    }
}

/// The first message of a connection.
fn receive_first(connection: &mut Connection) -> Result<Message, SessionEnd> {
    let mut buffer = Vec::with_capacity(1024);
    let mut needed = HEADER_BYTES;
    loop {
        let have = buffer.len();
        buffer.resize(needed, 0);
        connection.read_exact(&mut buffer[have..])?;
        match dtloop_proto::decode(&buffer)? {
            // Nobody who has not said hello makes this program hold more than a body.
            Decoded::Incomplete { needed: more } if more <= HEADER_BYTES + BODY_BYTES_MAX => {
                needed = more;
            }
            Decoded::Incomplete { .. } => return Err(SessionEnd::Unexpected("with a payload")),
            Decoded::Complete {
                frame: Frame::Message(message),
                ..
            } => return Ok(message),
            Decoded::Complete { .. } => return Err(SessionEnd::Unexpected("before Hello")),
        }
    }
}

fn receive(shared: &Arc<Shared>, mut connection: Connection, hello: Hello) -> SessionEnd {
    let Some(version) = dtloop_proto::choose_version(hello.version_min, hello.version_max) else {
        let text = format!(
            "The source speaks protocol versions {} to {}, this target {} to {}; update the older side",
            hello.version_min,
            hello.version_max,
            dtloop_proto::VERSION_MIN,
            dtloop_proto::VERSION_MAX
        );
        let end = Refusal::new(Code::VERSION, text).into();
        refuse(&mut connection, &end);
        return end;
    };
    let in_place = hello
        .options
        .iter()
        .any(|option| option.key == OPTION_IN_PLACE);
    let opened = shared
        .replica(hello.source_id, &hello.set, in_place)
        .and_then(|replica| {
            if in_place {
                // Before the set is taken over: who has it may be waiting for just this.
                replica.give_up_stage();
            }
            let other = connection.try_clone();
            other
                .map(|other| (replica, other))
                .map_err(|error| Refusal::new(Code::INTERNAL, error.to_string()))
        });
    let (replica, other) = match opened {
        Ok(opened) => opened,
        Err(refusal) => {
            let end = refusal.into();
            refuse(&mut connection, &end);
            return end;
        }
    };
    let mut writer = replica.take_over(other);
    let Some(writer) = writer.as_mut() else {
        return SessionEnd::Stopping;
    };
    let mut session = match welcome(shared, writer, &replica, &mut connection, hello, version) {
        Ok(session) => session,
        Err(end) => {
            refuse(&mut connection, &end);
            return end;
        }
    };
    let end = loop {
        if let Err(end) = session.turn(&mut connection, writer) {
            break end;
        }
    };
    writer.stash.append(&mut session.spare);
    if let Some(farewell) = end.farewell() {
        replica.outlet.send(&Message::Bye(farewell));
    }
    replica.outlet.disconnect();
    connection.shutdown();
    end
}

fn welcome(
    shared: &Arc<Shared>,
    writer: &mut Writer,
    replica: &Arc<Replica>,
    connection: &mut Connection,
    hello: Hello,
    version: u16,
) -> Result<Session, SessionEnd> {
    let durable = Durable {
        stream_uuid: writer.stream_uuid,
        seq: writer.sequence.next() - 1,
    };
    let (reply, answer) = channel();
    let stream_uuid = hello.stream_uuid;
    let set = hello.set.clone();
    let enter = Command::Enter {
        hello: Box::new(hello),
        durable,
        reply,
    };
    let gone = || {
        let text = format!("Set \"{set}\" is no longer applied; look at the log of dttarget");
        Refusal::new(Code::INTERNAL, text)
    };
    // While a disk fails, the applier answers with the reason. It may have taken up the stream by then; whoever comes next goes
    // on with that.
    dtloop_runtime::send(&writer.commands, enter).map_err(|_| gone())?;
    let entered = dtloop_runtime::receive(&answer).map_err(|_| gone())??;
    if let Admission::Hole { from, to } = entered.admission {
        tracing::error!(
            "Set \"{set}\": records {from} to {} are lost; a mirror is needed.",
            to - 1
        );
    }
    // Also where it goes on: an attempt before this one may have taken up the stream without anybody being told.
    writer.sequence = Sequencer::new(entered.next_seq);
    writer.stream_uuid = stream_uuid;
    let id = shared.next_session();
    // Of a hole, the source learns where it begins.
    let told = match entered.admission {
        Admission::Hole { from, .. } => from - 1,
        _ => entered.next_seq - 1,
    };
    replica
        .outlet
        .update(|ack| ack.durable_seq = writer.sequence.next() - 1);
    let mut options = vec![HandshakeOption {
        key: OPTION_CODECS,
        value: Codec::ALL.iter().map(|codec| *codec as u8).collect(),
    }];
    options.extend(entered.staging.option());
    options.extend(entered.link.map(chain_option));
    let welcome = Welcome {
        version,
        software: crate::software(),
        target_id: shared.target_id,
        session: id,
        known_stream: entered.known_stream,
        durable_seq: told,
        applied_seq: told,
        lost_from: entered.lost.0,
        lost_last: entered.lost.1,
        volumes: entered.volumes,
        options,
    };
    let mut out = vec![];
    frame::encode_message(&mut out, 0, 0, &Message::Welcome(welcome))?;
    frame::encode_message(&mut out, id, 0, &Message::Past(entered.past))?;
    connection.set_timeouts(SILENCE_MAX, SILENCE_MAX)?;
    connection.write_all(&out)?;
    replica.outlet.connect(connection.try_clone()?, id);
    tracing::info!(
        "Set \"{set}\" is connected; it goes on at record {}.",
        writer.sequence.next()
    );
    // Comes behind everything that was there before, and before what this connection brings.
    dtloop_runtime::send(&writer.commands, Command::Welcomed).map_err(|_| gone())?;
    let spare = std::mem::take(&mut writer.stash);
    Ok(Session {
        id,
        replica: Arc::clone(replica),
        have: 0,
        unparsed: false,
        spare,
        unpacker: Unpacker::default(),
    })
}

/// Everything received is applied when a source is welcomed, so the link is that of the last durable record.
fn chain_option(link: Link) -> HandshakeOption {
    HandshakeOption {
        key: OPTION_CHAIN,
        value: link.to_vec(),
    }
}

struct Session {
    id: u64,
    replica: Arc<Replica>,
    /// Bytes in the buffer: the beginning of a frame whose rest has not come.
    have: usize,
    /// There are whole frames among them.
    unparsed: bool,
    /// Buffers that are at hand; the last one holds the bytes.
    spare: Vec<Batch>,
    unpacker: Unpacker,
}

/// What a buffer held.
struct Parsed {
    /// Bytes of whole frames.
    used: usize,
    /// Those that go to the journal, as ranges of the buffer.
    runs: Vec<(usize, usize)>,
    info: BatchInfo,
    /// Whole frames are left in the buffer.
    unparsed: bool,
    /// The next of them is a compressed run.
    packed: bool,
    /// Frames that are not journaled, and are no duplicates.
    others: u32,
    bye: Option<String>,
}

impl Session {
    /// Reads what has come, journals it, acknowledges it and passes it on.
    fn turn(&mut self, connection: &mut Connection, writer: &mut Writer) -> Result<(), SessionEnd> {
        let mut batch = self.take_buffer(writer)?;
        let unparsed = std::mem::take(&mut self.unparsed);
        let read = if unparsed {
            Ok(None)
        } else {
            connection.read(&mut batch.buffer[self.have..]).map(Some)
        };
        let parsed = match read {
            Ok(None) => self.parse(&mut batch, self.have, writer),
            Ok(Some(0)) => Err(SessionEnd::Closed),
            Ok(Some(bytes)) => {
                self.have += bytes;
                self.parse(&mut batch, self.have, writer)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                self.spare.push(batch);
                return Ok(());
            }
            Err(error) => Err(error.into()),
        };
        let parsed = match parsed {
            Ok(parsed) => parsed,
            Err(end) => {
                batch.items.clear();
                self.spare.push(batch);
                return Err(if self.replica.is_stopping() {
                    SessionEnd::Stopping
                } else {
                    end
                });
            }
        };
        if parsed.packed {
            return self.turn_packed(batch, writer);
        }
        let bye = parsed.bye.clone();
        self.pass_on(batch, &parsed, writer)?;
        bye.map_or(Ok(()), |text| Err(SessionEnd::Bye(text)))
    }

    /// Waits for the applier when no buffer is at hand: nothing is read before there is room.
    fn take_buffer(&mut self, writer: &Writer) -> Result<Batch, SessionEnd> {
        match self.spare.pop() {
            Some(batch) => Ok(batch),
            None => dtloop_runtime::receive(&writer.buffers).map_err(|_| SessionEnd::Stopping),
        }
    }

    /// Unpacks the compressed runs that a buffer begins with into another one, which then goes on as if its frames had
    /// come plain.
    fn turn_packed(&mut self, mut wire: Batch, writer: &mut Writer) -> Result<(), SessionEnd> {
        let mut plain = match self.take_buffer(writer) {
            Ok(plain) => plain,
            Err(end) => {
                self.spare.push(wire);
                return Err(end);
            }
        };
        let have = &wire.buffer[..self.have];
        let parsed = unpack::unpack(&mut self.unpacker, self.id, have, &mut plain.buffer)
            .map_err(SessionEnd::from)
            .and_then(|run| Ok((run, self.parse_run(&mut plain, run.raw, writer)?)));
        let (run, parsed) = match parsed {
            Ok(parsed) => parsed,
            Err(end) => {
                plain.items.clear();
                // Both stay with the set, whatever a source sends.
                self.spare.extend([plain, wire]);
                return Err(end);
            }
        };
        wire.buffer.copy_within(run.used..self.have, 0);
        let rest = self.have - run.used;
        self.have = run.raw;
        let passed = self.pass_on(plain, &parsed, writer);
        self.have = rest;
        self.unparsed = rest > 0;
        self.spare.push(wire);
        passed
    }

    /// The frames of an unpacked run: whole ones, of the kinds that are journaled.
    fn parse_run(
        &mut self,
        plain: &mut Batch,
        raw: usize,
        writer: &mut Writer,
    ) -> Result<Parsed, SessionEnd> {
        let parsed = self.parse(plain, raw, writer)?;
        let foreign = parsed.unparsed || parsed.packed || parsed.bye.is_some();
        if parsed.used != raw || foreign || parsed.others > 0 {
            return Err(SessionEnd::Unexpected("in a compressed run"));
        }
        Ok(parsed)
    }

    fn parse(
        &mut self,
        batch: &mut Batch,
        have: usize,
        writer: &mut Writer,
    ) -> Result<Parsed, SessionEnd> {
        let first_seq = writer.sequence.next();
        let mut sequence = writer.sequence;
        let mut digest = crc32fast::Hasher::new();
        let info = BatchInfo {
            frames: 0,
            digest: 0,
            first_seq,
            next_seq: first_seq,
        };
        let mut parsed = Parsed {
            used: 0,
            runs: vec![],
            info,
            unparsed: false,
            packed: false,
            others: 0,
            bye: None,
        };
        let have = &batch.buffer[..have];
        while parsed.bye.is_none() {
            let at = parsed.used;
            let (header, frame, bytes) = match dtloop_proto::decode(&have[at..])? {
                Decoded::Incomplete { .. } => break,
                Decoded::Complete {
                    header,
                    frame,
                    bytes,
                } => (header, frame, bytes),
            };
            if header.session != self.id {
                return Err(SessionEnd::Unexpected("of another session"));
            }
            let item = match frame {
                Frame::Record {
                    kind,
                    body,
                    payload,
                } => match sequence.arrive(header.seq)? {
                    Arrival::Duplicate => None,
                    Arrival::Next => {
                        let payload = (at + bytes - payload.len(), at + bytes);
                        Some(Item::Record {
                            seq: header.seq,
                            kind,
                            body,
                            payload,
                        })
                    }
                },
                Frame::Message(Message::Marker(marker)) => {
                    sequence.marker(header.seq)?;
                    Some(Item::Marker {
                        position: header.seq,
                        marker,
                    })
                }
                Frame::Packed(_) => {
                    // It needs a buffer of its own, so what came before it is passed on first.
                    parsed.packed = at == 0;
                    parsed.unparsed = at > 0;
                    break;
                }
                Frame::Message(Message::Bind(offer)) => {
                    parsed.others += 1;
                    // What came before it is journaled first: the applier takes both in order.
                    if parsed.info.frames > 0 {
                        parsed.unparsed = true;
                        break;
                    }
                    dtloop_runtime::send(&writer.commands, Command::Bind(offer))
                        .map_err(|_| SessionEnd::Stopping)?;
                    None
                }
                Frame::Message(Message::Ping(number)) => {
                    parsed.others += 1;
                    self.replica.outlet.send(&Message::Pong(number));
                    None
                }
                Frame::Message(Message::Pong(_)) => {
                    parsed.others += 1;
                    None
                }
                Frame::Message(Message::Bye(refuse)) => {
                    parsed.bye = Some(refuse.text);
                    None
                }
                Frame::Message(_) => return Err(SessionEnd::Unexpected("of this type")),
            };
            if let Some(item) = item {
                digest.update(&have[at..at + HEADER_BYTES]);
                parsed.info.frames += 1;
                batch.items.push(item);
                match parsed.runs.last_mut() {
                    Some(run) if run.1 == at => run.1 = at + bytes,
                    _ => parsed.runs.push((at, at + bytes)),
                }
            }
            parsed.used += bytes;
        }
        parsed.info.digest = digest.finalize();
        parsed.info.next_seq = sequence.next();
        Ok(parsed)
    }

    /// Journals the frames of a buffer, acknowledges them and gives them to the applier. What is
    /// left, the beginning of a frame, moves to the next buffer.
    fn pass_on(
        &mut self,
        mut batch: Batch,
        parsed: &Parsed,
        writer: &mut Writer,
    ) -> Result<(), SessionEnd> {
        let rest = self.have - parsed.used;
        self.unparsed = parsed.unparsed;
        if parsed.info.frames == 0 {
            batch.buffer.copy_within(parsed.used..self.have, 0);
            self.have = rest;
            debug_assert!(self.unparsed || rest < FRAME_BYTES_MAX);
            self.spare.push(batch);
            return Ok(());
        }
        let runs: Vec<&[u8]> = parsed
            .runs
            .iter()
            .map(|(start, end)| &batch.buffer[*start..*end])
            .collect();
        match self.append(&runs, parsed.info, writer) {
            Ok(end) => batch.end = end,
            Err(end) => {
                batch.items.clear();
                self.spare.push(batch);
                return Err(end);
            }
        }
        batch.bytes = runs.iter().map(|run| run.len() as u64).sum();
        writer.sequence = Sequencer::new(parsed.info.next_seq);
        self.replica
            .outlet
            .update(|ack| ack.durable_seq = parsed.info.next_seq - 1);
        self.replica.outlet.send_ack();
        if rest > 0 {
            let mut next =
                dtloop_runtime::receive(&writer.buffers).map_err(|_| SessionEnd::Stopping)?;
            next.buffer[..rest].copy_from_slice(&batch.buffer[parsed.used..self.have]);
            self.spare.push(next);
        }
        self.have = rest;
        dtloop_runtime::send(&writer.commands, Command::Batch(batch))
            .map_err(|_| SessionEnd::Stopping)
    }

    /// Appends to the journal. While its disk fails or is full, the source is held back and told why.
    fn append(
        &self,
        frames: &[&[u8]],
        info: BatchInfo,
        writer: &mut Writer,
    ) -> Result<Position, SessionEnd> {
        let appended = self.append_at_last(frames, info, writer);
        // Whoever comes next finds out anew.
        let outlet = &self.replica.outlet;
        outlet.relent(Part::Journal, "The journal can be written again");
        appended
    }

    fn append_at_last(
        &self,
        frames: &[&[u8]],
        info: BatchInfo,
        writer: &mut Writer,
    ) -> Result<Position, SessionEnd> {
        let (mut told, takeovers) = (None::<Instant>, self.replica.takeovers());
        loop {
            let error = match writer.journal.append(frames, info, writer.stream_uuid) {
                Ok(end) => return Ok(end),
                Err(JournalError::Append(error)) => error,
                Err(stopped) => return Err(stopped.into()),
            };
            match told {
                None => {
                    let cause = append_cause(&error);
                    let text = format!(
                        "{error}: {cause}; the source waits, it is tried again every second, nothing is lost"
                    );
                    tracing::error!("{text}.");
                    let outlet = &self.replica.outlet;
                    outlet.complain(Part::Journal, Code::JOURNAL_IO, text);
                    told = Some(dtloop_runtime::now());
                }
                Some(at) if dtloop_runtime::elapsed(at) >= ALIVE_EVERY => {
                    self.replica.outlet.send_ack();
                    told = Some(dtloop_runtime::now());
                }
                Some(_) => {}
            }
            let until = dtloop_runtime::now() + RETRY_AFTER;
            while dtloop_runtime::now() < until {
                if self.replica.is_stopping() || self.replica.takeovers() != takeovers {
                    return Err(SessionEnd::Stopping);
                }
                dtloop_runtime::sleep(RETRY_AFTER / 20);
            }
        }
    }
}
