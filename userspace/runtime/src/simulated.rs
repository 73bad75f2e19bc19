// SPDX-License-Identifier: GPL-2.0-only

//! A world of a simulation.

use std::cell::RefCell;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, ToSocketAddrs};
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{
    Receiver, RecvError, RecvTimeoutError, SendError, Sender, SyncSender, TryRecvError,
    TrySendError,
};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, TryLockError};
use std::time::{Duration, Instant};

/// What the threads of a simulation live in. All of them are on one thread of the system and take turns.
pub trait World {
    /// Time since the world began.
    fn now(&self) -> Duration;

    /// The wall clock of the machine whose thread has its turn: time since 1970.
    fn unix_time(&self) -> Duration;

    /// Ends the turn until something happens ([`World::stir`]), and at the latest at that time. May return earlier.
    /// A thread whose machine was switched off does not return.
    fn park(&self, until: Option<Duration>);

    /// Something happened: whoever is parked looks again.
    fn stir(&self);

    /// Starts a thread on the machine whose thread has its turn.
    fn spawn(&self, name: &str, run: Box<dyn FnOnce() + Send>) -> u64;

    /// Whether a thread has ended.
    fn has_ended(&self, thread: u64) -> bool;

    /// Opens a connection; gives this end of it.
    ///
    /// # Errors
    ///
    /// If nobody listens there, or the network is cut.
    fn connect(&self, address: SocketAddr, timeout: Duration) -> io::Result<u64>;

    /// Listens.
    ///
    /// # Errors
    ///
    /// If somebody does already.
    fn listen(&self, address: SocketAddr) -> io::Result<u64>;

    /// Takes in who connects, without waiting.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if nobody does.
    fn accept(&self, listener: u64) -> io::Result<(u64, SocketAddr)>;

    /// Reads what has come, without waiting; 0 is the end.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if nothing has.
    fn read(&self, end: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes what there is room for, without waiting.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is none.
    fn write(&self, end: u64, pieces: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Whether a read, or a write if asked, would not have to wait.
    fn is_ready(&self, end: u64, write: bool) -> bool;

    /// Ends one or both directions.
    fn shutdown(&self, end: u64, how: Shutdown);

    /// Nobody has this end, or this listener, any more.
    fn close(&self, end: u64);
}

thread_local! {
    static WORLD: RefCell<Option<Rc<dyn World>>> = const { RefCell::new(None) };
}

/// Makes this the world of everything that runs on this thread of the system, or ends it.
pub fn enter(world: Option<Rc<dyn World>>) {
    WORLD.with(|entered| *entered.borrow_mut() = world);
}

fn world() -> Rc<dyn World> {
    WORLD.with(|entered| {
        let world = entered.borrow().clone();
        world.expect("what is built with the feature `simulation` lives in a world")
    })
}

fn base() -> Instant {
    static BASE: OnceLock<Instant> = OnceLock::new();
    *BASE.get_or_init(Instant::now)
}

fn until(timeout: Duration) -> Duration {
    world().now().saturating_add(timeout)
}

/// The monotonic clock.
#[must_use]
pub fn now() -> Instant {
    base() + world().now()
}

/// Time since then, by the monotonic clock.
#[must_use]
pub fn elapsed(since: Instant) -> Duration {
    now().saturating_duration_since(since)
}

/// The wall clock: time since 1970.
#[must_use]
pub fn unix_time() -> Duration {
    world().unix_time()
}

/// Waits that long.
pub fn sleep(time: Duration) {
    let until = until(time);
    while world().now() < until {
        world().park(Some(until));
    }
}

/// A thread.
#[derive(Debug)]
pub struct JoinHandle<T> {
    thread: u64,
    result: std::marker::PhantomData<T>,
}

impl JoinHandle<()> {
    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// Never: a panic of a thread ends the simulation.
    pub fn join(self) -> Result<(), ()> {
        while !world().has_ended(self.thread) {
            world().park(None);
        }
        Ok(())
    }
}

/// Starts a thread.
///
/// # Errors
///
/// Never.
pub fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Ok(JoinHandle {
        thread: world().spawn(name, Box::new(run)),
        result: std::marker::PhantomData,
    })
}

/// Takes a lock whose holders wait while they have it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    loop {
        match mutex.try_lock() {
            Ok(held) => return held,
            // Its holder's machine was switched off, or the holder panicked, which ends the simulation.
            Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => world().park(None),
        }
    }
}

