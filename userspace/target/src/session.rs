// SPDX-License-Identifier: GPL-2.0-only

//! A connection: handshake, then frames into the journal.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use dtloop_core::binding::Refusal;
use dtloop_core::chain::Link;
use dtloop_core::sequence::{Arrival, Hole, Sequencer};
use dtloop_core::set::Admission;
use dtloop_proto::frame::FrameError;
use dtloop_proto::header::HEADER_BYTES;
use dtloop_proto::limits::{BODY_BYTES_MAX, FRAME_BYTES_MAX};
use dtloop_proto::message::{HandshakeOption, Hello, OPTION_CHAIN, Refuse, Welcome, bounded_text};
use dtloop_proto::{Code, Decoded, Frame, Message, frame};

use crate::applier::{Batch, Command, Item};
use crate::door::Place;
use crate::journal::{BatchInfo, JournalError};
use crate::replica::{Replica, Writer};
use crate::server::Shared;
use crate::transport::Connection;

/// Longest time for the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A source sends at least a ping in this time, or it is gone.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// How often it is looked whether the applier, which a new session waits for, is held up.
const TROUBLE_TICK: Duration = Duration::from_millis(500);

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

fn journal_cause(error: &JournalError) -> String {
    match error {
        JournalError::Io { source, .. } => source.to_string(),
        JournalError::Stopped => String::new(),
    }
}

impl SessionEnd {
    /// What the source is told, if it makes sense to tell it anything.
    fn farewell(&self) -> Option<Refuse> {
        let code = match self {
            Self::Io(_) | Self::Closed | Self::Bye(_) => return None,
            Self::Frame(_) | Self::Unexpected(_) => Code::MALFORMED,
            Self::Hole(_) => Code::SEQUENCE_HOLE,
            Self::Refused(refusal) => refusal.code,
            Self::Journal(JournalError::Io { .. }) => Code::JOURNAL_IO,
            Self::Journal(JournalError::Stopped) | Self::Stopping => Code::SHUTTING_DOWN,
        };
        Some(Refuse {
            code,
            text: bounded_text(self.to_string()),
        })
    }
}

/// Serves a connection to its end; it gives its place at the door up when it has said hello.
pub fn serve(shared: &Arc<Shared>, mut connection: Connection, place: Place) {
    let peer = connection
        .peer()
        .map_or_else(|_| "an unknown peer".to_owned(), |peer| peer.to_string());
    let hello = match receive_hello(&mut connection) {
        Ok(hello) => hello,
        Err(end) => {
            shared
                .door
                .complain(&format!("{peer} was not understood: {end}."));
            refuse(&mut connection, &end);
            return;
        }
    };
    drop(place);
    let (set, source) = (hello.set.clone(), hello.source_id);
    match receive(shared, connection, hello) {
        end @ (SessionEnd::Closed
        | SessionEnd::Bye(_)
        | SessionEnd::Stopping
        | SessionEnd::Io(_)) => {
            tracing::info!("Set \"{set}\" of source {source} at {peer} is disconnected: {end}.");
        }
        // It may come again and again, as long as the reason lasts.
        end @ SessionEnd::Refused(_) => shared.door.complain(&format!(
            "Set \"{set}\" of source {source} at {peer} was refused: {end}."
        )),
        end => {
            tracing::error!("Set \"{set}\" of source {source} at {peer} is disconnected: {end}.");
        }
    }
}

fn refuse(connection: &mut Connection, end: &SessionEnd) {
    if let Some(refuse) = end.farewell() {
        let mut out = vec![];
        if frame::encode_message(&mut out, 0, 0, &Message::Refuse(refuse)).is_ok() {
            // The peer may be gone, which is as good.
            let _ = connection.write_all(&out);
        }
    }
}

