//! The native API of the guest: what an engine's owner and a guest say to each
//! other over the sandbox's Unix socket. JSON over HTTP/1.1 under `/v1`.
//!
//! | method, path | body | answer |
//! |---|---|---|
//! | `GET /v1/health` | | [`Health`] |
//! | `PUT /v1/lease` | [`Lease`] | `{}`; the guest ends itself when a lease runs out |
//! | `PUT /v1/session-key` | [`SessionKey`] | `{}`; what the clients' dialects ask for |
//! | `POST /v1/exec` | [`ExecRequest`] | [`ExecResult`], or with `stream` NDJSON [`ExecEvent`]s |
//! | `POST /v1/commands` | [`ExecRequest`] | [`CommandStatus`] of a command that outlives the call |
//! | `GET /v1/commands` | | `[CommandStatus]` |
//! | `GET /v1/commands/{id}?wait_ms=` | | [`CommandStatus`] |
//! | `GET /v1/commands/{id}/output?stream=stdout&offset=&limit=` | | bytes |
//! | `POST /v1/commands/{id}/stdin?close=true` | bytes | `{}` |
//! | `POST /v1/commands/{id}/signal` | [`SignalRequest`] | [`CommandStatus`] |
//! | `DELETE /v1/commands/{id}` | | `{}`; kills it if it runs |
//! | `POST /v1/terminal` + `Upgrade: skyrl-terminal` | [`TerminalRequest`] | framed PTY, see [`frame`] |
//! | `POST /v1/shells` | [`ShellSpec`] | [`ShellInfo`] |
//! | `GET /v1/shells` | | `[ShellInfo]` |
//! | `POST /v1/shells/{id}/run` | [`ShellRun`] | [`ShellOutput`] |
//! | `POST /v1/shells/{id}/input` | [`ShellInput`] | [`ShellOutput`] |
//! | `POST /v1/shells/{id}/read` | [`ShellRead`] | [`ShellOutput`] |
//! | `POST /v1/shells/{id}/interrupt` | [`ShellRead`] | [`ShellOutput`] |
//! | `DELETE /v1/shells/{id}` | | `{}` |
//! | `GET /v1/file?path=&offset=&limit=` | | bytes |
//! | `PUT /v1/file?path=&mode=&parents=true` | bytes | `{}`; written atomically |
//! | `DELETE /v1/file?path=&recursive=true` | | `{}` |
//! | `GET /v1/file/stat?path=` | | [`FileStat`] |
//! | `GET /v1/file/list?path=&limit=` | | [`FileList`] |
//! | `PUT /v1/tar?path=&gzip=true` | tar stream | [`TarSummary`] |
//! | `GET /v1/tar?path=&gzip=true` | | tar stream of a file or directory |
//! | `POST /v1/edit` | [`EditRequest`] | [`EditResult`] |
//! | `POST /v1/search/text` | [`TextSearch`] | [`TextMatches`] |
//! | `POST /v1/search/files` | [`FileSearch`] | [`FileMatches`] |
//! | `GET /v1/git/status?path=` | | [`GitStatus`] |
//! | `GET /v1/git/diff?path=&base=` | | unified diff, bytes |
//!
//! The output of a command is addressed by offset: the header `skyrl-offset`
//! is the offset of the first byte sent (later than asked for when bytes were
//! dropped), `skyrl-total` what was written so far, `skyrl-ended` whether that
//! is all.
//!
//! Paths of files are absolute, or relative to the guest's default directory.
//! `mode` is octal. Reading a file gives its whole size as `skyrl-size`. A tar
//! stream of a directory names its entries relative to it, one of a file has
//! that file's own name; unpacked files belong to the guest's user, and devices,
//! FIFOs, sparse files and names or links that leave the target are refused.
//!
//! Errors are [`ErrorBody`] with a 4xx or 5xx status.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Body of every error answer of the native API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What kind of failure, for programs.
    pub code: ErrorCode,
    /// What happened and why, for people.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Kinds of failure of the native API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is malformed.
    BadRequest,
    /// No such file, command, shell or route.
    NotFound,
    /// The thing exists already, or is in a state that forbids the request.
    Conflict,
    /// The sandbox's kernel or file permissions refused.
    PermissionDenied,
    /// The program does not exist in the sandbox or can't be executed.
    CannotExecute,
    /// The request asks for a shell and the image has none.
    NoShell,
    /// A bound of the guest (commands, shells, bytes) is reached.
    LimitReached,
    /// The disk of the sandbox is full.
    DiskFull,
    /// Not offered by this guest.
    NotSupported,
    /// Anything else the operating system answered.
    Io,
}