/// Waits for [`notify_all`], or anything else.
pub fn wait<'a, T>(_: &Condvar, mutex: &'a Mutex<T>, held: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    drop(held);
    world().park(None);
    lock(mutex)
}

/// As [`wait`], but no longer than that.
pub fn wait_timeout<'a, T>(
    _: &Condvar,
    mutex: &'a Mutex<T>,
    held: MutexGuard<'a, T>,
    timeout: Duration,
) -> MutexGuard<'a, T> {
    drop(held);
    world().park(Some(until(timeout)));
    lock(mutex)
}

/// Wakes those who wait for it.
pub fn notify_all(_: &Condvar) {
    world().stir();
}

/// Sends; waits for room.
///
/// # Errors
///
/// If nobody receives any more.
pub fn send<T>(channel: &SyncSender<T>, message: T) -> Result<(), SendError<T>> {
    let mut message = message;
    loop {
        match channel.try_send(message) {
            Ok(()) => break,
            Err(TrySendError::Full(back)) => message = back,
            Err(TrySendError::Disconnected(back)) => return Err(SendError(back)),
        }
        world().park(None);
    }
    world().stir();
    Ok(())
}

/// Sends; there is always room.
///
/// # Errors
///
/// If nobody receives any more.
pub fn post<T>(channel: &Sender<T>, message: T) -> Result<(), SendError<T>> {
    channel.send(message)?;
    world().stir();
    Ok(())
}

/// Waits for a message.
///
/// # Errors
///
/// If nobody sends any more.
pub fn receive<T>(channel: &Receiver<T>) -> Result<T, RecvError> {
    loop {
        match channel.try_recv() {
            Ok(message) => {
                world().stir();
                return Ok(message);
            }
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            Err(TryRecvError::Empty) => world().park(None),
        }
    }
}

/// As [`receive`], but no longer than that.
///
/// # Errors
///
/// If nobody sends any more, or the time is over.
pub fn receive_timeout<T>(channel: &Receiver<T>, timeout: Duration) -> Result<T, RecvTimeoutError> {
    let until = until(timeout);
    loop {
        match channel.try_recv() {
            Ok(message) => {
                world().stir();
                return Ok(message);
            }
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(TryRecvError::Empty) if world().now() >= until => {
                return Err(RecvTimeoutError::Timeout);
            }
            Err(TryRecvError::Empty) => world().park(Some(until)),
        }
    }
}

