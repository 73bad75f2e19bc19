// SPDX-License-Identifier: GPL-2.0-only

//! Encryption below a loop device: dm-crypt by `cryptsetup`. Applications and the target see the plain text, the disk
//! holds the cipher text.

use std::fmt;
use std::fs;
use std::io::{ErrorKind, IsTerminal};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::entries::text::Placed;
use crate::entries::{Entry, Finding, Severity};
use crate::preflight::Refusals;
use crate::system::System;

/// How a disk is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A header on the disk says how; the key opens it.
    Luks2,
    /// Nothing on the disk says how.
    Plain,
}

impl Mode {
    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Luks2 => "luks2",
            Self::Plain => "plain",
        }
    }
}

/// What `losetup -e` took, before util-linux 2.23 dropped it; and what of its kind loop-AES took.
const RETIRED: [&str; 12] = [
    "xor", "des", "des3", "3des", "aes", "aes128", "aes192", "aes256", "twofish", "blowfish",
    "serpent", "cast128",
];

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "luks2" | "luks" => Ok(Self::Luks2),
            "plain" => Ok(Self::Plain),
            _ if RETIRED.contains(&text.to_ascii_lowercase().as_str()) => Err(format!(
                "{text} is a cipher of the old losetup -e, which is no protection today and which the kernel no longer has; \
                 use encryption=luks2 (cryptsetup luksFormat makes the disk ready), or encryption=plain with a cipher such as \
                 cipher=aes-xts-plain64"
            )),
            _ => Err(format!(
                "the encryption {text:?} is unknown; there are luks2, plain and none"
            )),
        }
    }
}

/// Where the key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// Somebody is asked for the passphrase.
    Prompt,
    /// A file, for root only.
    File(PathBuf),
    /// A credential that systemd hands to the service.
    Credential(String),
}

impl FromStr for KeySource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "prompt" {
            return Ok(Self::Prompt);
        }
        if let Some(name) = text.strip_prefix("credential:") {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            let is_name = !name.is_empty() && !name.starts_with('.') && name.chars().all(plain);
            return if is_name {
                Ok(Self::Credential(name.to_owned()))
            } else {
                Err("the name of a credential has letters, digits, '.', '_' and '-'".into())
            };
        }
        if text.starts_with('/') {
            return Ok(Self::File(text.into()));
        }
        // It is not repeated: it may be the key itself.
        Err("key is prompt, the whole path of a file that holds the key, or credential:NAME; never the key itself".into())
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prompt => f.write_str("prompt"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Credential(name) => write!(f, "credential:{name}"),
        }
    }
}

/// The encryption of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encryption {
    /// How it is encrypted.
    pub mode: Mode,
    /// Where the key comes from.
    pub key: KeySource,
    /// Plain: the cipher, as cryptsetup calls it.
    pub cipher: Option<String>,
    /// Plain: size of the key in bits; None: cryptsetup's own default.
    pub key_bits: Option<u32>,
    /// Plain: how a passphrase is made a key; None: cryptsetup's own default.
    pub hash: Option<String>,
}

/// A word that cryptsetup knows.
pub(crate) fn word(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | ':' | '(' | ')');
    if text.is_empty() || text.starts_with('-') || !text.chars().all(plain) {
        return Err(format!(
            "{text:?} is no name of a cipher or hash, such as aes-xts-plain64 or sha256"
        ));
    }
    Ok(text.to_owned())
}

pub(crate) fn key_bits(text: &str) -> Result<u32, String> {
    let bits = text.parse().ok();
    bits.filter(|bits| *bits > 0 && bits % 8 == 0 && *bits <= 4096)
        .ok_or_else(|| format!("{text:?} is no size of a key in bits, such as 256 or 512"))
}

/// How long a mapping may stay busy when it is closed: udev looks at it after each event.
const PATIENCE: Duration = Duration::from_secs(5);

/// Characters of the device's name that go into that of the mapping.
const NAME_CHARS: usize = 40;

