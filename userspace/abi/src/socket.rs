// SPDX-License-Identifier: GPL-2.0-only

//! What the libraries in use do not offer of TCP.

use std::os::fd::BorrowedFd;

use nix::libc;

use crate::ffi;

/// A TCP socket takes no more while so many bytes in it have not been sent for the first time.
///
/// What has been sent and waits for its acknowledgement is not meant: the window of the connection grows as ever. So who
/// writes learns within this many bytes that the link is the bottleneck, and a change waits behind no more than these.
///
/// # Errors
///
/// Those of `setsockopt`.
pub fn limit_unsent(socket: BorrowedFd<'_>, bytes: u32) -> nix::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    ffi::set_tcp_option(socket, libc::TCP_NOTSENT_LOWAT, bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_socket_takes_little_more_than_the_limit_beyond_the_window() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // Nobody reads, so the peer's window ends at some point.
        let fill = |limit: Option<u32>| {
            let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (_peer, _) = listener.accept().unwrap();
            stream.set_nonblocking(true).unwrap();
            if let Some(limit) = limit {
                limit_unsent(stream.as_fd(), limit).unwrap();
            }
            let mut taken = 0;
            while let Ok(bytes) = stream.write(&[0; 4096]) {
                taken += bytes;
            }
            taken
        };
        let (limited, free) = (fill(Some(16 << 10)), fill(None));
        assert!(limited + (256 << 10) < free, "{limited} of {free}");
    }
}
