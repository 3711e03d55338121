//! Answers kept for clients that send a request twice under one id because the
//! first answer was lost.

use crate::http::{Response, ResponseBody};
use crate::sync::lock;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex};

/// Answers kept, and bytes of them.
const MOST_REPLIES: usize = 64;
const MOST_BYTES: usize = 16 << 20;

/// Answers by request id.
#[derive(Default)]
pub(super) struct Replies {
    kept: Mutex<VecDeque<(String, Reply)>>,
    done: Condvar,
}

enum Reply {
    /// The first request of this id is still being worked on.
    Pending,
    /// Its answer.
    Done(Kept),
}

#[derive(Clone)]
struct Kept {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Replies {
    /// Gives the answer of this id if there is one, waits for it if it is
    /// being worked on, else has it made by `answer`.
    pub(super) fn once(&self, id: Option<String>, answer: impl FnOnce() -> Response) -> Response {
        let Some(id) = id.filter(|id| !id.is_empty() && id.len() <= 256) else {
            return answer();
        };
        let mut kept = lock(&self.kept);
        loop {
            match kept.iter().find(|(other, _)| *other == id) {
                Some((_, Reply::Done(reply))) => return reply.clone().response(),
                Some((_, Reply::Pending)) => {
                    kept = self
                        .done
                        .wait(kept)
                        .unwrap_or_else(std::sync::PoisonError::into_inner);
                }
                None => break,
            }
        }
        kept.push_back((id.clone(), Reply::Pending));
        drop(kept);
        // A panic must not leave others waiting for ever.
        let mut guard = Unfinished {
            replies: self,
            id: &id,
            reply: None,
        };
        let response = answer();
        guard.reply = Kept::of(&response);
        drop(guard);
        response
    }

    fn finish(&self, id: &str, reply: Option<Kept>) {
        let mut kept = lock(&self.kept);
        let at = kept.iter().position(|(other, _)| other == id);
        match (at, reply) {
            (Some(at), Some(reply)) => kept[at].1 = Reply::Done(reply),
            (Some(at), None) => {
                kept.remove(at);
            }
            (None, _) => {}
        }
        let done_bytes = |kept: &VecDeque<(String, Reply)>| -> (usize, usize) {
            kept.iter()
                .fold((0, 0), |(count, bytes), (_, reply)| match reply {
                    Reply::Done(reply) => (count + 1, bytes + reply.body.len()),
                    Reply::Pending => (count, bytes),
                })
        };
        loop {
            let (count, bytes) = done_bytes(&kept);
            if count <= 1 || count <= MOST_REPLIES && bytes <= MOST_BYTES {
                break;
            }
            let oldest = kept
                .iter()
                .position(|(_, reply)| matches!(reply, Reply::Done(_)));
            match oldest {
                Some(at) => kept.remove(at),
                None => break,
            };
        }
        self.done.notify_all();
    }
}

struct Unfinished<'r> {
    replies: &'r Replies,
    id: &'r str,
    reply: Option<Kept>,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        self.replies.finish(self.id, self.reply.take());
    }
}

impl Kept {
    /// A copy, if the answer can be given again.
    fn of(response: &Response) -> Option<Self> {
        match &response.body {
            ResponseBody::Bytes(body) if body.len() <= MOST_BYTES => Some(Self {
                status: response.status,
                headers: response.headers.clone(),
                body: body.clone(),
            }),
            _ => None,
        }
    }

    fn response(self) -> Response {
        Response {
            status: self.status,
            headers: self.headers,
            body: ResponseBody::Bytes(self.body),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn text(response: &Response) -> String {
        match &response.body {
            ResponseBody::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            _ => String::new(),
        }
    }

    #[test]
    fn a_repeated_id_gets_the_first_answer_even_while_it_is_worked_on() {
        let replies = Replies::default();
        let runs = AtomicU32::new(0);
        let slow = || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            Response::json(200, &runs.fetch_add(1, Ordering::Relaxed))
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| assert_eq!(text(&replies.once(Some("a".into()), slow)), "0"));
            }
        });
        assert_eq!(text(&replies.once(Some("b".into()), slow)), "1");
        assert_eq!(text(&replies.once(Some("a".into()), slow)), "0");
        assert_eq!(text(&replies.once(None, slow)), "2");
    }

    #[test]
    fn old_answers_make_room() {
        let replies = Replies::default();
        for number in 0..1000 {
            replies.once(Some(number.to_string()), || Response::json(200, &number));
        }
        assert_eq!(lock(&replies.kept).len(), MOST_REPLIES);
        assert_eq!(
            text(&replies.once(Some("0".into()), || Response::json(200, &7))),
            "7"
        );
        assert_eq!(
            text(&replies.once(Some("999".into()), || Response::json(200, &7))),
            "999"
        );
    }
}