/// The name of the mapping of an entry, below `/dev/mapper`.
#[must_use]
pub fn mapped_name(entry: &Entry) -> String {
    let device = entry.device.to_string();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let last = device.rsplit(['/', '=']).next().unwrap_or_default();
    let readable: String = last.chars().take(NAME_CHARS).map(plain).collect();
    // Two devices may differ only in what was left out.
    let hash = blake3::hash(device.as_bytes()).to_hex();
    format!("dtloop-{readable}-{}", &hash.as_str()[..8])
}

/// The path of the mapping of an entry.
#[must_use]
pub fn mapped_path(entry: &Entry) -> String {
    format!("/dev/mapper/{}", mapped_name(entry))
}

/// What is wrong with the encryption of an entry.
pub(crate) fn findings(system: &System, placed: &Placed) -> Vec<Finding> {
    let Some(encryption) = &placed.entry.options.encryption else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    let mut add = |severity: Severity, message: String| {
        findings.push(placed.finding(2, severity, message));
    };
    if let KeySource::File(path) = &encryption.key {
        let shown = path.display();
        match fs::metadata(system.path(&path.to_string_lossy())) {
            Err(error) => add(
                Severity::Error,
                format!("the key file {shown}: {}", crate::plain(&error)),
            ),
            Ok(meta) if meta.mode() & 0o077 != 0 || meta.uid() != 0 => add(
                Severity::Warning,
                format!(
                    "others than root may use the key file {shown}; run chown root {shown} && chmod 400 {shown}"
                ),
            ),
            Ok(_) => {}
        }
    }
    if !has_cryptsetup() {
        let message = "cryptsetup is not installed; run apt install cryptsetup-bin";
        add(Severity::Error, message.to_owned());
    }
    findings
}

fn has_cryptsetup() -> bool {
    let version = Command::new("cryptsetup")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    !matches!(version, Err(error) if error.kind() == ErrorKind::NotFound)
}

/// Sets up the mapping of an entry, unless there is one; gives its path.
///
/// # Errors
///
/// If cryptsetup refuses, or nobody is there to be asked for the passphrase. No message has the key in it.
pub fn open(entry: &Entry, encryption: &Encryption) -> anyhow::Result<PathBuf> {
    let path = PathBuf::from(mapped_path(entry));
    if path.exists() {
        return Ok(path);
    }
    let mut command = Command::new("cryptsetup");
    command.args(["open", "--batch-mode", "--type", encryption.mode.name()]);
    let option = |name: &str, value: Option<String>| value.map(|value| format!("--{name}={value}"));
    command.args(option("cipher", encryption.cipher.clone()));
    command.args(option(
        "key-size",
        encryption.key_bits.map(|bits| bits.to_string()),
    ));
    command.args(option("hash", encryption.hash.clone()));
    let asked = key(&mut command, entry, encryption)?;
    command
        .arg("--")
        .arg(entry.device.path())
        .arg(mapped_name(entry));
    let output = run(command, asked)?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let reason = format!(
            "cryptsetup did not open it: {}",
            complaint
                .trim()
                .lines()
                .last()
                .unwrap_or("it says no reason")
        );
        return Err(Refusals::one(entry.device.to_string(), reason).into());
    }
    Ok(path)
}

/// Says where the key is; gives the passphrase if somebody was asked for it here.
fn key(
    command: &mut Command,
    entry: &Entry,
    encryption: &Encryption,
) -> anyhow::Result<Option<Vec<u8>>> {
    let file = match &encryption.key {
        KeySource::File(path) => path.clone(),
        KeySource::Credential(name) => {
            let Some(dir) = std::env::var_os("CREDENTIALS_DIRECTORY") else {
                let reason = format!(
                    "its key is the credential {name}, which only the service gets; start dtmount.service, with \
                     LoadCredential={name}:PATH in a drop-in"
                );
                return Err(Refusals::one(entry.device.to_string(), reason).into());
            };
            Path::new(&dir).join(name)
        }
        // cryptsetup asks by itself where somebody sits.
        KeySource::Prompt if std::io::stdin().is_terminal() => return Ok(None),
        KeySource::Prompt => {
            command.args(["--key-file", "-"]);
            return ask(entry).map(Some);
        }
    };
    command.arg("--key-file").arg(file);
    Ok(None)
}

