//! Bytes between commands and their buffers.

use super::command::{Channel, Command, State, Stream};
use super::reactor::Shared;
use rustix::io::Errno;
use std::os::fd::AsFd;

/// Bytes read of a pipe at a time.
pub(super) const READ_SIZE: usize = 64 * 1024;

/// Reads of one pipe before another gets its turn.
const READS_PER_TURN: usize = 4;

enum ReadEnd {
    /// Nothing more now.
    Empty,
    /// The writers are gone.
    Closed,
    /// There may be more.
    More,
}

/// Reads up to `most` bytes once.
fn read_once(channel: &mut Channel, scratch: &mut [u8], most: u64, keep: bool) -> (usize, ReadEnd) {
    let Some(fd) = &channel.fd else {
        return (0, ReadEnd::Closed);
    };
    let most = usize::try_from(most)
        .unwrap_or(usize::MAX)
        .min(scratch.len());
    loop {
        return match rustix::io::read(fd, &mut scratch[..most]) {
            Ok(0) => (0, ReadEnd::Closed),
            Ok(count) => {
                if keep {
                    channel.capture.push(&scratch[..count]);
                }
                (
                    count,
                    if count < most {
                        ReadEnd::Empty
                    } else {
                        ReadEnd::More
                    },
                )
            }
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => (0, ReadEnd::Empty),
            // A terminal whose other side is closed answers EIO.
            Err(_) => (0, ReadEnd::Closed),
        };
    }
}

impl Shared {
    /// Reads what a channel has, a bounded part of it at a time. After the
    /// command's end the bytes are dropped: background processes may go on
    /// writing without being stopped by a full or closed pipe.
    pub(super) fn read_channel(
        &self,
        command: &Command,
        state: &mut State,
        index: usize,
        scratch: &mut [u8],
    ) {
        let keep = state.finished_at.is_none();
        let channel = &mut state.channels[index];
        let mut progress = false;
        for _ in 0..READS_PER_TURN {
            let room = if keep {
                channel.capture.room()
            } else {
                u64::MAX
            };
            if room == 0 {
                if let Some(fd) = &channel.fd {
                    self.ignore(fd);
                }
                channel.paused = true;
                break;
            }
            let (count, end) = read_once(channel, scratch, room, keep);
            progress |= count > 0;
            match end {
                ReadEnd::More => {}
                ReadEnd::Empty => break,
                ReadEnd::Closed => {
                    self.close_channel(channel);
                    progress = true;
                    break;
                }
            }
        }
        if progress && keep {
            command.changed.notify_all();
        }
        self.settle(command, state);
    }

    /// Takes what the command's process left in its pipes: exactly what is
    /// there now, so that a background process can't prolong it.
    pub(super) fn take_rest(&self, state: &mut State) {
        let mut scratch = Vec::new();
        for channel in &mut state.channels {
            let available = channel
                .fd
                .as_ref()
                .and_then(|fd| rustix::io::ioctl_fionread(fd).ok())
                .unwrap_or(0);
            let mut left = available;
            if left > 0 {
                scratch.resize(READ_SIZE, 0);
            }
            while left > 0 {
                let (count, end) = read_once(channel, &mut scratch, left, true);
                left -= (count as u64).min(left);
                match end {
                    ReadEnd::Closed => {
                        self.close_channel(channel);
                        break;
                    }
                    _ if count == 0 => break,
                    _ => {}
                }
            }
        }
    }

    pub(super) fn close_channel(&self, channel: &mut Channel) {
        if let Some(fd) = channel.fd.take() {
            self.ignore(&fd);
        }
    }

    /// Listens to a paused channel again.
    pub(super) fn resume(&self, command: &Command, channel: &mut Channel, stream: Stream) {
        channel.paused = false;
        if let Some(fd) = &channel.fd
            && self.listen(command.key, stream, fd.as_fd()).is_err()
        {
            // Without the reactor's ear the pipe would block its writer for
            // ever; a closed pipe at least tells it.
            channel.fd = None;
        }
    }

    /// Writes queued input as far as the command takes it.
    pub(super) fn flush_input(&self, command: &Command, state: &mut State) {
        let Some(input) = &mut state.input else {
            return;
        };
        let mut closed = false;
        while !input.queue.is_empty() {
            match rustix::io::write(&input.fd, input.queue.as_slices().0) {
                Ok(count) => {
                    input.queue.drain(..count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !input.armed {
                        input.armed = self.listen_input(command.key, input.fd.as_fd()).is_ok();
                        closed = !input.armed;
                    }
                    break;
                }
                // The reader closed it.
                Err(_) => {
                    closed = true;
                    break;
                }
            }
        }
        let done = input.queue.is_empty();
        if done && input.armed {
            self.ignore(&input.fd);
            input.armed = false;
        }
        if closed || (done && input.close_when_empty) {
            self.close_input(state);
        }
        command.changed.notify_all();
    }

    pub(super) fn close_input(&self, state: &mut State) {
        if let Some(input) = state.input.take()
            && input.armed
        {
            self.ignore(&input.fd);
        }
    }
}
