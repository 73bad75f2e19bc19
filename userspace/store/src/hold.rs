// SPDX-License-Identifier: GPL-2.0-only

//! A directory that one process at a time has.

use std::fs::File;
use std::io;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// How long a process that was killed may take to be gone. It has the lock until then, and it cannot go before its disk
/// has answered a sync that it was in: whoever starts the next one at once must not be turned away for that. One that
/// lives is told from one that dies by nothing but this.
pub const DYING: Duration = Duration::from_secs(5);

/// How often it is looked at meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What a process has for itself as long as this exists.
#[derive(Debug)]
pub struct Hold {
    _file: Flock<File>,
}

/// Takes the file `lock` of a directory for this process. `None`: another one has it, and still has it after `patience`.
///
/// # Errors
///
/// If there can be no such file.
pub fn hold(dir: &Path, patience: Duration) -> io::Result<Option<Hold>> {
    let began = Instant::now();
    let mut file = File::create(dir.join("lock"))?;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => return Ok(Some(Hold { _file: file })),
            Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => file,
            Err((_, errno)) => return Err(errno.into()),
        };
        if began.elapsed() >= patience {
            return Ok(None);
        }
        sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_has_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let first = hold(dir.path(), Duration::ZERO).unwrap();
        assert!(first.is_some());
        assert!(hold(dir.path(), LOOK_EVERY * 2).unwrap().is_none());
        drop(first);
        assert!(hold(dir.path(), Duration::ZERO).unwrap().is_some());
        assert!(hold(&dir.path().join("none"), Duration::ZERO).is_err());
    }

    #[test]
    fn one_that_is_about_to_go_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let first = hold(dir.path(), Duration::ZERO).unwrap();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| hold(dir.path(), DYING * 10).unwrap());
            sleep(LOOK_EVERY * 3);
            drop(first);
            assert!(second.join().unwrap().is_some());
        });
    }
}