/// Waits until something happens.
///
/// # Errors
///
/// Never.
pub fn wait_readable(_: &[BorrowedFd<'_>], timeout: Duration) -> io::Result<()> {
    world().park(Some(until(timeout)));
    Ok(())
}

/// Waits until the socket is ready, or something else happens.
///
/// # Errors
///
/// Never.
pub fn wait_socket(
    socket: &TcpStream,
    write: bool,
    _: &[BorrowedFd<'_>],
    timeout: Duration,
) -> io::Result<()> {
    let end = socket.end.0;
    if !world().is_ready(end, write) {
        world().park(Some(until(timeout)));
    }
    Ok(())
}

/// Waits until something happens.
///
/// # Errors
///
/// Never.
pub fn wait_listener(_: &TcpListener, timeout: Duration) -> io::Result<()> {
    world().park(Some(until(timeout)));
    Ok(())
}

/// Reads what a socket has; waits for it if asked.
///
/// # Errors
///
/// Those of the socket.
pub fn read_socket(socket: &TcpStream, buffer: &mut [u8], waits: bool) -> io::Result<usize> {
    if waits {
        (&mut &*socket).read(buffer)
    } else {
        world().read(socket.end.0, buffer)
    }
}

/// Writes as much as a socket takes without waiting.
///
/// # Errors
///
/// Those of the socket.
pub fn write_socket(socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    world().write(socket.end.0, &[IoSlice::new(bytes)])
}

#[derive(Debug)]
struct End(u64);

impl Drop for End {
    fn drop(&mut self) {
        // The world may have ended before what lives in it.
        let world = WORLD.with(|entered| entered.borrow().clone());
        if let Some(world) = world {
            world.close(self.0);
        }
    }
}

/// Milliseconds; zero: none.
#[derive(Debug, Default)]
struct Timeout(AtomicU64);

impl Timeout {
    fn set(&self, timeout: Option<Duration>) {
        let ms = timeout.map_or(0, |timeout| timeout.as_millis());
        self.0
            .store(u64::try_from(ms).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn get(&self) -> Option<Duration> {
        let ms = self.0.load(Ordering::Relaxed);
        (ms > 0).then(|| Duration::from_millis(ms))
    }
}

/// A socket has its options, whoever has a clone of it.
#[derive(Debug, Default)]
struct Options {
    nonblocking: AtomicBool,
    read: Timeout,
    write: Timeout,
}

/// One end of a connection.
#[derive(Debug)]
pub struct TcpStream {
    end: Arc<End>,
    options: Arc<Options>,
    peer: SocketAddr,
}

impl TcpStream {
    fn new(end: u64, peer: SocketAddr) -> Self {
        Self {
            end: Arc::new(End(end)),
            options: Arc::default(),
            peer,
        }
    }

    /// Connects.
    ///
    /// # Errors
    ///
    /// Those of the world.
    pub fn connect_timeout(address: &SocketAddr, timeout: Duration) -> io::Result<Self> {
        Ok(Self::new(world().connect(*address, timeout)?, *address))
    }

    /// Another handle of this end.
    ///
    /// # Errors
    ///
    /// Never.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            end: Arc::clone(&self.end),
            options: Arc::clone(&self.options),
            peer: self.peer,
        })
    }

    /// Who is at the other end.
    ///
    /// # Errors
    ///
    /// Never.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.peer)
    }

    /// Nothing is held back here.
    ///
    /// # Errors
    ///
    /// Never.
    pub fn set_nodelay(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    /// Whether reads and writes wait.
    ///
    /// # Errors
    ///
    /// Never.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.options
            .nonblocking
            .store(nonblocking, Ordering::Relaxed);
        Ok(())
    }

    /// How long a read waits.
    ///
    /// # Errors
    ///
    /// Never.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.options.read.set(timeout);
        Ok(())
    }

    /// How long a write waits.
    ///
    /// # Errors
    ///
    /// Never.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.options.write.set(timeout);
        Ok(())
    }

    /// Ends one or both directions.
    ///
    /// # Errors
    ///
    /// Never.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        world().shutdown(self.end.0, how);
        Ok(())
    }

    fn attempt<T>(
        &self,
        timeout: Option<Duration>,
        mut attempt: impl FnMut(&dyn World) -> io::Result<T>,
    ) -> io::Result<T> {
        let until = timeout.map(until);
        loop {
            let world = world();
            match attempt(&*world) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let is_over = until.is_some_and(|until| world.now() >= until);
                    if is_over || self.options.nonblocking.load(Ordering::Relaxed) {
                        return Err(error);
                    }
                    world.park(until);
                }
                done => return done,
            }
        }
    }
}

impl Read for &TcpStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.attempt(self.options.read.get(), |world| {
            world.read(self.end.0, buffer)
        })
    }
}

impl Write for &TcpStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.attempt(self.options.write.get(), |world| {
            world.write(self.end.0, pieces)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for TcpStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&mut &*self).read(buffer)
    }
}

impl Write for TcpStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&mut &*self).write(bytes)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        (&mut &*self).write_vectored(pieces)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whom others can connect to.
#[derive(Debug)]
pub struct TcpListener {
    listener: End,
    address: SocketAddr,
}

impl TcpListener {
    /// Listens.
    ///
    /// # Errors
    ///
    /// Those of the world.
    pub fn bind(address: impl ToSocketAddrs) -> io::Result<Self> {
        let address = address.to_socket_addrs()?.next();
        let address = address.ok_or(io::ErrorKind::NotFound)?;
        Ok(Self {
            listener: End(world().listen(address)?),
            address,
        })
    }

    /// It never waits.
    ///
    /// # Errors
    ///
    /// Never.
    pub fn set_nonblocking(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// Never.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    /// Takes in who connects, without waiting.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if nobody does.
    pub fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (end, peer) = world().accept(self.listener.0)?;
        Ok((TcpStream::new(end, peer), peer))
    }
}
