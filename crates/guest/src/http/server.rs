//! Accepts connections, a bounded number of them, one thread each.

use super::{Service, connection};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Most connections served at a time; more are answered 503.
const MAX_CONNECTIONS: usize = 1024;

/// Stack of a connection's thread, in bytes. Only what is touched costs
/// memory.
const STACK: usize = 512 * 1024;

/// How long accepting rests when the process is out of descriptors.
const BACK_OFF: Duration = Duration::from_millis(20);

struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves until the listener fails for good.
pub fn serve<S: Service + ?Sized>(listener: &UnixListener, service: &Arc<S>) -> io::Error {
    if let Err(error) = listener.set_nonblocking(false) {
        return error;
    }
    let taken = Arc::new(AtomicUsize::new(0));
    loop {
        match listener.accept() {
            Ok((stream, _)) => seat(stream, &taken, service),
            Err(error) => match error.raw_os_error() {
                // The client left before it was accepted.
                Some(libc::ECONNABORTED | libc::EINTR) => {}
                Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                    wait_for_descriptors(listener);
                }
                _ => return error,
            },
        }
    }
}

fn seat<S: Service + ?Sized>(stream: UnixStream, taken: &Arc<AtomicUsize>, service: &Arc<S>) {
    // A listener inherited as non-blocking hands that on.
    if stream.set_nonblocking(false).is_err() {
        return;
    }
    if taken.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
        taken.fetch_sub(1, Ordering::Relaxed);
        turn_away(&stream);
        return;
    }
    let seat = Seat(Arc::clone(taken));
    let service = Arc::clone(service);
    // Without a thread the connection closes; the client sees that.
    let _ = thread::Builder::new()
        .name("connection".into())
        .stack_size(STACK)
        .spawn(move || {
            let _seat = seat;
            // A connection that breaks concerns its client only.
            let _ = connection::serve(stream, &*service);
        });
}

fn turn_away(stream: &UnixStream) {
    let patience = Some(Duration::from_millis(10));
    if stream.set_write_timeout(patience).is_ok() {
        connection::refuse(stream, 503, "too many connections to this sandbox");
    }
}

/// Rests until there is something to accept and a moment has passed, so that
/// being out of descriptors does not spin.
fn wait_for_descriptors(listener: &UnixListener) {
    thread::sleep(BACK_OFF);
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(
        listener.as_fd(),
        rustix::event::PollFlags::IN,
    )];
    // Whatever happened, accept says it.
    let _ = rustix::event::poll(&mut fds, None);
}