/// Answer of `GET /v1/health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Always `"ok"`: a guest that can't serve does not answer.
    pub status: String,
    /// Version of the guest.
    pub version: String,
    /// Milliseconds since the guest started.
    pub uptime_ms: u64,
    /// Milliseconds since the last request other than health and lease.
    pub idle_ms: u64,
    /// Commands and shells alive now.
    pub running: u32,
}

/// How long the guest may live without hearing from its owner again. Time
/// spent frozen does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Seconds from now; 0 removes the lease.
    pub seconds: u32,
}

/// The key that clients of the dialects (not of the native API, whose door is
/// the socket's permissions) have to send. A guest starts with the one in its
/// environment: `SESSION_API_KEY`, else `OH_SESSION_API_KEYS_0`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionKey {
    /// The key; null: every request is accepted.
    pub key: Option<String>,
}

/// What to run: a program with arguments, or a line for a shell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Program {
    /// A program and its arguments; needs no shell in the image. A name
    /// without `/` is looked up in the command's `PATH`.
    Argv(Vec<String>),
    /// A command line for the image's `/bin/sh -c`.
    Shell(String),
}

/// One command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// What to run.
    pub program: Program,
    /// Working directory; the guest's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Variables added to (or replacing those of) the sandbox's environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Start from an empty environment instead of the sandbox's.
    #[serde(default)]
    pub clear_env: bool,
    /// Text given on standard input; absent or empty: end of file at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Keep standard input open for `POST /v1/commands/{id}/stdin`.
    #[serde(default)]
    pub keep_stdin: bool,
    /// Wall time in milliseconds after which the command's processes are
    /// killed; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Milliseconds between SIGTERM and SIGKILL at the timeout.
    #[serde(default = "default_grace_ms")]
    pub grace_ms: u64,
    /// Bytes kept of each of stdout and stderr: the first half and the last
    /// half of it; what lies between is counted and dropped.
    #[serde(default = "default_output_limit")]
    pub output_limit: u64,
    /// Send stderr where stdout goes.
    #[serde(default)]
    pub merge_output: bool,
    /// Run as this numeric user and group instead of the guest's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserGroup>,
    /// When a command counts as finished.
    #[serde(default)]
    pub finish: Finish,
    /// `POST /v1/exec` only: answer with NDJSON events as output appears.
    #[serde(default)]
    pub stream: bool,
}

/// Default of [`ExecRequest::grace_ms`].
pub fn default_grace_ms() -> u64 {
    1_000
}

/// Default of [`ExecRequest::output_limit`]: 1 MiB.
pub fn default_output_limit() -> u64 {
    1 << 20
}

impl ExecRequest {
    /// A command with every setting at its default.
    pub fn new(program: Program) -> Self {
        Self {
            program,
            cwd: None,
            env: BTreeMap::new(),
            clear_env: false,
            stdin: None,
            keep_stdin: false,
            timeout_ms: None,
            grace_ms: default_grace_ms(),
            output_limit: default_output_limit(),
            merge_output: false,
            user: None,
            finish: Finish::default(),
            stream: false,
        }
    }

    /// A program with arguments.
    pub fn argv<I, S>(argv: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self::new(Program::Argv(argv.into_iter().map(Into::into).collect()))
    }

