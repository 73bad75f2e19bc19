// SPDX-License-Identifier: GPL-2.0-only

//! What can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use dtloop_abi::{CONTROL_PATH, Name, raw};
use dtloop_api::SOCKET_PATH;
use dtloop_manage::attach::{self, Intent, LoopNumber, Wanted};
use dtloop_manage::entries::ENTRIES_PATH;
use dtloop_manage::entries::name::DeviceName;
use dtloop_manage::entries::numbers::NUMBERS_PATH;
use dtloop_manage::entries::options::{self, Options};
use dtloop_manage::size;

use crate::exit;

/// Replicate block devices through /dev/loop#
///
/// Attaches block devices to loop devices whose changes are captured in order and kept as a
/// bit-identical copy by a target server. Sizes are in bytes or take a suffix K, M, G or T
/// (binary).
#[derive(Debug, Parser)]
#[command(name = "dtloop", version, after_help = exit::HELP, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where the help shows the options of every command.
const COMMON: &str = "Common options";

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Report as JSON
    #[arg(long, global = true, help_heading = COMMON)]
    pub(crate) json: bool,
    /// The agent's control socket
    #[arg(long, global = true, help_heading = COMMON, value_name = "PATH", env = "DTLOOP_SOCKET", default_value = SOCKET_PATH, hide_short_help = true)]
    pub(crate) socket: PathBuf,
    /// The module's control device
    #[arg(long, global = true, help_heading = COMMON, value_name = "PATH", env = "DTLOOP_CONTROL", default_value = CONTROL_PATH, hide_short_help = true)]
    pub(crate) control: PathBuf,
    /// Where this program keeps its state until the next boot
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "DTLOOP_RUN",
        default_value = "/run/dtloop",
        hide_short_help = true
    )]
    pub(crate) run_dir: PathBuf,
    /// The entries
    #[arg(long, global = true, help_heading = COMMON, value_name = "PATH", env = "DTLOOP_ENTRIES", default_value = ENTRIES_PATH, hide_short_help = true)]
    pub(crate) entries: PathBuf,
    /// Where loop numbers of entries with auto are remembered
    #[arg(long, global = true, help_heading = COMMON, value_name = "PATH", env = "DTLOOP_NUMBERS", default_value = NUMBERS_PATH, hide_short_help = true)]
    pub(crate) numbers: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the block devices that can be attached
    Devices(Devices),
    /// Attach a block device to a loop device
    Attach(Attach),
    /// Detach a loop device
    Detach(Detach),
    /// Change, show and check the entries of /etc/DT/dtloop_devices
    #[command(subcommand)]
    Config(Config),
    /// Show sets, devices and how far the target is
    Status(Status),
    /// Follow the size of the backing device
    Resize(Resize),
    /// Change a set
    Set(Set),
    /// Make or go on with the target's copy
    #[command(subcommand)]
    Mirror(Mirror),
    /// Compare source and target
    Verify(Verify),
    /// Decide how the target is brought up to date
    Resync(Resync),
    /// Wait until the target has everything written before the call
    Wait(Wait),
    /// Show or change how much a set may send
    Bandwidth(Bandwidth),
    /// Pair this machine with a target, by the code that "dttarget invite" prints there
    Pair(Pair),
    /// List the targets that this machine is paired with
    Peers(Peers),
    /// Trust a target no more
    Unpair(Unpair),
    /// Keep unbound stock loop devices on hand; called by udev
    #[command(hide = true)]
    Spare,
    /// Write the manual pages
    #[command(hide = true)]
    Man {
        /// Where to
        dir: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Devices {
    /// Show the others too, with what speaks against each
    #[arg(long, short)]
    pub(crate) all: bool,
}

/// The entries of /etc/DT/dtloop_devices
#[derive(Debug, Subcommand)]
pub(crate) enum Config {
    /// Add an entry
    #[command(after_help = exit::HELP)]
    Add(Box<ConfigAdd>),
    /// Remove an entry; a device that is attached stays attached
    #[command(after_help = exit::HELP)]
    Remove {
        /// The block device, the loop device or its number
        which: String,
    },
    /// Show the entries and what each is attached to
    List,
    /// Explain what is wrong with the entries, by line and column
    #[command(after_help = exit::HELP)]
    Check,
    /// Edit the file; it is checked before it is taken
    #[command(after_help = exit::HELP)]
    Edit,
}

#[derive(Debug, Args)]
pub(crate) struct ConfigAdd {
    /// The block device: a path below /dev, UUID=, LABEL=, PARTUUID=, PARTLABEL= or ID=
    #[arg(value_parser = DeviceName::parse)]
    pub(crate) device: DeviceName,
    /// The loop device: a number, /dev/loopN, or auto: the one it had before, or the first free one from 100 up
    #[arg(value_name = "LOOP", default_value = "auto", value_parser = str::parse::<LoopNumber>)]
    pub(crate) number: LoopNumber,
    /// Options as in the file, with commas between them: set=, volume=, offset=, encryption= ...
    #[arg(long, short, value_name = "LIST", default_value = "-", value_parser = parse_options)]
    pub(crate) options: Options,
    /// Write the name of the device that stays the same over a reboot, instead of the given one
    #[arg(long)]
    pub(crate) stable: bool,
    /// Add it although it cannot be used now, because the disk is not there for example
    #[arg(long)]
    pub(crate) force: bool,
}

fn parse_options(text: &str) -> Result<Options, String> {
    Options::parse(text).map_err(|bad| {
        let reasons: Vec<_> = bad.into_iter().map(|bad| bad.reason).collect();
        reasons.join("; ")
    })
}

/// Attaching all entries.
#[derive(Debug, Args)]
pub(crate) struct AttachAll {
    /// How long disks that are not there yet are waited for: 500ms, 90s, 5m
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = size::parse_duration)]
    pub(crate) wait: Duration,
    /// Also entries with the option noauto
    #[arg(long)]
    pub(crate) noauto: bool,
}

