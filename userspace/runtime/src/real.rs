// SPDX-License-Identifier: GPL-2.0-only

//! The system.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, SendError, Sender, SyncSender};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use std::net::{TcpListener, TcpStream};
pub use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::MsgFlags;

/// The monotonic clock.
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}

/// Time since then, by the monotonic clock.
#[must_use]
pub fn elapsed(since: Instant) -> Duration {
    since.elapsed()
}

/// The wall clock: time since 1970; zero before.
#[must_use]
pub fn unix_time() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// Waits that long.
pub fn sleep(time: Duration) {
    std::thread::sleep(time);
}

/// Starts a thread.
///
/// # Errors
///
/// If the system gives none.
pub fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run)
}

/// Takes a lock whose holders wait while they have it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for [`notify_all`].
pub fn wait<'a, T>(
    changed: &Condvar,
    _: &'a Mutex<T>,
    held: MutexGuard<'a, T>,
) -> MutexGuard<'a, T> {
    changed.wait(held).unwrap_or_else(PoisonError::into_inner)
}

/// As [`wait`], but no longer than that.
pub fn wait_timeout<'a, T>(
    changed: &Condvar,
    _: &'a Mutex<T>,
    held: MutexGuard<'a, T>,
    timeout: Duration,
) -> MutexGuard<'a, T> {
    let waited = changed.wait_timeout(held, timeout);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// Wakes those who wait for it.
pub fn notify_all(changed: &Condvar) {
    changed.notify_all();
}

/// Sends; waits for room.
///
/// # Errors
///
/// If nobody receives any more.
pub fn send<T>(channel: &SyncSender<T>, message: T) -> Result<(), SendError<T>> {
    channel.send(message)
}

/// Sends; there is always room.
///
/// # Errors
///
/// If nobody receives any more.
pub fn post<T>(channel: &Sender<T>, message: T) -> Result<(), SendError<T>> {
    channel.send(message)
}

/// Waits for a message.
///
/// # Errors
///
/// If nobody sends any more.
pub fn receive<T>(channel: &Receiver<T>) -> Result<T, RecvError> {
    channel.recv()
}

/// As [`receive`], but no longer than that.
///
/// # Errors
///
/// If nobody sends any more, or the time is over.
pub fn receive_timeout<T>(channel: &Receiver<T>, timeout: Duration) -> Result<T, RecvTimeoutError> {
    channel.recv_timeout(timeout)
}

/// Waits until one of the files can be read.
///
/// # Errors
///
/// Those of poll.
pub fn wait_readable(files: &[BorrowedFd<'_>], timeout: Duration) -> io::Result<()> {
    let mut fds: Vec<_> = files
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    poll(&mut fds, timeout)
}

/// Waits until the socket can be read, or written if asked, or another file can be read.
///
/// # Errors
///
/// Those of poll.
pub fn wait_socket(
    socket: &TcpStream,
    write: bool,
    others: &[BorrowedFd<'_>],
    timeout: Duration,
) -> io::Result<()> {
    let mut events = PollFlags::POLLIN;
    events.set(PollFlags::POLLOUT, write);
    let mut fds = Vec::with_capacity(others.len() + 1);
    fds.push(PollFd::new(socket.as_fd(), events));
    fds.extend(others.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
    poll(&mut fds, timeout)
}

/// Waits until somebody connects.
///
/// # Errors
///
/// Those of poll.
pub fn wait_listener(listener: &TcpListener, timeout: Duration) -> io::Result<()> {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, timeout)
}

/// An interruption is as good as a time-out.
fn poll(fds: &mut [PollFd<'_>], timeout: Duration) -> io::Result<()> {
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    match nix::poll::poll(fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Reads what a socket has; waits for it if asked.
///
/// # Errors
///
/// Those of the socket.
pub fn read_socket(socket: &TcpStream, buffer: &mut [u8], waits: bool) -> io::Result<usize> {
    use std::os::fd::AsRawFd;
    let flags = if waits {
        MsgFlags::empty()
    } else {
        MsgFlags::MSG_DONTWAIT
    };
    Ok(nix::sys::socket::recv(socket.as_raw_fd(), buffer, flags)?)
}

/// Writes as much as a socket takes without waiting.
///
/// # Errors
///
/// Those of the socket.
pub fn write_socket(socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    use std::os::fd::AsRawFd;
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    Ok(nix::sys::socket::send(socket.as_raw_fd(), bytes, flags)?)
}
