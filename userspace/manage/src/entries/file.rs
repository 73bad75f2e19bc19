// SPDX-License-Identifier: GPL-2.0-only

//! Reading and replacing the file. A change is made under a lock, from what the file holds then, and is there as a whole or
//! not at all. Owner and mode stay.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};

use super::text::{BYTES_MAX, Lines};

/// Mode of a file that is made.
const MODE: u32 = 0o644;

/// Reads the file; one that is not there has no lines.
///
/// # Errors
///
/// If it cannot be read or is too long.
pub fn read(path: &Path) -> anyhow::Result<Lines> {
    Ok(Lines::new(&read_bytes(path)?.unwrap_or_default()))
}

fn read_bytes(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    let context = || format!("Cannot read {}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.with_context(context)?,
    };
    let mut bytes = Vec::new();
    let limit = BYTES_MAX as u64 + 1;
    file.take(limit)
        .read_to_end(&mut bytes)
        .with_context(context)?;
    if bytes.len() > BYTES_MAX {
        bail!(
            "{} is longer than {BYTES_MAX} bytes; it is no list of devices",
            path.display()
        );
    }
    Ok(Some(bytes))
}

/// Changes the file, while no other program of DTLOOP does; gives what the change gives. Nothing is written when that
/// leaves it as it was.
///
/// # Errors
///
/// Those of the change, or if the file cannot be replaced; it is as it was then.
pub fn change<T>(
    path: &Path,
    change: impl FnOnce(&mut Lines) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    // A link is followed: whoever made it wants the file to be elsewhere.
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let dir = directory(path);
    fs::create_dir_all(&dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    let _lock = lock(&dir)?;
    let before = read_bytes(path)?;
    let mut lines = Lines::new(before.as_deref().unwrap_or_default());
    let result = change(&mut lines)?;
    let after = lines.bytes();
    if before.as_ref() != Some(&after) {
        if after.len() > BYTES_MAX {
            bail!("{} would be longer than {BYTES_MAX} bytes", path.display());
        }
        replace(path, &dir, before.as_deref(), &after)
            .with_context(|| format!("Cannot write {}; it is as it was", path.display()))?;
    }
    Ok(result)
}

fn directory(path: &Path) -> PathBuf {
    let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    parent.map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// The lock is the directory's: the file itself is replaced.
fn lock(dir: &Path) -> anyhow::Result<Flock<File>> {
    let file = File::open(dir).with_context(|| format!("Cannot open {}", dir.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| anyhow::anyhow!("Cannot lock {}: {errno}", dir.display()))
}

fn replace(path: &Path, dir: &Path, before: Option<&[u8]>, after: &[u8]) -> anyhow::Result<()> {
    let mut part = tempfile::Builder::new()
        .prefix(".dtloop_devices.")
        .permissions(Permissions::from_mode(0o600))
        .tempfile_in(dir)?;
    part.write_all(after)?;
    match fs::metadata(path) {
        Ok(meta) => {
            fchown(part.as_file(), Some(meta.uid()), Some(meta.gid()))?;
            part.as_file().set_permissions(meta.permissions())?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            part.as_file()
                .set_permissions(Permissions::from_mode(MODE))?;
        }
        Err(error) => return Err(error.into()),
    }
    part.as_file().sync_all()?;
    // An editor takes no lock.
    if read_bytes(path)?.as_deref() != before {
        bail!("somebody else has changed it meanwhile; try again");
    }
    part.persist(path).map_err(|error| error.error)?;
    File::open(dir)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(path: &Path, line: &str) -> anyhow::Result<()> {
        change(path, |lines| {
            let (entries, _) = Lines::new(line.as_bytes()).entries();
            lines.add(&entries[0].entry);
            Ok(())
        })
    }

    #[test]
    fn a_new_file_is_made_and_an_old_one_keeps_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("DT/dtloop_devices");
        assert_eq!(read(&path).unwrap(), Lines::default());
        add(&path, "/dev/vdb 1").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(&path), MODE);
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        add(&path, "/dev/vdc 2").unwrap();
        assert_eq!(mode(&path), 0o640);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "/dev/vdb\t/dev/loop1\n/dev/vdc\t/dev/loop2\n");
        let names = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(names, 1, "nothing is left beside it");
    }

    #[test]
    fn a_failed_change_and_an_editor_in_between_leave_it_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("devices");
        fs::write(&path, "# mine\n").unwrap();
        let failed: anyhow::Result<()> = change(&path, |lines| {
            *lines = Lines::default();
            bail!("no")
        });
        assert!(failed.is_err());
        let raced = change(&path, |lines| {
            fs::write(&path, "# theirs\n").unwrap();
            *lines = Lines::new(b"# ours\n");
            Ok(())
        });
        assert!(format!("{:#}", raced.unwrap_err()).contains("try again"));
        assert_eq!(fs::read(&path).unwrap(), b"# theirs\n");
    }

    #[test]
    fn changes_at_the_same_time_are_all_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("devices");
        std::thread::scope(|scope| {
            for number in 1..=8 {
                let path = &path;
                scope.spawn(move || add(path, &format!("/dev/vd{number} {number}")).unwrap());
            }
        });
        assert_eq!(read(&path).unwrap().entries().0.len(), 8);
    }

    #[test]
    fn a_link_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::write(&real, "").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        add(&link, "/dev/vdb").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(fs::read_to_string(&real).unwrap().contains("/dev/vdb"));
    }
}