impl AttachAll {
    /// What is there now.
    pub(crate) const fn now() -> Self {
        Self {
            wait: Duration::ZERO,
            noauto: false,
        }
    }
}

/// Detaching all entries.
#[derive(Debug, Args)]
pub(crate) struct DetachAll {
    /// Do not unmount; what is mounted is refused then
    #[arg(long)]
    pub(crate) no_unmount: bool,
}

#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub(crate) struct Attach {
    /// The block device
    #[arg(required_unless_present = "all")]
    pub(crate) device: Option<PathBuf>,
    /// Attach all entries of /etc/DT/dtloop_devices instead
    #[arg(long, conflicts_with_all = ["device", "number", "set", "offset", "size_limit", "read_only", "partscan", "ring_size", "policy", "volume", "intent", "region_size", "hot_regions", "allow_signature"])]
    pub(crate) all: bool,
    /// The loop device: a number, /dev/loopN, or auto for the first free one from 100 up
    #[arg(long = "loop", value_name = "N", default_value = "auto", value_parser = str::parse::<LoopNumber>)]
    pub(crate) number: LoopNumber,
    /// The replication set; made when it does not exist
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = parse_name)]
    pub(crate) set: Name,
    /// First byte used of the block device
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    pub(crate) offset: u64,
    /// Most bytes used of the block device; without it, all up to its end
    #[arg(long, value_name = "SIZE", value_parser = parse_limit)]
    pub(crate) size_limit: Option<u64>,
    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Scan the loop device for partitions
    #[arg(long)]
    pub(crate) partscan: bool,
    /// Memory for changes on their way, a power of two; for a set that is made [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = options::ring_bytes)]
    pub(crate) ring_size: Option<u64>,
    /// What happens when that memory is full; for a set that is made [default: track]
    #[arg(long, value_enum)]
    pub(crate) policy: Option<Policy>,
    /// Name of the volume on the target
    #[arg(long, value_name = "LABEL", value_parser = parse_name)]
    pub(crate) volume: Option<Name>,
    /// The set's intent file, on ext4 or XFS on another disk than the set's devices: it remembers which regions may differ,
    /// so that a crash costs no full comparison; off: none. For a set that has none [default:
    /// /var/lib/dtloop/intent/NAME]
    #[arg(long, value_name = "FILE|off", value_parser = parse_intent)]
    pub(crate) intent: Option<Intent>,
    /// Region of a new intent file, a power of two from 64K to 1G [default: 4M]
    #[arg(long, value_name = "SIZE", value_parser = options::region_bytes)]
    pub(crate) region_size: Option<u32>,
    /// Regions that may stay marked while the target has everything: more need fewer writes of the intent file, and
    /// more comparing after a crash [default: 1024]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) hot_regions: Option<u32>,
    /// Attach although the device carries the signature of swap or LVM, made through the loop
    /// device earlier
    #[arg(long)]
    pub(crate) allow_signature: bool,
}

