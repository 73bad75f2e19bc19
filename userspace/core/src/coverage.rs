// SPDX-License-Identifier: GPL-2.0-only

//! Whether the marks of the source's intent map hold everything in which a device may differ from its volume.
//!
//! They do if four things meet:
//!
//! 1. The target's volume was equal to the device but for records and blocks that were still to come: it was mirrored, in a
//!    stream that the marks cover without a gap.
//! 2. The target still has everything that it once said it has: marks were taken away because of that.
//! 3. The file is the newest one: it was written at least as often as the target was told.
//! 4. File and device are what they were.
//!
//! Then comparing the marked regions is enough. Else the whole device is compared, and the reason is said.

use dtloop_proto::Uuid;
use dtloop_proto::message::Past;

/// A stream whose changes the marks cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// The stream.
    pub stream: Uuid,
    /// Marks were taken away because the target had everything below this record.
    pub acked: u64,
}

/// What the kernel says of the intent map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Why they are not to be relied on, whichever device it is about.
    pub broken: Option<String>,
    /// Version of the file on disk.
    pub version: u64,
    /// A version that this machine has seen on disk before, and remembers elsewhere; 0: none.
    pub seen: u64,
    /// The streams that they cover.
    pub bases: Vec<Base>,
}

impl Marks {
    /// Whether the marks of a device, about which the file itself has nothing against (`device`: else what it has), are
    /// enough for a target with this past.
    ///
    /// # Errors
    ///
    /// The reason for which the whole device must be compared.
    pub fn cover(&self, past: &Past, id: u32, device: Result<(), String>) -> Result<(), String> {
        if let Some(reason) = &self.broken {
            return Err(reason.clone());
        }
        device?;
        if past.stream.is_none() {
            return Err("the target knows nothing of the set".to_owned());
        }
        if !past.mirrored.contains(&id) {
            return Err("its mirror was not complete on the target".to_owned());
        }
        let Some(base) = self.bases.iter().find(|base| base.stream == past.stream) else {
            return Err(
                "the intent file does not go back to what the target has; one of them is an older copy"
                    .to_owned(),
            );
        };
        if past.durable_seq + 1 < base.acked {
            return Err(format!(
                "the target has lost records that it once had ({} of {}); its state is an older copy",
                past.durable_seq,
                base.acked - 1
            ));
        }
        let newest = past.intent_version.max(self.seen);
        if self.version < newest {
            return Err(format!(
                "the intent file is an older copy (version {}, there was {newest} already)",
                self.version
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: Uuid = Uuid([1; 16]);

    fn marks() -> Marks {
        Marks {
            broken: None,
            version: 9,
            seen: 9,
            bases: vec![Base {
                stream: STREAM,
                acked: 100,
            }],
        }
    }

    fn past() -> Past {
        Past {
            stream: STREAM,
            durable_seq: 99,
            intent_version: 9,
            mirrored: vec![1],
        }
    }

    #[test]
    fn an_older_file_is_known_by_whoever_has_seen_a_newer_one() {
        let older = Marks {
            seen: 10,
            ..marks()
        };
        let reason = older.cover(&past(), 1, Ok(())).unwrap_err();
        assert!(reason.contains("older copy (version 9"), "{reason}");
        let told = Past {
            intent_version: 10,
            ..past()
        };
        assert_eq!(marks().cover(&told, 1, Ok(())), Err(reason));
    }

    #[test]
    fn marks_that_fit_are_enough() {
        assert_eq!(marks().cover(&past(), 1, Ok(())), Ok(()));
    }

    #[test]
    fn every_doubt_has_its_reason() {
        let reason = |marks: Marks, past: Past, id| marks.cover(&past, id, Ok(())).unwrap_err();
        let broken = Marks {
            broken: Some("void".into()),
            ..marks()
        };
        assert_eq!(reason(broken, past(), 1), "void");
        let device = marks().cover(&past(), 1, Err("damaged".into()));
        assert_eq!(device, Err("damaged".into()));
        assert!(reason(marks(), past(), 2).contains("not complete"));
        let unknown = Past {
            stream: Uuid([2; 16]),
            ..past()
        };
        assert!(reason(marks(), unknown, 1).contains("older copy"));
        let nothing = Past {
            stream: Uuid::NONE,
            ..past()
        };
        assert!(reason(marks(), nothing, 1).contains("knows nothing"));
        let less = Past {
            durable_seq: 98,
            ..past()
        };
        assert!(reason(marks(), less, 1).contains("98 of 99"));
        let newer = Past {
            intent_version: 10,
            ..past()
        };
        assert!(reason(marks(), newer, 1).contains("version 9"));
    }
}