fn receive_hello(connection: &mut Connection) -> Result<Hello, SessionEnd> {
    connection.set_timeouts(HANDSHAKE_TIMEOUT, HANDSHAKE_TIMEOUT)?;
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
                frame: Frame::Message(Message::Hello(hello)),
                ..
            } => return Ok(hello),
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
    let opened = shared
        .replica(hello.source_id, &hello.set)
        .and_then(|replica| {
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
    writer.stash = session.spare.take();
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
    let durable_seq = writer.sequence.next() - 1;
    let (reply, answer) = channel();
    let (stream_uuid, first_seq) = (hello.stream_uuid, hello.first_seq);
    let set = hello.set.clone();
    let enter = Command::Enter {
        hello: Box::new(hello),
        durable_seq,
        reply,
    };
    let gone = || {
        let text = format!("Set \"{set}\" is no longer applied; look at the log of dttarget");
        Refusal::new(Code::INTERNAL, text)
    };
    // A disk that fails holds the applier up for as long as it does. The source learns that, instead of waiting.
    let no_trouble = || match replica.outlet.present_trouble() {
        Some(notice) => Err(Refusal::new(notice.code, notice.text)),
        None => Ok(()),
    };
    no_trouble()?;
    writer.commands.send(enter).map_err(|_| gone())?;
    let entered = loop {
        match answer.recv_timeout(TROUBLE_TICK) {
            Ok(entered) => break entered?,
            Err(RecvTimeoutError::Timeout) => no_trouble()?,
            Err(RecvTimeoutError::Disconnected) => return Err(gone().into()),
        }
    };
    match entered.admission {
        Admission::Resume => {}
        Admission::NewStream => writer.sequence = Sequencer::new(first_seq),
        Admission::Hole { from, to } => {
            tracing::error!(
                "Set \"{set}\": records {from} to {} are lost; a mirror is needed.",
                to - 1
            );
            writer.sequence = Sequencer::new(to);
        }
    }
    writer.stream_uuid = stream_uuid;
    let id = shared.next_session();
    // For a new stream everything is applied; what is durable is told in the terms of the old one.
    let told = if entered.admission == Admission::NewStream {
        first_seq - 1
    } else {
        durable_seq
    };
    replica
        .outlet
        .update(|ack| ack.durable_seq = writer.sequence.next() - 1);
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
        options: chain_option(entered.link),
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
    writer
        .commands
        .send(Command::Welcomed)
        .map_err(|_| gone())?;
    let spare = writer.stash.take();
    Ok(Session {
        id,
        replica: Arc::clone(replica),
        have: 0,
        unparsed: false,
        spare,
    })
}

/// Everything received is applied when a source is welcomed, so the link is that of the last durable record.
fn chain_option(link: Option<Link>) -> Vec<HandshakeOption> {
    let option = |link: Link| HandshakeOption {
        key: OPTION_CHAIN,
        value: link.to_vec(),
    };
    link.map(option).into_iter().collect()
}

struct Session {
    id: u64,
    replica: Arc<Replica>,
    /// Bytes in the buffer: the beginning of a frame whose rest has not come.
    have: usize,
    /// There are whole frames among them.
    unparsed: bool,
    spare: Option<Batch>,
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
    bye: Option<String>,
}

impl Session {
    /// Reads what has come, journals it, acknowledges it and passes it on.
    fn turn(&mut self, connection: &mut Connection, writer: &mut Writer) -> Result<(), SessionEnd> {
        let mut batch = match self.spare.take() {
            Some(batch) => batch,
            // Waits for the applier: nothing is read before there is room.
            None => writer.buffers.recv().map_err(|_| SessionEnd::Stopping)?,
        };
        let unparsed = std::mem::take(&mut self.unparsed);
        let read = if unparsed {
            Ok(None)
        } else {
            connection.read(&mut batch.buffer[self.have..]).map(Some)
        };
        let parsed = match read {
            Ok(None) => self.parse(&mut batch, writer),
            Ok(Some(0)) => Err(SessionEnd::Closed),
            Ok(Some(bytes)) => {
                self.have += bytes;
                self.parse(&mut batch, writer)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                self.spare = Some(batch);
                return Ok(());
            }
            Err(error) => Err(error.into()),
        };
        let parsed = match parsed {
            Ok(parsed) => parsed,
            Err(end) => {
                batch.items.clear();
                self.spare = Some(batch);
                return Err(if self.replica.is_stopping() {
                    SessionEnd::Stopping
                } else {
                    end
                });
            }
        };
        let bye = parsed.bye.clone();
        self.pass_on(batch, &parsed, writer)?;
        bye.map_or(Ok(()), |text| Err(SessionEnd::Bye(text)))
    }

    fn parse(&mut self, batch: &mut Batch, writer: &mut Writer) -> Result<Parsed, SessionEnd> {
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
            bye: None,
        };
        let have = &batch.buffer[..self.have];
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
                Frame::Message(Message::Bind(offer)) => {
                    // What came before it is journaled first: the applier takes both in order.
                    if parsed.info.frames > 0 {
                        parsed.unparsed = true;
                        break;
                    }
                    writer
                        .commands
                        .send(Command::Bind(offer))
                        .map_err(|_| SessionEnd::Stopping)?;
                    None
                }
                Frame::Message(Message::Ping(number)) => {
                    self.replica.outlet.send(&Message::Pong(number));
                    None
                }
                Frame::Message(Message::Pong(_)) => None,
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
            debug_assert!(rest < FRAME_BYTES_MAX);
            self.spare = Some(batch);
            return Ok(());
        }
        let runs: Vec<&[u8]> = parsed
            .runs
            .iter()
            .map(|(start, end)| &batch.buffer[*start..*end])
            .collect();
        match writer
            .journal
            .append(&runs, parsed.info, writer.stream_uuid)
        {
            Ok(end) => batch.end = end,
            Err(error) => {
                batch.items.clear();
                self.spare = Some(batch);
                return Err(error.into());
            }
        }
        batch.bytes = runs.iter().map(|run| run.len() as u64).sum();
        writer.sequence = Sequencer::new(parsed.info.next_seq);
        self.replica
            .outlet
            .update(|ack| ack.durable_seq = parsed.info.next_seq - 1);
        self.replica.outlet.send_ack();
        if rest > 0 {
            let mut next = writer.buffers.recv().map_err(|_| SessionEnd::Stopping)?;
            next.buffer[..rest].copy_from_slice(&batch.buffer[parsed.used..self.have]);
            self.spare = Some(next);
        }
        self.have = rest;
        writer
            .commands
            .send(Command::Batch(batch))
            .map_err(|_| SessionEnd::Stopping)
    }
}
