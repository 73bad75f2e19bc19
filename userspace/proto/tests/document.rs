// SPDX-License-Identifier: GPL-2.0-only

//! `PROTOCOL.md` says what the code does: numbers and names of its tables.

use dtloop_proto::header::MessageType;
use dtloop_proto::{Code, message, packed};

const PAGE: &str = include_str!("../../PROTOCOL.md");

/// Whether a row of a table begins like that.
fn has_row(begin: &str) -> bool {
    PAGE.lines().any(|line| line.starts_with(begin))
}

#[test]
fn every_type_of_message_is_described_under_its_number() {
    for message_type in MessageType::ALL {
        let (number, name) = (*message_type as u16, format!("{message_type:?}"));
        let described = match number {
            // The handshake and Packed have headings of their own.
            1..=3 | 0x13 | 0x14 => {
                let number = if number < 0x10 {
                    format!("type {number}")
                } else {
                    format!("type {number:#04x}")
                };
                PAGE.lines()
                    .any(|line| line.contains(&name) && line.contains(&number))
                    || has_row(&format!("## {name}s ({number}"))
            }
            4 | 5 => has_row(&format!("| {number} | {name} |")),
            _ => has_row(&format!("| {number:#04x} | {name} |")),
        };
        assert!(described, "{number:#04x} {name}");
    }
}

#[test]
fn every_code_is_listed_and_what_passes_by_itself() {
    let page = PAGE.replace('\n', " ");
    let (_, list) = page.split_once("Codes: ").expect("a list");
    let (list, rest) = list.split_once(" A number").expect("its end");
    let listed: Vec<&str> = list
        .trim_end_matches('.')
        .split(", ")
        .map(str::trim)
        .collect();
    let known: Vec<String> = Code::ALL
        .iter()
        .map(|code| format!("{} {code}", code.0))
        .collect();
    assert_eq!(listed, known);
    let (_, passing) = rest.split_once("`Bye` with ").expect("what passes");
    let (passing, _) = passing.split_once(" passes").expect("its end");
    let passing: Vec<u16> = passing
        .replace(" or ", ", ")
        .split(", ")
        .map(|number| number.parse().expect("a number"))
        .collect();
    let known: Vec<u16> = Code::ALL
        .iter()
        .filter(|code| code.is_passing())
        .map(|code| code.0)
        .collect();
    assert_eq!(passing, known);
}

#[test]
fn every_option_is_listed() {
    for (key, name) in [
        (message::OPTION_LINEAGE, "lineage"),
        (message::OPTION_CHAIN, "chain"),
        (message::OPTION_UNCHAINED, "unchained"),
        (packed::OPTION_CODECS, "codecs"),
        (message::OPTION_IN_PLACE, "in place"),
        (message::OPTION_STAGING, "staging"),
    ] {
        assert!(has_row(&format!("| {key} {name} |")), "{key} {name}");
    }
}
