//! Failures as a step, its subject and what the system answered, so that they
//! can cross from a sandbox being set up to the engine.

use skyrl_protocol::zygote::StepFailure;
use std::fmt;
use std::path::Path;

/// A step that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed(pub StepFailure);

impl Failed {
    /// A failure the system did not word.
    pub fn because(step: impl Into<String>, subject: impl ToString) -> Self {
        Self(StepFailure {
            step: step.into(),
            subject: subject.to_string(),
            errno: 0,
        })
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StepFailure {
            step,
            subject,
            errno,
        } = &self.0;
        write!(f, "{step} {subject}")?;
        if *errno != 0 {
            write!(f, ": {}", std::io::Error::from_raw_os_error(*errno))?;
        }
        Ok(())
    }
}

impl std::error::Error for Failed {}

/// Says which step an error belongs to.
pub trait Step<T> {
    /// Turns an error into a [`Failed`].
    ///
    /// # Errors
    /// That one.
    fn step(self, step: &str, subject: impl Subject) -> Result<T, Failed>;
}

impl<T, E: Into<std::io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &str, subject: impl Subject) -> Result<T, Failed> {
        self.map_err(|error| {
            let error: std::io::Error = error.into();
            let errno = error.raw_os_error().unwrap_or(0);
            let mut subject = subject.words();
            if errno == 0 {
                subject = format!("{subject}: {error}");
            }
            Failed(StepFailure {
                step: step.to_owned(),
                subject,
                errno,
            })
        })
    }
}

/// What a step is about.
pub trait Subject {
    /// In words.
    fn words(&self) -> String;
}

impl Subject for &str {
    fn words(&self) -> String {
        (*self).to_owned()
    }
}

impl Subject for &String {
    fn words(&self) -> String {
        (*self).clone()
    }
}

impl Subject for &Path {
    fn words(&self) -> String {
        self.display().to_string()
    }
}

impl Subject for &std::path::PathBuf {
    fn words(&self) -> String {
        self.display().to_string()
    }
}

/// The result of a system call made directly.
pub fn check(result: libc::c_long) -> std::io::Result<libc::c_long> {
    if result == -1 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
