//! How failures look on the native API.

use crate::http::{BodyError, Response};
use crate::process::{InputError, SpawnError, TableFull};
use skyrl_protocol::guest::{ErrorBody, ErrorCode};
use std::io;

/// A failure as the native API tells it.
#[derive(Debug)]
pub struct ApiError {
    /// Its body.
    pub body: ErrorBody,
}

/// What a native route gives.
pub type ApiResult = Result<Response, ApiError>;

impl ApiError {
    /// A failure of a kind.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            body: ErrorBody {
                code,
                message: message.into(),
                hint: None,
            },
        }
    }

    /// A malformed request.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::BadRequest, message)
    }

    /// Something named does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::NotFound, message)
    }

    /// Adds what to do next.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.body.hint = Some(hint.into());
        self
    }

    /// The status code that goes with the kind.
    pub fn status(&self) -> u16 {
        match self.body.code {
            ErrorCode::BadRequest | ErrorCode::CannotExecute | ErrorCode::NoShell => 400,
            ErrorCode::PermissionDenied => 403,
            ErrorCode::NotFound => 404,
            ErrorCode::Conflict => 409,
            ErrorCode::LimitReached => 429,
            ErrorCode::NotSupported => 501,
            ErrorCode::DiskFull => 507,
            ErrorCode::Io => 500,
        }
    }

    /// As an answer.
    pub fn response(&self) -> Response {
        Response::json(self.status(), &self.body)
    }

    /// An error of the operating system, with what was being done.
    pub fn io(doing: &str, error: &io::Error) -> Self {
        Self::new(code_of(error), format!("{doing}: {error}"))
    }
}

/// The kind an error of the operating system belongs to.
pub fn code_of(error: &io::Error) -> ErrorCode {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => ErrorCode::NotFound,
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => ErrorCode::PermissionDenied,
        Some(libc::EEXIST | libc::ENOTEMPTY | libc::EISDIR | libc::EBUSY | libc::ETXTBSY) => {
            ErrorCode::Conflict
        }
        Some(libc::ENOSPC | libc::EDQUOT) => ErrorCode::DiskFull,
        Some(libc::EMFILE | libc::ENFILE | libc::EAGAIN | libc::ENOMEM) => ErrorCode::LimitReached,
        Some(libc::ENAMETOOLONG | libc::EINVAL | libc::ELOOP) => ErrorCode::BadRequest,
        _ if error.kind() == io::ErrorKind::InvalidData => ErrorCode::BadRequest,
        _ => ErrorCode::Io,
    }
}

impl From<BodyError> for ApiError {
    fn from(error: BodyError) -> Self {
        let code = match &error {
            BodyError::Io(_) | BodyError::Json(_) => ErrorCode::BadRequest,
            BodyError::TooLong(_) => ErrorCode::LimitReached,
        };
        Self::new(code, error.to_string())
    }
}

impl From<SpawnError> for ApiError {
    fn from(error: SpawnError) -> Self {
        let code = match &error {
            SpawnError::Invalid(_) => ErrorCode::BadRequest,
            SpawnError::WorkingDirectory { source, .. } => code_of(source),
            SpawnError::NotFound { .. } | SpawnError::CannotExecute { .. } => {
                ErrorCode::CannotExecute
            }
            SpawnError::NoShell { .. } => ErrorCode::NoShell,
            SpawnError::User { .. } => ErrorCode::PermissionDenied,
            SpawnError::Terminal(_) => ErrorCode::NotSupported,
            SpawnError::TooMany { .. } => ErrorCode::LimitReached,
            SpawnError::Resources { source, .. } => code_of(source),
        };
        let hint = error.hint();
        let mut answer = Self::new(code, error.to_string());
        answer.body.hint = hint.map(str::to_owned);
        answer
    }
}

impl From<InputError> for ApiError {
    fn from(error: InputError) -> Self {
        match error {
            InputError::Closed => Self::new(
                ErrorCode::Conflict,
                "standard input of the command is closed",
            )
            .with_hint("start it with keep_stdin to write to it later"),
            InputError::TimedOut => Self::new(
                ErrorCode::LimitReached,
                "the command did not read its standard input in time",
            ),
        }
    }
}

impl From<TableFull> for ApiError {
    fn from(error: TableFull) -> Self {
        Self::new(ErrorCode::LimitReached, error.to_string())
            .with_hint("delete finished commands, or kill some")
    }
}
