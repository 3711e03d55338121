//! Commands over the wire.

mod common;

use common::TestGuest;
use skyrl_protocol::guest::{ErrorCode, ExecRequest};

#[test]
fn a_command_gives_its_output_and_exit_code() {
    let guest = TestGuest::start();
    let result = guest.shell("echo out; echo err >&2; exit 3");
    assert_eq!(result.exit_code, Some(3));
    assert_eq!(
        (result.stdout.text.as_str(), result.stderr.text.as_str()),
        ("out\n", "err\n")
    );
    let result = guest.exec(&ExecRequest::argv(["pwd"]));
    assert_eq!(result.stdout.text.trim(), guest.work().to_str().unwrap());
}

#[test]
fn what_cannot_be_executed_is_told_apart() {
    let guest = TestGuest::start();
    let code = |request: &ExecRequest| guest.post("/v1/exec", request).error().code;
    assert_eq!(
        code(&ExecRequest::argv(["no-such-program"])),
        ErrorCode::CannotExecute
    );
    let lost = ExecRequest {
        cwd: Some("/no/such/dir".into()),
        ..ExecRequest::shell("true")
    };
    assert_eq!(code(&lost), ErrorCode::NotFound);
    assert_eq!(
        code(&ExecRequest::argv([] as [&str; 0])),
        ErrorCode::BadRequest
    );
}