    /// A line for the image's shell.
    pub fn shell(line: impl Into<String>) -> Self {
        Self::new(Program::Shell(line.into()))
    }
}

/// Numeric user and group inside the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserGroup {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// When a command counts as finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// When its own process has ended; background children that still hold
    /// the pipes are left running and their later output is dropped.
    #[default]
    ProcessExits,
    /// When its process has ended and both pipes are closed.
    PipesClose,
}

/// What a finished command was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExecResult {
    /// Exit code; absent when a signal ended it.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The wall-time limit was reached.
    pub timed_out: bool,
    /// The kernel's out-of-memory killer struck in this sandbox meanwhile.
    pub oom_killed: bool,
    /// Standard output.
    pub stdout: Output,
    /// Standard error; empty when merged.
    pub stderr: Output,
    /// What it used.
    pub usage: Usage,
}

impl ExecResult {
    /// Whether the command ended by itself with code 0.
    pub fn success(&self) -> bool {
        self.exit_code == Some(0) && !self.timed_out
    }
}

/// A captured stream.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Output {
    /// The text kept; invalid UTF-8 is replaced by U+FFFD. When bytes were
    /// dropped, a line between the halves says how many.
    pub text: String,
    /// Bytes the command wrote in all.
    pub total_bytes: u64,
    /// Bytes dropped from the middle.
    pub dropped_bytes: u64,
}

/// Resources a command's process (with the children it waited for) used.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Wall time in milliseconds.
    pub wall_ms: f64,
    /// User CPU time in milliseconds.
    pub user_ms: f64,
    /// System CPU time in milliseconds.
    pub system_ms: f64,
    /// Largest resident set in KiB.
    pub max_rss_kib: u64,
}

/// One line of a streamed `POST /v1/exec`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum ExecEvent {
    /// The process exists.
    Started {
        /// Its process id inside the sandbox.
        pid: i32,
    },
    /// It wrote to standard output.
    Stdout {
        /// Text; a character cut by a read is held back until it is whole.
        text: String,
    },
    /// It wrote to standard error.
    Stderr {
        /// As for stdout.
        text: String,
    },
    /// It ended; `text` of the outputs is empty, since it was streamed.
    Finished {
        /// The result.
        result: Box<ExecResult>,
    },
}

/// A command that outlives the request that started it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CommandStatus {
    /// Names it in later requests: 32 hexadecimal digits.
    pub id: String,
    /// Process id inside the sandbox.
    pub pid: i32,
    /// Present once it has finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<ExecResult>,
}

/// Sends a signal to all processes of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalRequest {
    /// Signal number.
    pub signal: i32,
}

/// An interactive program on a terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalRequest {
    /// What to run; absent: the image's bash, else its sh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<Program>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Added environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Run as this user and group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserGroup>,
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// Frames of an upgraded `/v1/terminal` connection, both ways: one type byte,
/// a 4-byte big-endian length, the payload (at most [`frame::MAX_PAYLOAD`]).
pub mod frame {
    /// Terminal bytes, both ways.
    pub const DATA: u8 = 0;
    /// Client to guest: columns and rows, two big-endian u16.
    pub const RESIZE: u8 = 1;
    /// Guest to client, last: JSON of [`super::ExecResult`].
    pub const EXIT: u8 = 2;
    /// Longest payload of a frame, in bytes.
    pub const MAX_PAYLOAD: u32 = 1 << 20;
    /// Name of the protocol in the `Upgrade` header.
    pub const PROTOCOL: &str = "skyrl-terminal";
}

/// A persistent shell on a PTY.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ShellSpec {
    /// Its name; made up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Path of the shell; absent: the image's bash, else its sh. Other shells
    /// must be POSIX shells with `-i`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<String>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Added environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Run as this user and group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserGroup>,
    /// Which start files it reads first.
    #[serde(default)]
    pub startup: ShellStartup,
    /// How terminal output becomes text.
    #[serde(default)]
    pub text: ShellText,
    /// Whether input sent to a program shows in the output.
    #[serde(default)]
    pub echo: bool,
    /// Columns of the terminal; 200 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<u16>,
    /// Rows of the terminal; 50 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u16>,
}