impl Attach {
    /// What is to be attached, and how.
    pub(crate) fn wanted(&self) -> Wanted {
        Wanted {
            device: self.device.clone().unwrap_or_default(),
            number: self.number,
            set: self.set,
            offset: self.offset,
            size_limit: self.size_limit,
            read_only: self.read_only,
            partscan: self.partscan,
            ring_size: self.ring_size,
            policy: self.policy.map(Into::into),
            volume: self.volume,
            intent: self.intent.clone(),
            region_size: self.region_size,
            hot_regions: self.hot_regions,
            allow_signature: self.allow_signature,
        }
    }
}

// clap asks for a Result.
#[expect(clippy::unnecessary_wraps)]
fn parse_intent(text: &str) -> Result<Intent, String> {
    Ok(match text {
        "off" => Intent::Off,
        path => Intent::File(path.into()),
    })
}

#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub(crate) struct Detach {
    /// The loop device or its number, or the block device behind it
    #[arg(required_unless_present = "all")]
    pub(crate) device: Option<String>,
    /// Detach all entries of /etc/DT/dtloop_devices instead
    #[arg(long, conflicts_with_all = ["device", "force", "discard_records"])]
    pub(crate) all: bool,
    /// Detach although it is in use: its users get I/O errors
    #[arg(long)]
    pub(crate) force: bool,
    /// With the last device of a set, throw away records that the agent has not taken yet: the
    /// target will need a difference mirror
    #[arg(long)]
    pub(crate) discard_records: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Only this set
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub(crate) set: Option<Name>,
    /// For monitoring: exit with 0 only if every set is connected and every device in sync; else say why not, and exit
    /// with 3, with 6 without an agent, with 5 without the module
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Resize {
    /// The loop device or its number, or the block device behind it
    pub(crate) device: String,
    /// Most bytes used of the block device; without it, all up to its end
    #[arg(long, value_name = "SIZE", value_parser = parse_limit)]
    pub(crate) size_limit: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Set {
    /// The set
    #[arg(value_parser = parse_name)]
    pub(crate) set: Name,
    /// What happens when its memory for changes is full
    #[arg(
        long,
        value_enum,
        required_unless_present = "remove",
        conflicts_with = "remove"
    )]
    pub(crate) policy: Option<Policy>,
    /// Policy throttle: begin to delay writes when so much of the memory is in use, in percent [default: 50]
    #[arg(long, value_name = "PERCENT", requires = "policy", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) throttle_start: Option<u32>,
    /// Policy throttle: end when less than this is in use; below the start [default: 25, or half of the start]
    #[arg(long, value_name = "PERCENT", requires = "policy", value_parser = clap::value_parser!(u32).range(1..=99))]
    pub(crate) throttle_stop: Option<u32>,
    /// Policy throttle: delay of a write when the memory is full, in milliseconds; less in proportion [default: 50]
    #[arg(long, value_name = "MS", requires = "policy", value_parser = clap::value_parser!(u32).range(1..=i64::from(raw::THROTTLE_DELAY_MS_MAX)))]
    pub(crate) throttle_delay: Option<u32>,
    /// Remove the set, which has no device any more
    #[arg(long)]
    pub(crate) remove: bool,
    /// And throw away records that the agent has not taken: the target will need a difference
    /// mirror
    #[arg(long, requires = "remove")]
    pub(crate) discard_records: bool,
}

