// SPDX-License-Identifier: GPL-2.0-only

//! Journals, state files, configurations, and the lines of the control socket.

use std::io::BufReader;

use dtloop_api::{Reply, Request, read_line, write_line};
use dtloop_core::replica::SetMemory;
use dtloop_core::set::SetState;
use dtloop_journal::layout::{
    BATCH_HEADER_BYTES, BatchHeader, SEGMENT_HEADER_BYTES, SegmentHeader,
};
use dtloop_proto::Uuid;
use dtloop_proto::message::is_name;
use dtloop_target::applier::Saved;

/// A segment's header or a batch's, with its checksum made right if the first byte says so.
pub(crate) fn journal(data: &[u8]) {
    let Some(([mode, segment, block], data)) = data.split_first_chunk() else {
        return;
    };
    let (number, offset) = (u64::from(*segment), u64::from(*block) * 4096);
    let mut block = Box::new([0; SEGMENT_HEADER_BYTES]);
    let bytes = data.len().min(block.len());
    block[..bytes].copy_from_slice(&data[..bytes]);
    if mode & 1 == 0 {
        let crc = crc32fast::hash(&block[12..]);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(header) = SegmentHeader::parse(&block) {
        let again = SegmentHeader::parse(&header.pack()).unwrap();
        assert_eq!(again, header);
    }
    let mut head = [0; BATCH_HEADER_BYTES];
    head.copy_from_slice(&block[..BATCH_HEADER_BYTES]);
    if mode & 1 == 0 {
        let crc = crc32fast::hash(&head[8..]);
        head[4..8].copy_from_slice(&crc.to_le_bytes());
    }
    let segment = segment_header(number);
    if let Some(header) = BatchHeader::parse(&head, &segment, offset) {
        let packed = header.pack();
        assert_eq!(BatchHeader::parse(&packed, &segment, offset), Some(header));
        // It belongs nowhere else.
        assert!(BatchHeader::parse(&packed, &segment, offset + 4096).is_none());
        assert!(BatchHeader::parse(&packed, &segment_header(number + 1), offset).is_none());
        let salt = segment.salt + 1;
        let reused = SegmentHeader { salt, ..segment };
        assert!(BatchHeader::parse(&packed, &reused, offset).is_none());
    }
}

fn segment_header(number: u64) -> SegmentHeader {
    SegmentHeader {
        number,
        bytes: 16 << 20,
        owner: Uuid([1; 16]),
        stream_uuid: Uuid([2; 16]),
        first_seq: 100,
        index_offset: 0,
        salt: 0x5a17,
    }
}

pub(crate) fn journal_seeds() -> Vec<(String, Vec<u8>)> {
    let segment = segment_header(3);
    let batch = BatchHeader {
        segment: 3,
        offset: 4096,
        bytes: 4000,
        frames: 2,
        digest: 7,
        first_seq: 100,
        next_seq: 102,
        salt: segment.salt,
    };
    let batch = [&[1, 3, 1][..], &batch.pack()].concat();
    let segment = [&[1, 3, 1][..], &segment.pack()[..128]].concat();
    vec![("segment".into(), segment), ("batch".into(), batch)]
}

/// A state file: as it is, or the JSON of one with title and checksum put before it.
pub(crate) fn state(data: &[u8]) {
    let Some((mode, data)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let text = if mode & 1 == 0 {
        format!(
            "dtloop-state 1 {:08x}\n{text}",
            crc32fast::hash(text.as_bytes())
        )
    } else {
        text.to_owned()
    };
    if let Ok(memory) = dtloop_store::parse::<SetMemory>(&text) {
        let json = serde_json::to_string(&memory).unwrap();
        assert_eq!(serde_json::from_str::<SetMemory>(&json).unwrap(), memory);
    }
    if let Ok(saved) = dtloop_store::parse::<Saved>(&text) {
        let json = serde_json::to_string(&saved).unwrap();
        let again = serde_json::from_str::<Saved>(&json).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), json);
    }
}

