//! Requests to Podman's service: JSON over HTTP on its Unix socket, on pooled
//! keep-alive connections, each with a deadline, repeated once when the
//! service died under it and repeating can do no harm.

use super::service::{Address, Service};
use crate::engine::EngineKind;
use crate::error::EngineError;
use crate::guest_client::connect;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// Version of the service's interface that is spoken: Podman 4 and 5 know it.
const PREFIX: &str = "/v4.0.0/libpod";
/// Idle connections kept.
const POOLED: usize = 16;
/// Longest answer read.
const MAX_ANSWER: usize = 64 << 20;

/// Deadline of requests that only look at something.
pub(super) const QUICK: Duration = Duration::from_secs(20);
/// Deadline of requests that start programs.
pub(super) const WORK: Duration = Duration::from_secs(60);

/// Whether a request may be sent a second time when it is not known whether
/// the first one was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// The second does nothing that the first did not do.
    Harmless,
    /// The caller must look what became of the first.
    Never,
}

/// One request.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) method: Method,
    /// Below the prefix, with query.
    pub(super) target: &'a str,
    pub(super) body: Vec<u8>,
    pub(super) deadline: Duration,
    pub(super) repeat: Repeat,
}

impl<'a> Call<'a> {
    pub(super) fn get(target: &'a str) -> Self {
        Self {
            method: Method::GET,
            target,
            body: Vec::new(),
            deadline: QUICK,
            repeat: Repeat::Harmless,
        }
    }

    pub(super) fn post(target: &'a str, deadline: Duration, repeat: Repeat) -> Self {
        Self {
            method: Method::POST,
            target,
            body: Vec::new(),
            deadline,
            repeat,
        }
    }

    pub(super) fn delete(target: &'a str) -> Self {
        Self {
            method: Method::DELETE,
            target,
            body: Vec::new(),
            deadline: WORK,
            repeat: Repeat::Harmless,
        }
    }

    pub(super) fn json(mut self, body: &impl Serialize) -> Result<Self, EngineError> {
        self.body = serde_json::to_vec(body)
            .map_err(|e| EngineError::step("writing the request", self.target, e.into()))?;
        Ok(self)
    }
}

/// What the service answered.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) body: Bytes,
    request: String,
}

impl Reply {
    /// This answer as an error.
    pub(super) fn refusal(&self) -> EngineError {
        EngineError::Podman {
            request: self.request.clone(),
            status: self.status.as_u16(),
            message: self.message(),
        }
    }

    /// What it says, if it is an error.
    pub(super) fn message(&self) -> String {
        #[derive(serde::Deserialize)]
        struct Refusal {
            message: String,
        }
        match serde_json::from_slice::<Refusal>(&self.body) {
            Ok(refusal) => refusal.message,
            Err(_) => String::from_utf8_lossy(&self.body[..self.body.len().min(500)]).into_owned(),
        }
    }

    /// Refuses any status but success.
    pub(super) fn success(self) -> Result<Self, EngineError> {
        if self.status.is_success() {
            Ok(self)
        } else {
            Err(self.refusal())
        }
    }

    /// The body, which must be a success's.
    pub(super) fn read<T: DeserializeOwned>(self) -> Result<T, EngineError> {
        let reply = self.success()?;
        serde_json::from_slice(&reply.body).map_err(|e| EngineError::Podman {
            request: reply.request,
            status: reply.status.as_u16(),
            message: format!("its answer is not understood: {e}"),
        })
    }
}

/// Why a request got no answer.
enum Lost {
    /// Before it was sent whole.
    Unsent(String),
    /// Perhaps after it was heard.
    Unanswered(String),
}

/// Client of one owner's service.
pub(super) struct Rest {
    service: Service,
    idle: Mutex<Vec<(u64, SendRequest<Full<Bytes>>)>>,
}

impl Rest {
    pub(super) fn new(service: Service) -> Self {
        Self {
            service,
            idle: Mutex::default(),
        }
    }

    pub(super) fn service(&self) -> &Service {
        &self.service
    }

    /// Sends a request and reads the whole answer, whatever its status.
    ///
    /// # Errors
    /// [`EngineError::Deadline`], or [`EngineError::HelperGone`] when there is
    /// no service to answer.
    pub(super) async fn send(&self, call: Call<'_>) -> Result<Reply, EngineError> {
        let body = Bytes::from(call.body);
        let work = async {
            let mut tries = 0;
            loop {
                let address = self.service.ensure().await?;
                tries += 1;
                match self
                    .try_once(&address, &call.method, call.target, body.clone())
                    .await
                {
                    Ok(reply) => return Ok(reply),
                    Err(Lost::Unsent(_)) if tries < 3 => {}
                    Err(Lost::Unanswered(_)) if tries < 3 && call.repeat == Repeat::Harmless => {}
                    Err(Lost::Unsent(why) | Lost::Unanswered(why)) => {
                        return Err(EngineError::HelperGone {
                            engine: EngineKind::Podman,
                            helper: "service",
                            reason: format!("{} {}: {why}", call.method, call.target),
                        });
                    }
                }
                // Time to notice that the service ended.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(call.deadline, work)
            .await
            .unwrap_or(Err(EngineError::Deadline {
                verb: "a request to podman's service",
                limit: call.deadline,
            }))
    }

    async fn try_once(
        &self,
        address: &Address,
        method: &Method,
        target: &str,
        body: Bytes,
    ) -> Result<Reply, Lost> {
        let mut connection = self.connection(address).await?;
        let request = Request::builder()
            .method(method)
            .uri(format!("{PREFIX}{target}"))
            .header(HOST, "podman")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|e| Lost::Unsent(e.to_string()))?;
        let answer = connection
            .send_request(request)
            .await
            .map_err(|e| Lost::Unanswered(e.to_string()))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|e| Lost::Unanswered(e.to_string()))?
            .to_bytes();
        let mut idle = self.idle();
        if idle.len() < POOLED {
            idle.push((address.number, connection));
        }
        Ok(Reply {
            status,
            body,
            request: format!("{method} {target}"),
        })
    }

    async fn connection(&self, address: &Address) -> Result<SendRequest<Full<Bytes>>, Lost> {
        loop {
            let pooled = self.idle().pop();
            match pooled {
                Some((number, connection)) if number == address.number && connection.is_ready() => {
                    return Ok(connection);
                }
                Some(_) => {}
                None => break,
            }
        }
        let unsent = |e: &dyn std::fmt::Display| Lost::Unsent(e.to_string());
        let stream = connect(&address.socket).await.map_err(|e| unsent(&e))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| unsent(&e))?;
        // Ends by itself when the sender is dropped or the service hangs up.
        tokio::spawn(connection);
        Ok(sender)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(u64, SendRequest<Full<Bytes>>)>> {
        match self.idle.lock() {
            Ok(idle) => idle,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

/// A value of a query string.
pub(super) fn query(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_value_can_hold_anything() {
        assert_eq!(query("a/b:1@x y&=%"), "a%2Fb%3A1%40x%20y%26%3D%25");
    }

    #[test]
    fn an_error_of_podman_is_told_in_its_own_words() {
        let reply = Reply {
            status: StatusCode::NOT_FOUND,
            body: Bytes::from_static(br#"{"cause":"x","message":"no such image","response":404}"#),
            request: "GET /images/x/json".into(),
        };
        assert_eq!(
            reply.read::<serde_json::Value>().unwrap_err().to_string(),
            "podman answered 404 to GET /images/x/json: no such image"
        );
    }
}
