//! Failures of this dialect: exceptions that the client raises again, and
//! refusals of malformed requests.

use super::detail;
use crate::api::python;
use crate::file::FileError;
use crate::http::{BodyError, Response};
use crate::process::SpawnError;
use serde_json::{Value, json};
use std::io;

/// An exception for the client to raise.
#[derive(Debug)]
pub(super) struct Exception {
    class_path: String,
    message: String,
    extra_info: Value,
}

/// Why a request failed.
pub(super) enum Failure {
    /// An exception.
    Raised(Exception),
    /// The request itself is refused.
    Refused(Response),
}

impl Exception {
    /// One of the client's own exceptions.
    pub(super) fn swerex(class: &str, message: impl Into<String>) -> Self {
        Self::of(&format!("swerex.exceptions.{class}"), message)
    }

    /// Any exception, by class path.
    pub(super) fn of(class_path: &str, message: impl Into<String>) -> Self {
        Self {
            class_path: class_path.to_owned(),
            message: message.into(),
            extra_info: json!({}),
        }
    }

    /// Python's own exception for an error of the operating system.
    pub(super) fn os(error: &io::Error, path: &str) -> Self {
        let (class, message) = python::os_error(error, path);
        Self::of(&format!("builtins.{class}"), message)
    }

    /// Adds what the client puts into `extra_info`.
    pub(super) fn with_info(mut self, info: Value) -> Self {
        self.extra_info = info;
        self
    }
}

impl From<Exception> for Failure {
    fn from(exception: Exception) -> Self {
        Self::Raised(exception)
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        let path = error.path.to_string_lossy();
        Self::Raised(match error.source.raw_os_error() {
            Some(_) => Exception::os(&error.source, &path),
            None => Exception::of("builtins.ValueError", error.to_string()),
        })
    }
}

impl From<SpawnError> for Failure {
    fn from(error: SpawnError) -> Self {
        let number = error.errno().map(io::Error::from_raw_os_error);
        let about = match &error {
            SpawnError::WorkingDirectory { path, .. } => path.clone(),
            SpawnError::NotFound { program, .. } | SpawnError::CannotExecute { program, .. } => {
                program.clone()
            }
            SpawnError::NoShell { .. } => "/bin/sh".to_owned(),
            _ => {
                let class = match number {
                    Some(_) => "builtins.OSError",
                    None => "builtins.ValueError",
                };
                return Self::Raised(Exception::of(class, error.to_string()));
            }
        };
        let number = number.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EIO));
        Self::Raised(Exception::os(&number, &about))
    }
}

impl From<BodyError> for Failure {
    fn from(error: BodyError) -> Self {
        Self::Refused(match error {
            BodyError::Json(error) => invalid(json!({
                "type": "json_invalid",
                "loc": ["body", error.column()],
                "msg": "JSON decode error",
                "input": {},
                "ctx": {"error": error.to_string()},
            })),
            BodyError::TooLong(limit) => {
                detail(413, &format!("The request body is over {limit} bytes"))
            }
            BodyError::Io(error) => detail(400, &format!("The request body ended early: {error}")),
        })
    }
}

/// The refusal of a body with this problem.
pub(super) fn invalid(problem: Value) -> Response {
    Response::json(422, &json!({"detail": [problem]}))
}

impl Failure {
    /// As an answer.
    pub(super) fn into_response(self) -> Response {
        match self {
            Self::Refused(response) => response,
            Self::Raised(exception) => Response::json(
                511,
                &json!({"swerexception": {
                    "message": exception.message,
                    "class_path": exception.class_path,
                    "traceback": "",
                    "extra_info": exception.extra_info,
                }}),
            ),
        }
    }
}