/// The start files of a persistent shell. They run as its first command, with
/// the terminal as standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShellStartup {
    /// None.
    None,
    /// Those of an interactive shell: `/etc/bash.bashrc` and `~/.bashrc`, or
    /// the file that `ENV` names.
    #[default]
    Interactive,
    /// Those of a login shell: `/etc/profile` and the first of
    /// `~/.bash_profile`, `~/.bash_login`, `~/.profile`.
    Login,
}

/// How terminal output becomes text. Invalid UTF-8 is replaced in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShellText {
    /// As the terminal got it.
    Raw,
    /// Without escape sequences; `\r\n` is `\n`.
    #[default]
    Plain,
    /// As lines of a screen: also carriage returns and backspaces have done
    /// their work, so a progress bar is one line in its last state.
    Screen,
}

/// A persistent shell as listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShellInfo {
    /// Its name.
    pub id: String,
    /// Process id inside the sandbox.
    pub pid: i32,
    /// Path of the shell program.
    pub shell: String,
    /// Whether a command runs in its foreground.
    pub busy: bool,
    /// Whether it lives.
    pub alive: bool,
    /// Another program took its place (`exec`); it takes no commands.
    pub replaced: bool,
}

/// Runs a command line in a persistent shell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShellRun {
    /// The command line; several lines are allowed.
    pub command: String,
    /// Milliseconds to wait for its end; it keeps running after that.
    #[serde(default = "default_shell_timeout_ms")]
    pub timeout_ms: u64,
    /// Answer earlier when nothing new was printed for so long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiet_ms: Option<u64>,
    /// Bytes of output kept, first and last half.
    #[serde(default = "default_output_limit")]
    pub output_limit: u64,
}

/// Default of [`ShellRun::timeout_ms`]: two minutes.
pub fn default_shell_timeout_ms() -> u64 {
    120_000
}

/// Input for the program in a shell's foreground.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShellInput {
    /// What to send.
    pub input: Keys,
    /// Then wait so long for output or the command's end.
    #[serde(default)]
    pub wait_ms: u64,
}

/// Text or one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keys {
    /// Sent as it is.
    Text(String),
    /// Sent, then Enter.
    Line(String),
    /// A key by name: `C-c`, `C-d`, `C-z`, `Enter`, `Tab`, `Escape`, `Up`,
    /// `Down`, `Left`, `Right`, `Backspace`, `C-<letter>`.
    Key(String),
}

/// Asks for output not yet returned.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ShellRead {
    /// Wait so long for output or the command's end.
    #[serde(default)]
    pub wait_ms: u64,
    /// Wait not for any output but for one of these texts; the output ends
    /// before the first found.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expect: Vec<String>,
}

/// What a shell printed since the last answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShellOutput {
    /// New output, without the echoed command and the prompt. When bytes were
    /// dropped, a line between the halves says how many.
    pub output: String,
    /// Bytes dropped from the middle of it.
    pub dropped_bytes: u64,
    /// What became of the command.
    pub state: ShellState,
    /// The shell's working directory, when the shell is idle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Which of the expected texts was found, counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<u32>,
}

/// What became of a shell's command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum ShellState {
    /// It ended.
    Completed {
        /// Its exit code.
        exit_code: i32,
    },
    /// The wait ended first; the command goes on.
    Running,
    /// Nothing new was printed for `quiet_ms`; the command goes on.
    Quiet,
    /// Nothing runs, nothing ran since the last answer.
    Idle,
    /// The shell itself ended.
    Exited {
        /// Its exit code, or 128 + signal.
        exit_code: i32,
    },
}

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStat {
    /// Last component of the path.
    pub name: String,
    /// Kind of file; links are not followed.
    pub kind: FileKind,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, milliseconds since 1970.
    pub modified_ms: i64,
    /// Where a symbolic link points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// Kinds of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Device, FIFO or socket.
    Other,
}