/// Which set and devices a mirror or verification is about.
#[derive(Debug, Args)]
pub(crate) struct Selection {
    /// Loop devices or their numbers, or block devices; without any, all of the set
    pub(crate) devices: Vec<String>,
    /// The replication set
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = parse_name)]
    pub(crate) set: Name,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Mirror {
    /// Start a mirror and show how it goes on
    Start {
        #[command(flatten)]
        selection: Selection,
        /// Send everything (the default)
        #[arg(long, conflicts_with = "difference")]
        full: bool,
        /// Send what differs, found by hash
        #[arg(long)]
        difference: bool,
        /// Return at once
        #[arg(long)]
        background: bool,
    },
    /// Pause; the mirror keeps its place
    Pause {
        #[command(flatten)]
        selection: Selection,
    },
    /// Go on where it was paused
    Resume {
        #[command(flatten)]
        selection: Selection,
        /// Return at once
        #[arg(long)]
        background: bool,
    },
    /// Give the mirror up
    Stop {
        #[command(flatten)]
        selection: Selection,
    },
}

#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub(crate) struct Verify {
    #[command(flatten)]
    pub(crate) selection: Selection,
    /// Send again what differs, and compare it once more
    #[arg(long)]
    pub(crate) repair: bool,
    /// Show what verifications found, instead: the newest entries of the set's log
    #[arg(long, conflicts_with_all = ["repair", "background", "devices"])]
    pub(crate) log: bool,
    /// So many of them
    #[arg(long, value_name = "N", default_value_t = 100, requires = "log")]
    pub(crate) most: usize,
    /// Return at once; dtloop status shows the result
    #[arg(long)]
    pub(crate) background: bool,
}

#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub(crate) struct Resync {
    /// The replication set
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = parse_name)]
    pub(crate) set: Name,
    /// Let the target give up the last consistent state of its volumes for this once: the resync or mirror under way
    /// needs no space beside them then, and they are of no use until it is complete
    #[arg(long, required = true)]
    pub(crate) in_place: bool,
}

#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub(crate) struct Wait {
    /// The replication set
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = parse_name)]
    pub(crate) set: Name,
    /// Longest wait: 500ms, 90s, 5m or 1h; without it, no limit
    #[arg(long, value_name = "TIME", value_parser = size::parse_duration)]
    pub(crate) timeout: Option<Duration>,
}

#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub(crate) struct Bandwidth {
    /// The replication set
    #[arg(value_parser = parse_name)]
    pub(crate) set: Name,
    /// From now on send at most this: 5MiB/s, 500KiB/s, 10Mbit/s or unlimited
    #[arg(long, value_name = "RATE")]
    pub(crate) limit: Option<String>,
    /// For this long (90s, 30m, 2h, 1d) or until the clock shows this (18:00); without it, until it
    /// is changed or the agent is restarted
    #[arg(long, value_name = "TIME", requires = "limit")]
    pub(crate) until: Option<String>,
    /// Also after a restart of the agent
    #[arg(long, requires = "limit")]
    pub(crate) keep: bool,
    /// Follow the configuration and its schedule again
    #[arg(long, conflicts_with_all = ["limit", "until", "keep"])]
    pub(crate) schedule: bool,
}