pub(crate) fn state_seeds() -> Vec<(String, Vec<u8>)> {
    let memory = serde_json::to_vec(&SetMemory::default()).unwrap();
    let state = SetState::new(Uuid([1; 16]), "db");
    let state = serde_json::to_string(&state).unwrap();
    let saved = format!("{{\"state\":{state},\"checkpoint\":{{\"segment\":1,\"offset\":4096}}}}");
    let job = br#"{"id":1,"kind":"full","reason":"x","devices":[{"device":1,"label":"v","sectors":8,"position":0,"mismatched_sectors":0,"mismatches":[{"start":0,"sectors":8}],"repaired_sectors":0,"begun":true}],"paused":false}"#;
    vec![
        ("memory".into(), [&[0][..], &memory].concat()),
        ("saved".into(), [&[0][..], saved.as_bytes()].concat()),
        ("job".into(), [&[0][..], job].concat()),
        (
            "title".into(),
            b"\x01dtloop-state 1 00000000\n{}\n".to_vec(),
        ),
    ]
}

/// Both configuration files.
pub(crate) fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(config) = dtloop_agent::config::Config::parse(text) {
        for set in &config.sets {
            assert!(is_name(&set.name) && set.target.contains(':'));
            for entry in &set.bandwidth.0.entries {
                assert!(!entry.text().is_empty());
            }
        }
    }
    if let Ok(config) = dtloop_target::config::Config::parse(text) {
        for volume in &config.volumes {
            assert!(is_name(&volume.name));
        }
    }
}

const AGENT: &str = r#"[[set]]
name = "default"
target = "192.0.2.2:7788"
transport = "plaintext"
compression = "zstd"
mirror_rate = "50MiB/s"
resync_rate = "auto"
[set.bandwidth]
limit = "20MiB/s"
schedule = [
  { days = "mon-fri", from = "08:00", to = "18:00", limit = "5MiB/s" },
  { days = "sat,sun", from = "22:00", to = "06:00", limit = "unlimited" },
]
[set.verify]
days = ["sun"]
time = "02:00"
from = "22:00"
to = "06:00"
rate = "50MiB"
"#;

const TARGET: &str = r#"listen = "192.0.2.2:7788"
transport = "plaintext"
[journal]
size = "1GiB"
segment_size = "64MiB"
[[volume]]
name = "pgdata"
path = "/var/lib/dtloop/pgdata.img"
size = "10GiB"
"#;

pub(crate) fn config_seeds() -> Vec<(String, Vec<u8>)> {
    vec![
        ("agent".into(), AGENT.into()),
        ("target".into(), TARGET.into()),
    ]
}

/// Lines of the control socket, in both directions.
pub(crate) fn api(data: &[u8]) {
    const LIMIT: usize = 4096;
    let mut reader = BufReader::new(data);
    while let Ok(Some(request)) = read_line::<Request>(&mut reader, LIMIT) {
        let mut line = vec![];
        write_line(&mut line, &request, LIMIT * 8).unwrap();
        assert_eq!(
            read_line::<Request>(&mut &line[..], LIMIT * 8).unwrap(),
            Some(request)
        );
    }
    let mut reader = BufReader::new(data);
    while let Ok(Some(reply)) = read_line::<Reply>(&mut reader, LIMIT) {
        let mut line = vec![];
        // A number that JSON cannot hold is none that was read.
        write_line(&mut line, &reply, LIMIT * 8).unwrap();
        assert_eq!(
            read_line::<Reply>(&mut &line[..], LIMIT * 8).unwrap(),
            Some(reply)
        );
    }
}

pub(crate) fn api_seeds() -> Vec<(String, Vec<u8>)> {
    let lines = [
        r#"{"request":"status"}"#,
        r#"{"request":"mirror-start","set":"db","devices":[1,2],"kind":"difference","follow":true}"#,
        r#"{"request":"verify","set":"db","repair":true}"#,
        r#"{"request":"wait","set":"db","timeout_ms":5}"#,
        r#"{"request":"bandwidth","set":"db","change":{"change":"limit","limit":"5MiB/s","until":"18:00","keep":false}}"#,
        r#"{"request":"verify-log","set":"db","most":5}"#,
        r#"{"reply":"done","wait":{"seq":812,"elapsed_ms":41}}"#,
        r#"{"reply":"failed","code":"unknown-set","message":"No set x."}"#,
        r#"{"reply":"progress","set":"db","wait":{"seq":9,"applied_seq":3}}"#,
    ];
    let seed =
        |(index, line): (usize, &&str)| (format!("line-{index}"), format!("{line}\n").into_bytes());
    lines.iter().enumerate().map(seed).collect()
}
