//! Limits are held or refused.

use crate::support::{Place, id, out, sh, start, unique};
use crate::users::{Subordinate, run, run_as_plain_user};
use skyrl_sandbox::cgroup::{Cgroups, Controller};
use skyrl_sandbox::{Engine, EngineError, Liveness};
use std::time::Duration;

async fn memory_processes_and_cpu_are_bounded() {
    let place = Place::new();
    let engine = place.engine().await;
    let mut spec = place.spec();
    spec.limits.memory_bytes = Some(64 << 20);
    spec.limits.pids = Some(40);
    spec.limits.cpus = Some(0.5);
    let name = unique("bounded");
    let guest = start(&engine, &name, &spec).await;

    let forks = sh(
        &guest,
        "i=0; while [ $i -lt 100 ]; do sleep 2 & i=$((i+1)); done; wait",
    )
    .await;
    assert!(
        !forks.success() || forks.stderr.text.contains("fork"),
        "{forks:?}"
    );
    assert!(engine.stats(&id(&name)).await.unwrap().pids.unwrap() <= 40);

    // They are in the way of everything else until they end.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    let hog = sh(&guest, "head -c 200000000 /dev/zero | tail").await;
    assert!(hog.oom_killed, "{hog:?}");
    let stats = engine.stats(&id(&name)).await.unwrap();
    assert!(stats.oom_kills >= 1, "{stats:?}");
    assert_eq!(out(&guest, "echo alive").await, "alive");

    let before = engine.stats(&id(&name)).await.unwrap().cpu_seconds.unwrap();
    let busy = skyrl_protocol::guest::ExecRequest {
        timeout_ms: Some(2_000),
        grace_ms: 100,
        ..skyrl_protocol::guest::ExecRequest::shell("while true; do :; done")
    };
    guest.exec(&busy).await.unwrap();
    let used = engine.stats(&id(&name)).await.unwrap().cpu_seconds.unwrap() - before;
    assert!(used < 1.5, "{used} s of CPU in 2 s at half a core");
}

async fn writing_too_much_ends_a_sandbox() {
    let place = Place::new();
    let engine = place.engine().await;
    let mut spec = place.spec();
    spec.limits.disk_bytes = Some(8 << 20);
    let name = unique("writer");
    let guest = start(&engine, &name, &spec).await;
    out(&guest, "head -c 1000000 /dev/zero > /root/some").await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(
        engine.liveness(&id(&name)).await.unwrap(),
        Liveness::Running
    );
    let request = skyrl_protocol::guest::ExecRequest::shell(
        "head -c 30000000 /dev/zero > /root/more; sleep 60",
    );
    let cut = guest.exec(&request).await;
    assert!(cut.is_err(), "{cut:?}");
    match engine.liveness(&id(&name)).await.unwrap() {
        Liveness::Ended { cause } => assert!(cause.contains("disk limit"), "{cause}"),
        other => panic!("{other:?}"),
    }
    engine.destroy(&id(&name)).await.unwrap();
}

async fn what_nothing_holds_is_refused() {
    let cgroups = Cgroups::probe();
    let place = Place::new();
    let engine = place.engine().await;
    let mut asked = 0;
    for (limit, controller) in [
        ("memory", Controller::Memory),
        ("pids", Controller::Pids),
        ("cpus", Controller::Cpu),
    ] {
        let mut spec = place.spec();
        match limit {
            "memory" => spec.limits.memory_bytes = Some(1 << 30),
            "pids" => spec.limits.pids = Some(100),
            _ => spec.limits.cpus = Some(1.0),
        }
        let created = engine.create(&id(&unique("limited")), &spec).await;
        match cgroups.check(controller) {
            Ok(()) => created.unwrap(),
            Err(reason) => {
                asked += 1;
                let error = created.unwrap_err();
                assert!(
                    matches!(&error, EngineError::LimitUnsupported { limit: named, .. } if *named == limit),
                    "{error}"
                );
                assert!(error.to_string().contains(reason), "{error}");
            }
        }
    }
    assert!(asked > 0 || crate::users::is_root(), "nothing was refused");
}

#[test]
fn memory_processes_and_cpu_are_bounded_as_root() {
    run(memory_processes_and_cpu_are_bounded());
}

#[test]
fn writing_too_much_ends_a_sandbox_as_root() {
    run(writing_too_much_ends_a_sandbox());
}

#[test]
fn writing_too_much_ends_a_sandbox_as_plain_user() {
    run_as_plain_user(
        "limits::writing_too_much_ends_a_sandbox_as_plain_user",
        Subordinate::Granted,
        writing_too_much_ends_a_sandbox(),
    );
}

#[test]
fn what_nothing_holds_is_refused_as_plain_user() {
    run_as_plain_user(
        "limits::what_nothing_holds_is_refused_as_plain_user",
        Subordinate::Granted,
        what_nothing_holds_is_refused(),
    );
}
