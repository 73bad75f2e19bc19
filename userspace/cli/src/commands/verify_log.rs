// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop verify --log`: what verifications found, with the states of both sides.

use dtloop_api::{ClientError, Outcome, Request, VerifyEntry, VerifyEvent};

use super::Context;
use crate::exit::Code;
use crate::{clock, output};

pub(crate) fn run(context: &Context<'_>, set: &str, most: usize) -> anyhow::Result<Code> {
    let set = set.to_owned();
    let mut agent = context.agent()?;
    let answer = agent.request(&Request::VerifyLog { set, most })?;
    let Outcome::VerifyLog(entries) = answer.finish(|_| ())? else {
        return Err(ClientError::Unexpected.into());
    };
    if context.global.json {
        output::json(&entries)?;
        return Ok(Code::Done);
    }
    let mut text: String = entries.iter().map(line).collect();
    if text.is_empty() {
        text += "Nothing was verified yet.\n";
    }
    output::text(&text)?;
    Ok(Code::Done)
}

fn line(entry: &VerifyEntry) -> String {
    let when = clock::text(entry.unix_ms);
    let range = || format!("at byte {}, {} bytes", entry.start, entry.bytes);
    let hash = |hash: &Option<String>| hash.clone().unwrap_or_else(|| "nothing".to_owned());
    let what = match entry.event {
        VerifyEvent::Begins => format!("verification {} begins: {}", entry.job, entry.text),
        VerifyEvent::Differs => format!(
            "differs {}, compared at record {}\n    source {}\n    target {}",
            range(),
            entry.seq,
            hash(&entry.source),
            hash(&entry.target)
        ),
        VerifyEvent::Repaired => format!("repaired {}, by record {}", range(), entry.seq),
        VerifyEvent::Confirmed => format!(
            "equal again {}, compared at record {}\n    both   {}",
            range(),
            entry.seq,
            hash(&entry.source)
        ),
        VerifyEvent::Identical => format!("identical: {}", entry.text),
        VerifyEvent::EndsDifferent => format!("NOT identical: {}", entry.text),
        VerifyEvent::EndsEarly => format!("ended early: {}", entry.text),
    };
    format!("{when} {}: {what}\n", entry.label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_states_are_shown() {
        let entry = VerifyEntry {
            label: "vol".into(),
            start: 4096,
            bytes: 512,
            seq: 7,
            source: Some("aa".into()),
            target: None,
            ..VerifyEntry::new(0, 3, VerifyEvent::Differs)
        };
        let text = line(&entry);
        let (_, text) = text.split_once(" vol: ").unwrap();
        assert_eq!(
            text,
            "differs at byte 4096, 512 bytes, compared at record 7\n    source aa\n    target nothing\n"
        );
    }
}