/// A directory's entries, sorted by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileList {
    /// The entries.
    pub entries: Vec<FileStat>,
    /// There were more than the limit.
    pub truncated: bool,
}

/// What an extracted tar stream held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TarSummary {
    /// Entries written.
    pub entries: u64,
    /// Bytes of file content written.
    pub bytes: u64,
}

/// One editor operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "command")]
pub enum EditRequest {
    /// Shows a file with line numbers, or a directory two levels deep.
    View {
        /// Absolute path.
        path: String,
        /// First and last line, from 1; -1 as the last means the end.
        #[serde(default)]
        view_range: Option<(i64, i64)>,
    },
    /// Makes a new file.
    Create {
        /// Absolute path that does not exist.
        path: String,
        /// Content.
        file_text: String,
    },
    /// Replaces the one occurrence of a text.
    StrReplace {
        /// Absolute path.
        path: String,
        /// Text to find, exactly once.
        old_str: String,
        /// Replacement; absent: remove.
        #[serde(default)]
        new_str: Option<String>,
    },
    /// Inserts lines after a line.
    Insert {
        /// Absolute path.
        path: String,
        /// Line after which to insert; 0 inserts at the top.
        insert_line: i64,
        /// Text.
        new_str: String,
    },
    /// Takes the last edit of a file back.
    UndoEdit {
        /// Absolute path.
        path: String,
    },
}

/// Answer of an editor operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EditResult {
    /// What the agent sees; begins with `ERROR:` when `failed`.
    pub output: String,
    /// The operation was refused.
    pub failed: bool,
    /// Whether the file existed before.
    pub existed: bool,
    /// Content before, where there was any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_content: Option<String>,
    /// Content after, where it changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_content: Option<String>,
}

/// Looks for a regular expression in files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextSearch {
    /// Regular expression (Rust `regex` syntax), matched per line.
    pub pattern: String,
    /// Directory or file to search.
    pub path: String,
    /// Only files whose path below `path` matches this glob.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub glob: Option<String>,
    /// Ignore case.
    #[serde(default)]
    pub ignore_case: bool,
    /// Matches returned at most.
    #[serde(default = "default_search_limit")]
    pub limit: u32,
}

/// Looks for files by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSearch {
    /// Glob on the path below `path` (`**`, `*`, `?`, `[..]`, `{a,b}`); a
    /// glob without `/` is matched against the name only.
    pub glob: String,
    /// Directory to search.
    pub path: String,
    /// Results returned at most.
    #[serde(default = "default_search_limit")]
    pub limit: u32,
}

/// Default limit of searches.
pub fn default_search_limit() -> u32 {
    100
}

/// Lines found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TextMatches {
    /// In order of path and line.
    pub matches: Vec<TextMatch>,
    /// There were more than the limit, or the time for a search ran out.
    pub truncated: bool,
    /// Files read.
    pub files_searched: u64,
}

/// One line found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextMatch {
    /// Path of the file.
    pub path: String,
    /// Line number from 1.
    pub line: u64,
    /// The line, cut to 500 characters.
    pub text: String,
}

/// Files found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FileMatches {
    /// Sorted paths.
    pub paths: Vec<String>,
    /// There were more than the limit, or the time for a search ran out.
    pub truncated: bool,
}

/// State of a git work tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GitStatus {
    /// Branch, absent when detached.
    pub branch: Option<String>,
    /// Commit id of HEAD, absent in an empty repository.
    pub head: Option<String>,
    /// Changed paths, sorted.
    pub changes: Vec<GitChange>,
}

/// One changed path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GitChange {
    /// Path relative to the directory asked about.
    pub path: String,
    /// How it changed.
    pub status: GitChangeKind,
}

/// How a path changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum GitChangeKind {
    /// New, or untracked.
    Added,
    /// Content or mode differs.
    Updated,
    /// Gone.
    Deleted,
    /// Renamed.
    Moved,
}