/// At boot: whoever answers systemd's questions.
fn ask(entry: &Entry) -> anyhow::Result<Vec<u8>> {
    let output = Command::new("systemd-ask-password")
        .args(["--timeout=90", "-n", "--icon=drive-harddisk"])
        .arg(format!("--id=dtloop:{}", entry.device))
        .arg(format!("Passphrase for {} of DTLOOP:", entry.device))
        .stdin(Stdio::null())
        .output()
        .context("Cannot ask for the passphrase: systemd-ask-password does not run")?;
    if !output.status.success() {
        bail!("nobody gave the passphrase for {}", entry.device);
    }
    Ok(output.stdout)
}

fn run(mut command: Command, input: Option<Vec<u8>>) -> anyhow::Result<std::process::Output> {
    use std::io::Write;
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let Some(input) = input else {
        return command
            .stdin(Stdio::inherit())
            .output()
            .context("Cannot run cryptsetup; apt install cryptsetup-bin");
    };
    let mut child = command
        .stdin(Stdio::piped())
        .spawn()
        .context("Cannot run cryptsetup; apt install cryptsetup-bin")?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends early has said why.
        let _ = stdin.write_all(&input);
    }
    Ok(child.wait_with_output()?)
}

/// Takes the mapping of an entry away, if there is one.
///
/// # Errors
///
/// If it is in use.
pub fn close(entry: &Entry) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Path::new(&mapped_path(entry)).exists() {
        let output = Command::new("cryptsetup")
            .args(["close", "--", &mapped_name(entry)])
            .output()
            .context("Cannot run cryptsetup")?;
        if !output.status.success() && Instant::now() > deadline {
            let complaint = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{} was not closed: {}",
                mapped_path(entry),
                complaint.trim()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entries::text::Lines;

    fn placed(line: &str) -> Placed {
        Lines::new(line.as_bytes()).entries().0.remove(0)
    }

    #[test]
    fn mappings_have_names_of_their_own() {
        let name = |line: &str| mapped_name(&placed(line).entry);
        let one = name("/dev/disk/by-id/virtio-pg_data auto encryption=luks2");
        assert!(one.starts_with("dtloop-virtio-pg-data-"), "{one}");
        assert_ne!(
            one,
            name("/dev/disk/by-id/virtio-pg-data auto encryption=luks2")
        );
        let long = name(&format!("LABEL={} auto encryption=luks2", "x".repeat(300)));
        assert!(long.len() < 64, "{long}");
    }

    #[test]
    fn a_key_is_never_taken_for_a_path_nor_repeated() {
        let error = "hunter2".parse::<KeySource>().unwrap_err();
        assert!(!error.contains("hunter2"));
        assert!("credential:../x".parse::<KeySource>().is_err());
        assert!("--key".parse::<KeySource>().is_err());
        assert!(word("-x").is_err() && word("a b").is_err() && key_bits("7").is_err());
    }

    #[test]
    fn a_key_file_that_is_missing_or_open_to_all_is_told() {
        let (_dir, system) = crate::system::tests::machine("etc/DT/open: secret");
        let told = |line: &str| -> Vec<String> {
            let found = findings(&system, &placed(line));
            found
                .iter()
                .map(|finding| finding.message.clone())
                .collect()
        };
        let missing = told("/dev/vdb 1 encryption=luks2,key=/etc/DT/none");
        assert!(missing[0].contains("does not exist"), "{missing:?}");
        let open = told("/dev/vdb 1 encryption=luks2,key=/etc/DT/open");
        assert!(open[0].contains("chmod 400"), "{open:?}");
    }
}
