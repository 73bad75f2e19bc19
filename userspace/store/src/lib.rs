// SPDX-License-Identifier: GPL-2.0-only

//! Small files that are replaced as a whole: JSON for people, a checksum against damage.
//!
//! ```text
//! dtloop-state 1 5d0a11c3
//! { ... }
//! ```
//!
//! The number behind the version is the CRC-32 of everything behind the first line.

#![forbid(unsafe_code)]

mod hold;
pub mod log;

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::path::{Path, PathBuf};

use dtloop_disk::{Disk, RealDisk};
use dtloop_proto::Uuid;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use hold::{DYING, Hold, hold};

const TITLE: &str = "dtloop-state 1 ";

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// It cannot be read or written.
    #[error("Cannot use state file {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its content is damaged.
    #[error("State file {} is damaged: {reason}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> StateFileError + '_ {
    move |source| StateFileError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Makes the entries of a directory durable.
///
/// # Errors
///
/// Those of the file system.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Reads a state file; `None` if there is none.
///
/// # Errors
///
/// If it cannot be read or is damaged.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateFileError> {
    load_on(&RealDisk, path)
}

fn read(disk: &dyn Disk, path: &Path) -> io::Result<Vec<u8>> {
    let file = disk.open(path, false)?;
    let mut bytes = vec![0; usize::try_from(file.bytes()?).map_err(io::Error::other)?];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Like [`load`], from that disk.
///
/// # Errors
///
/// If it cannot be read or is damaged.
pub fn load_on<T: DeserializeOwned>(
    disk: &dyn Disk,
    path: &Path,
) -> Result<Option<T>, StateFileError> {
    let bytes = match read(disk, path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(path)(error)),
    };
    // What is no text has another checksum.
    let text = String::from_utf8_lossy(&bytes);
    parse(&text)
        .map(Some)
        .map_err(|reason| StateFileError::Damaged {
            path: path.to_owned(),
            reason,
        })
}

/// Reads the text of a state file.
///
/// # Errors
///
/// What is wrong with it.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let (title, json) = text.split_once('\n').ok_or("it is cut short")?;
    let crc = title
        .strip_prefix(TITLE)
        .ok_or("its first line is no title of this version")?;
    if u32::from_str_radix(crc, 16) != Ok(crc32fast::hash(json.as_bytes())) {
        return Err("its checksum does not fit".to_owned());
    }
    serde_json::from_str(json).map_err(|error| error.to_string())
}

/// Replaces a state file so that after a crash either the old or the new one is there.
///
/// # Errors
///
/// Those of the file system.
pub fn store<T: Serialize>(path: &Path, value: &T) -> Result<(), StateFileError> {
    store_on(&RealDisk, path, value)
}

/// Like [`store`], on that disk.
///
/// # Errors
///
/// Those of the file system.
pub fn store_on<T: Serialize>(
    disk: &dyn Disk,
    path: &Path,
    value: &T,
) -> Result<(), StateFileError> {
    let json = serde_json::to_string_pretty(value)
        .map_err(|error| io_error(path)(io::Error::new(io::ErrorKind::InvalidData, error)))?;
    let json = json + "\n";
    let text = format!("{TITLE}{:08x}\n{json}", crc32fast::hash(json.as_bytes()));
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let file = disk.open(&temporary, true)?;
        file.set_bytes(0)?;
        file.write_at(&mut [IoSlice::new(text.as_bytes())], 0)?;
        file.sync()?;
        disk.rename(&temporary, path)?;
        disk.sync_dir(path.parent().unwrap_or(Path::new(".")))
    };
    write().map_err(io_error(path))
}

/// Sixteen random bytes.
///
/// # Errors
///
/// If the system gives none.
pub fn random_uuid() -> io::Result<Uuid> {
    let mut uuid = Uuid::NONE;
    File::open("/dev/urandom")?.read_exact(&mut uuid.0)?;
    Ok(uuid)
}

/// The identifier kept in a file, drawn if there is none yet.
///
/// # Errors
///
/// If it cannot be read or written.
pub fn identity(path: &Path) -> Result<Uuid, StateFileError> {
    if let Some(text) = load::<String>(path)? {
        return text.parse().map_err(|_| StateFileError::Damaged {
            path: path.to_owned(),
            reason: "it holds no identifier".to_owned(),
        });
    }
    let id = random_uuid().map_err(io_error(path))?;
    store(path, &id.to_string())?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn every_flipped_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        assert_eq!(load::<Vec<u32>>(&path).unwrap(), None);
        store(&path, &vec![1_u32, 2]).unwrap();
        assert_eq!(load(&path).unwrap(), Some(vec![1_u32, 2]));
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
            assert!(load::<Vec<u32>>(&path).is_err(), "byte {at}");
        }
    }
}
