// SPDX-License-Identifier: GPL-2.0-only

//! Whom a volume belongs to. A volume follows one device of one set of one source; whoever else
//! offers a device for it is refused before anything is changed.

use dtloop_proto::limits::SECTOR_BYTES;
use dtloop_proto::message::DeviceOffer;
use dtloop_proto::{Code, Uuid};
use serde::{Deserialize, Serialize};

/// The owner of a volume, as kept beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The source.
    #[serde(with = "crate::uuid_text")]
    pub source_id: Uuid,
    /// Its set.
    pub set: String,
    /// The label of its device; the volume's own name.
    pub label: String,
    /// The volume was settled for use on the target: the source may not overwrite it.
    #[serde(default)]
    pub released: bool,
}

/// A refusal: the code for programs, the text for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// Reason.
    pub code: Code,
    /// Reason and next step.
    pub text: String,
}

impl Refusal {
    /// A refusal of that code.
    #[must_use]
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }
}

/// Whether a device may be bound to the volume that is bound to `bound` and is `volume_bytes` long.
///
/// # Errors
///
/// The refusal to be sent to the source.
pub fn admit(
    source_id: Uuid,
    set: &str,
    offer: &DeviceOffer,
    bound: Option<&Binding>,
    volume_bytes: u64,
) -> Result<Binding, Refusal> {
    let wanted = Binding {
        source_id,
        set: set.to_owned(),
        label: offer.label.clone(),
        released: false,
    };
    if bound.is_some_and(|bound| bound.released) {
        return Err(released(&offer.label));
    }
    if let Some(bound) = bound.filter(|bound| **bound != wanted) {
        return Err(Refusal::new(
            Code::FOREIGN_SOURCE,
            format!(
                "Volume \"{}\" belongs to set \"{}\" of source {}; run \"dttarget volume unbind {}\" on the \
                 target if that is over",
                offer.label, bound.set, bound.source_id, offer.label
            ),
        ));
    }
    let device_bytes = offer.sectors.saturating_mul(SECTOR_BYTES);
    if volume_bytes < device_bytes {
        return Err(Refusal::new(
            Code::VOLUME_TOO_SMALL,
            format!(
                "Volume \"{}\" has {volume_bytes} bytes, the device has {device_bytes}; make the volume larger",
                offer.label
            ),
        ));
    }
    Ok(wanted)
}

/// The refusal for a device whose volume was settled.
#[must_use]
pub fn released(label: &str) -> Refusal {
    let text = format!(
        "Volume \"{label}\" was settled to be used on the target; if the source may overwrite it, run \"dttarget volume \
         unbind {label}\" there"
    );
    Refusal::new(Code::VOLUME_BUSY, text)
}

/// The refusal for a device without a label, or with one that another device of the set has.
///
/// # Errors
///
/// The refusal to be sent to the source.
pub fn check_label(offer: &DeviceOffer, all: &[DeviceOffer]) -> Result<(), Refusal> {
    if offer.label.is_empty() {
        return Err(Refusal::new(
            Code::LABEL_MISSING,
            format!(
                "Device {} has no volume name; attach it again with one",
                offer.device
            ),
        ));
    }
    if all
        .iter()
        .any(|other| other.device != offer.device && other.label == offer.label)
    {
        return Err(Refusal::new(
            Code::LABEL_TWICE,
            format!(
                "Two devices of the set are named \"{}\"; attach one again with another name",
                offer.label
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(sectors: u64) -> DeviceOffer {
        DeviceOffer {
            device: 1,
            label: "vol".into(),
            sectors,
            block_bytes: 512,
        }
    }

    #[test]
    fn the_first_source_owns_the_volume() {
        let (one, two) = (Uuid([1; 16]), Uuid([2; 16]));
        let bound = admit(one, "db", &offer(8), None, 4096).unwrap();
        assert_eq!(
            admit(one, "db", &offer(8), Some(&bound), 4096).as_ref(),
            Ok(&bound)
        );
        let refused = |source, set| {
            admit(source, set, &offer(8), Some(&bound), 4096)
                .unwrap_err()
                .code
        };
        let settled = Binding {
            released: true,
            ..bound.clone()
        };
        let error = admit(one, "db", &offer(8), Some(&settled), 4096).unwrap_err();
        assert_eq!(error.code, Code::VOLUME_BUSY);
        assert_eq!(refused(two, "db"), Code::FOREIGN_SOURCE);
        assert_eq!(refused(one, "other"), Code::FOREIGN_SOURCE);
    }

    #[test]
    fn a_smaller_volume_is_refused() {
        let error = admit(Uuid([1; 16]), "db", &offer(9), None, 4096).unwrap_err();
        assert_eq!(error.code, Code::VOLUME_TOO_SMALL);
        assert!(error.text.contains("4096") && error.text.contains("4608"));
    }

    #[test]
    fn labels_must_be_there_and_differ() {
        let nameless = DeviceOffer {
            label: String::new(),
            ..offer(8)
        };
        assert_eq!(
            check_label(&nameless, &[]).unwrap_err().code,
            Code::LABEL_MISSING
        );
        let twin = DeviceOffer {
            device: 2,
            ..offer(8)
        };
        assert_eq!(
            check_label(&offer(8), &[offer(8), twin]).unwrap_err().code,
            Code::LABEL_TWICE
        );
        assert_eq!(check_label(&offer(8), &[offer(8)]), Ok(()));
    }
}