/// Where the agent keeps its keys.
#[derive(Debug, Args)]
pub(crate) struct TrustFiles {
    /// The agent's configuration, which says where its state is [default: /etc/DT/dtloop.toml]
    #[arg(long, value_name = "PATH")]
    pub(crate) config: Option<PathBuf>,
    /// The agent's state directory, instead of the configured one
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub(crate) struct Pair {
    /// Address and port of the target, written as in the configuration of the set
    #[arg(value_name = "HOST:PORT", value_parser = parse_target)]
    pub(crate) target: String,
    /// The code; hyphens, blanks and small letters do not matter
    #[arg(required = true)]
    pub(crate) code: Vec<String>,
    /// Name under which the target is to know this machine, unless the invitation has one
    /// [default: the host name]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub(crate) name: Option<Name>,
    #[command(flatten)]
    pub(crate) files: TrustFiles,
}

#[derive(Debug, Args)]
pub(crate) struct Peers {
    #[command(flatten)]
    pub(crate) files: TrustFiles,
}

#[derive(Debug, Args)]
#[command(after_help = exit::HELP)]
pub(crate) struct Unpair {
    /// Address and port of the target, as dtloop peers shows it
    #[arg(value_name = "HOST:PORT", value_parser = parse_target)]
    pub(crate) target: String,
    #[command(flatten)]
    pub(crate) files: TrustFiles,
}

/// What happens when a set's ring is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Policy {
    /// Writes go on; the blocks are remembered and sent later
    Track,
    /// Writes wait for the agent
    Block,
    /// Writes are slowed down as it fills, and when it is full nevertheless, tracked
    Throttle,
}

impl From<Policy> for attach::Policy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Track => Self::Track,
            Policy::Block => Self::Block,
            Policy::Throttle => Self::Throttle,
        }
    }
}

fn parse_name(text: &str) -> Result<Name, String> {
    Name::new(text).map_err(|error| error.to_string())
}

fn parse_target(text: &str) -> Result<String, String> {
    let port = text.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
    match port {
        Some(Ok(_)) => Ok(text.to_owned()),
        _ => Err("give it as host:port, for example target.example:7788".into()),
    }
}

fn parse_limit(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        0 => Err("a size limit of 0 leaves nothing; leave it out for no limit".into()),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn ring_sizes_are_checked() {
        assert_eq!(options::ring_bytes("64M"), Ok(64 << 20));
        for text in ["0", "63M", "2M", "8G"] {
            assert!(options::ring_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn attach_takes_its_options() {
        let cli = parse(
            "dtloop attach /dev/vdb --loop 1 --set db --offset 1M --size-limit 1G --read-only \
             --partscan --ring-size 16M --policy block --volume pg-data --json",
        )
        .unwrap();
        assert!(cli.global.json);
        let Command::Attach(attach) = cli.command else {
            panic!("not attach");
        };
        assert_eq!(attach.number, LoopNumber::Pinned(1));
        assert_eq!(attach.set.as_str(), "db");
        assert_eq!((attach.offset, attach.size_limit), (1 << 20, Some(1 << 30)));
        assert_eq!(attach.ring_size, Some(16 << 20));
        assert_eq!(attach.policy, Some(Policy::Block));
        assert_eq!(attach.volume.unwrap().as_str(), "pg-data");
        assert!(attach.read_only && attach.partscan && !attach.allow_signature);
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "dtloop",
            "dtloop attach",
            "dtloop attach /dev/vdb --set a/b",
            "dtloop attach /dev/vdb --size-limit 0",
            "dtloop attach /dev/vdb --ring-size 3M",
            "dtloop attach /dev/vdb --volume ä",
            "dtloop mirror start --full --difference",
            "dtloop set default",
            "dtloop wait --timeout soon",
            "dtloop bandwidth",
            "dtloop bandwidth db --limit 1MiB/s --schedule",
            "dtloop bandwidth db --until 18:00",
            "dtloop bandwidth db --schedule --keep",
            "dtloop pair target:7788",
            "dtloop pair target AAAAAA",
            "dtloop pair target:x AAAAAA",
            "dtloop unpair target",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
