// SPDX-License-Identifier: GPL-2.0-only

//! Numeric conditions that cross the wire. The number is the contract, the text beside it is for people.

use std::fmt;

use bincode::{Decode, Encode};

/// A condition. Numbers that this version does not know are kept and shown as such.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Code(pub u16);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        impl Code {
            $($(#[$doc])* pub const $name: Self = Self($number);)*

            /// A stable lower-case name for scripts, if this version knows the number.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some($text),)*
                    _ => None,
                }
            }

            /// Every code this version knows.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

codes! {
    /// All is well.
    OK = 0, "ok";
    /// No protocol version that both sides speak.
    VERSION = 1, "version-mismatch";
    /// A frame that cannot be understood.
    MALFORMED = 2, "malformed";
    /// The volume or the set belongs to another source, or the source is not one that the target knows.
    FOREIGN_SOURCE = 3, "foreign-source";
    /// The source is older than what the target has already seen of it.
    OLDER_GENERATION = 4, "older-generation";
    /// The target has no volume of that name.
    VOLUME_NOT_FOUND = 5, "volume-not-found";
    /// The volume is smaller than the device.
    VOLUME_TOO_SMALL = 6, "volume-too-small";
    /// The volume is mounted or in other use.
    VOLUME_BUSY = 7, "volume-busy";
    /// The volume cannot be read or written.
    VOLUME_IO = 8, "volume-io";
    /// No space to write the volume.
    VOLUME_FULL = 9, "volume-full";
    /// The journal cannot be written.
    JOURNAL_IO = 10, "journal-io";
    /// A record is missing.
    SEQUENCE_HOLE = 11, "sequence-hole";
    /// A newer connection of the same set took over.
    SUPERSEDED = 12, "superseded";
    /// The peer ends for now.
    SHUTTING_DOWN = 13, "shutting-down";
    /// A fault of the program itself.
    INTERNAL = 14, "internal";
    /// The device carries no label, so no volume can be found for it.
    LABEL_MISSING = 15, "label-missing";
    /// The target holds more of this stream than the source ever made.
    TARGET_AHEAD = 16, "target-ahead";
    /// The stream or its volumes changed and must be mirrored.
    MIRROR_NEEDED = 17, "mirror-needed";
    /// Two devices of one set carry the same label.
    LABEL_TWICE = 18, "label-twice";
    /// What the target remembers of the set is damaged.
    STATE_DAMAGED = 19, "state-damaged";
    /// The staging area has no space, or cannot be written.
    STAGING = 20, "staging";
    /// The volume is another file or disk than the one that was followed.
    VOLUME_REPLACED = 21, "volume-replaced";
    /// The volume was changed by something else than the target.
    VOLUME_CHANGED = 22, "volume-changed";
    /// What the target holds does not come from this source's past.
    UNRELATED = 23, "unrelated-data";
}

impl Code {
    /// Whether trying again later, without anybody doing anything, can help.
    #[must_use]
    pub fn is_passing(self) -> bool {
        matches!(
            self,
            Self::SUPERSEDED
                | Self::SHUTTING_DOWN
                | Self::INTERNAL
                | Self::JOURNAL_IO
                | Self::VOLUME_IO
                | Self::VOLUME_FULL
                | Self::STAGING
        )
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "code-{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_unique() {
        for (index, code) in Code::ALL.iter().enumerate() {
            assert_eq!(usize::from(code.0), index);
            for other in &Code::ALL[index + 1..] {
                assert_ne!(code.name(), other.name());
            }
        }
        assert_eq!(Code(999).to_string(), "code-999");
    }
}
