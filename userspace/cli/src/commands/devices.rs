// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop devices`

use dtloop_manage::gather::Gatherer;
use dtloop_manage::loop_path;
use dtloop_manage::preflight::{Facts, Wish, judge};
use dtloop_manage::size;
use dtloop_manage::system::Signature;
use serde::Serialize;

use super::Context;
use super::fleet::attached;
use crate::args::Devices;
use crate::exit::Code;
use crate::output;

#[derive(Debug, Serialize)]
struct Row {
    device: String,
    size_bytes: u64,
    block_bytes: u64,
    content: Vec<Signature>,
    usable: bool,
    reasons: Vec<String>,
    attached_to: Option<String>,
}

pub(crate) fn run(context: &Context<'_>, args: &Devices) -> anyhow::Result<Code> {
    let attached = attached(context)?;
    let gatherer = Gatherer::new(&context.manager.system, &attached);
    let mut rows = Vec::new();
    for name in context.manager.system.block_names() {
        let Some(device) = context.manager.system.block(&name) else {
            continue;
        };
        // What was never set up is of interest to nobody.
        if device.size_bytes == 0 && device.loop_number().is_some() {
            continue;
        }
        rows.push(row(&gatherer.facts(device)));
    }
    if !args.all {
        rows.retain(|row| row.usable);
    }
    if context.global.json {
        output::json(&rows)?;
    } else {
        output::text(&table(&rows, args.all))?;
    }
    Ok(Code::Done)
}

fn row(facts: &Facts) -> Row {
    let wish = Wish {
        // A read-only device can be attached, as long as that is asked for.
        read_only: true,
        ..Wish::default()
    };
    let reasons: Vec<String> = judge(facts, &wish)
        .iter()
        .map(ToString::to_string)
        .collect();
    Row {
        device: facts.device.path(),
        size_bytes: facts.device.size_bytes,
        block_bytes: facts.device.block_bytes,
        content: facts.signatures.clone(),
        usable: reasons.is_empty(),
        reasons,
        attached_to: facts.attached.map(loop_path),
    }
}

fn table(rows: &[Row], all: bool) -> String {
    if rows.is_empty() {
        return "No block device is free. dtloop devices --all shows them all with the reason.\n"
            .into();
    }
    let mut lines = vec![output::row(["DEVICE", "SIZE", "BLOCK", "CONTENT"])];
    if all {
        lines[0].push("NOTE".into());
    }
    for row in rows {
        let content: Vec<String> = row.content.iter().map(ToString::to_string).collect();
        let mut line = vec![
            row.device.clone(),
            size::bytes(row.size_bytes),
            row.block_bytes.to_string(),
            if content.is_empty() {
                "-".into()
            } else {
                content.join(", ")
            },
        ];
        if all {
            line.push(if row.usable {
                "free".into()
            } else {
                row.reasons.join("; ")
            });
        }
        lines.push(line);
    }
    output::table(&lines, &[1, 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtloop_manage::system::BlockDevice;

    #[test]
    fn the_list_says_why_a_device_is_missing() {
        let mut facts = Facts {
            device: BlockDevice {
                name: "vdb".into(),
                size_bytes: 1 << 30,
                block_bytes: 512,
                ..BlockDevice::default()
            },
            signatures: vec![Signature::Ext],
            ..Facts::default()
        };
        let free = row(&facts);
        facts.mounts = vec!["/srv".into()];
        let mounted = row(&facts);
        assert!(free.usable && !mounted.usable);
        let text = table(&[free, mounted], true);
        let expected = "\
DEVICE     SIZE  BLOCK  CONTENT   NOTE
/dev/vdb  1 GiB    512  ext2/3/4  free
/dev/vdb  1 GiB    512  ext2/3/4  it is mounted on /srv; unmount it first
";
        assert_eq!(text, expected);
    }
}
