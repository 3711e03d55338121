//! What is known of one shell, and how what its terminal says changes it.
//!
//! Pure: it is fed pieces of output and looked at under a lock; it reads no
//! clock but to note when output came, and touches no descriptor.

use super::control::{Carried, carried_flags};
use super::mark::{Mark, Piece};
use super::session::{REACH, Until};
use super::text::{HeadTail, Renderer};
use std::collections::VecDeque;
use std::time::Instant;

/// Output kept while no command runs.
const IDLE_OUTPUT: usize = 64 << 10;

/// What is known of a shell between commands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Working directory.
    pub(crate) cwd: String,
    /// Last background job.
    pub(crate) background: Option<i32>,
    /// Path of `python`, empty when there is none or it is not asked for.
    pub(crate) python: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activity {
    Idle,
    Running,
    Ended(i32),
}

/// A command's end that no caller has seen.
pub(super) struct Finished {
    pub(super) exit_code: i32,
    pub(super) output: String,
    pub(super) dropped: u64,
}

/// How far the output has been searched for texts.
#[derive(Default)]
pub(super) struct Search {
    pub(super) seen: u64,
}

pub(super) struct State {
    pub(super) activity: Activity,
    pub(super) seq: u64,
    pub(super) renderer: Renderer,
    pub(super) unread: HeadTail,
    pub(super) finished: Option<Finished>,
    /// How the running command ended, before its report is complete.
    pub(super) ending: Option<i32>,
    /// Output is that of a prompt command and dropped.
    pub(super) prompting: bool,
    /// Output is the path of python.
    pub(super) python: Option<Vec<u8>>,
    pub(super) carried: Carried,
    pub(super) facts: Facts,
    pub(super) last_output: Instant,
    pub(super) control_queue: VecDeque<Vec<u8>>,
    pub(super) input_queue: VecDeque<u8>,
    pub(super) input_sent: bool,
    /// The command has begun; before that its shell is still reading it, and
    /// an interrupt would cut it in two.
    pub(super) begun: bool,
    /// The shell no longer reads commands: it was replaced by `exec`.
    pub(super) replaced: bool,
    /// An interrupt was sent since the last command began.
    pub(super) interrupted: bool,
    pub(super) closing: bool,
    pub(super) pump_gone: bool,
}

impl State {
    pub(super) fn new(renderer: Renderer, cwd: String) -> Self {
        Self {
            activity: Activity::Idle,
            seq: 0,
            renderer,
            unread: HeadTail::new(IDLE_OUTPUT),
            finished: None,
            ending: None,
            // The shell's own greeting, until the first command.
            prompting: true,
            python: None,
            carried: Carried::default(),
            facts: Facts {
                cwd,
                ..Facts::default()
            },
            last_output: Instant::now(),
            control_queue: VecDeque::new(),
            input_queue: VecDeque::new(),
            input_sent: false,
            begun: true,
            replaced: false,
            interrupted: false,
            closing: false,
            pump_gone: false,
        }
    }

    /// Begins the next numbered conversation with the shell.
    pub(super) fn next(&mut self, begun: bool) {
        self.seq += 1;
        self.activity = Activity::Running;
        self.ending = None;
        self.begun = begun;
        self.last_output = Instant::now();
    }

    /// An end that no caller has seen: the output comes before what follows.
    pub(super) fn unfinish(&mut self) {
        if let Some(finished) = self.finished.take() {
            let idle = self.take_unread().0;
            self.unread.push(finished.output.as_bytes());
            self.unread.push(idle.as_bytes());
        }
    }

    pub(super) fn take_unread(&mut self) -> (String, u64) {
        self.renderer.commit(&mut self.unread);
        self.unread.take()
    }

    pub(super) fn found(&mut self, until: Until<'_>, search: &mut Search) -> Option<usize> {
        if !matches!(until, Until::End) {
            self.renderer.commit(&mut self.unread);
        }
        match until {
            Until::End => None,
            Until::Output => (!self.unread.is_empty()).then_some(0),
            Until::Found(find) => {
                let new = self.unread.total() - search.seen + REACH as u64;
                search.seen = self.unread.total();
                let recent = self
                    .unread
                    .recent(usize::try_from(new).unwrap_or(usize::MAX));
                find(&String::from_utf8_lossy(&recent)).map(|(index, _)| index)
            }
        }
    }

    /// Takes a piece of the terminal's output.
    pub(super) fn take(&mut self, piece: Piece<'_>) {
        match piece {
            Piece::Text(bytes) => {
                if let Some(path) = &mut self.python {
                    path.extend_from_slice(&bytes[..bytes.len().min(8192)]);
                } else if !self.prompting {
                    self.last_output = Instant::now();
                    self.renderer.feed(bytes, &mut self.unread);
                }
            }
            Piece::Mark(mark) => self.marked(mark),
        }
    }

    pub(super) fn marked(&mut self, mark: Mark) {
        match mark {
            Mark::Start { seq } if seq == self.seq => {
                self.prompting = false;
                self.begun = true;
            }
            Mark::Prompt { seq, last: true } if seq == self.seq => self.prompting = false,
            Mark::End { seq, end } if self.is_running(seq) => {
                // The second report of an interrupted one says less.
                self.ending.get_or_insert(end.status);
                self.carried = Carried {
                    status: self.ending.unwrap_or(end.status),
                    flags: carried_flags(&end.flags),
                };
                self.facts.cwd = end.cwd;
                self.facts.background = end.background;
                self.prompting = end.prompt_command;
                // Marks of the report are text-free; what a prompt command
                // prints comes after it.
            }
            // Also in a report that tells nothing new: it is no output.
            Mark::Python { .. } => self.python = Some(Vec::new()),
            Mark::Reported { seq } if self.is_running(seq) => self.finish(),
            Mark::Reported { .. } => self.python = None,
            _ => {}
        }
    }

    pub(super) fn is_running(&self, seq: u64) -> bool {
        seq == self.seq && self.activity == Activity::Running
    }

    pub(super) fn finish(&mut self) {
        let Some(exit_code) = self.ending else {
            return;
        };
        if let Some(path) = self.python.take() {
            let path = String::from_utf8_lossy(&path);
            self.facts.python = path
                .lines()
                .map(str::trim_end)
                .find(|line| line.starts_with('/'))
                .unwrap_or_default()
                .to_owned();
        }
        self.renderer.flush(&mut self.unread);
        let (output, dropped) = self.unread.take();
        self.unread.set_limit(IDLE_OUTPUT);
        self.activity = Activity::Idle;
        self.finished = Some(Finished {
            exit_code,
            output,
            dropped,
        });
    }
}
