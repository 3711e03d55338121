//! Limits as a careless or malicious command meets them, held by control
//! groups (root here) and by resource limits and the watchdog (a plain user
//! here, or root without groups).

use crate::bed::{Bed, busybox, cause_of_end, debian, is_root, ok, run, run_as_plain_user, sh};
use skyrl_protocol::SandboxId;
use skyrl_protocol::guest::ExecRequest;
use skyrl_sandbox::native::NativeOptions;
use skyrl_sandbox::{Engine, EngineError, Limits, SandboxSpec};
use std::time::Instant;

fn id() -> SandboxId {
    "box".parse().unwrap()
}

fn limited(spec: SandboxSpec, limits: Limits) -> SandboxSpec {
    SandboxSpec { limits, ..spec }
}

fn without_cgroups() -> NativeOptions {
    NativeOptions {
        without_cgroups: true,
        ..NativeOptions::default()
    }
}

async fn memory_bomb(options: NativeOptions) {
    let bed = Bed::with(options).await;
    let spec = limited(
        busybox(),
        Limits {
            memory_bytes: Some(48 << 20),
            ..Limits::default()
        },
    );
    let guest = bed.start("box", &spec).await.unwrap();
    let bomb = guest
        .exec(&ExecRequest {
            timeout_ms: Some(20_000),
            ..ExecRequest::argv(["tail", "/dev/zero"])
        })
        .await
        .unwrap();
    assert_eq!(bomb.signal, Some(libc::SIGKILL), "{bomb:?}");
    // The guest survives, the sandbox is told apart from a slow one.
    ok(&sh(&guest, "true").await);
    let stats = bed.engine.stats(&id()).await.unwrap();
    assert_eq!(stats.oom_kills, 1, "{stats:?}");
    assert!(stats.memory_bytes.unwrap() < 48 << 20, "{stats:?}");
    bed.end().await;
}

#[test]
fn a_memory_bomb_is_one_oom_kill_and_the_guest_lives_as_root() {
    run(memory_bomb(NativeOptions::default()));
}

#[test]
fn a_memory_bomb_is_one_oom_kill_and_the_guest_lives_by_watchdog() {
    run(memory_bomb(without_cgroups()));
}

#[test]
fn a_memory_bomb_is_one_oom_kill_and_the_guest_lives_as_a_plain_user() {
    run_as_plain_user(
        "limits::a_memory_bomb_is_one_oom_kill_and_the_guest_lives_as_a_plain_user",
        memory_bomb(NativeOptions::default()),
    );
}

async fn fork_bomb(options: NativeOptions) {
    let bed = Bed::with(options).await;
    let spec = limited(
        busybox(),
        Limits {
            pids: Some(64),
            ..Limits::default()
        },
    );
    let guest = bed.start("box", &spec).await.unwrap();
    // The shell gives up at the first fork that fails; what it started stays.
    let bomb = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); sleep 1000 & done";
    let bomb = sh(
        &guest,
        &format!("({bomb}) >/dev/null 2>&1; f() {{ f | f & }}; f"),
    )
    .await;
    assert!(bomb.exit_code.is_some(), "{bomb:?}");
    let pids = bed.engine.stats(&id()).await.unwrap().pids.unwrap();
    assert!((40..=64).contains(&pids), "{pids} processes");
    // Some of the bomb may live on; the sandbox can still be ended.
    bed.engine.destroy(&id()).await.unwrap();
    bed.end().await;
}

#[test]
fn a_fork_bomb_stays_within_its_limit_as_root() {
    run(fork_bomb(NativeOptions::default()));
}

#[test]
fn a_fork_bomb_stays_within_its_limit_as_a_plain_user() {
    run_as_plain_user(
        "limits::a_fork_bomb_stays_within_its_limit_as_a_plain_user",
        fork_bomb(NativeOptions::default()),
    );
}

async fn disk_bomb() {
    let bed = Bed::new().await;
    let spec = limited(
        busybox(),
        Limits {
            disk_bytes: Some(8 << 20),
            ..Limits::default()
        },
    );
    let guest = bed.start("box", &spec).await.unwrap();
    // One file can't grow beyond it ...
    let one = sh(&guest, "dd if=/dev/zero of=/one bs=1M count=100; rm /one").await;
    assert!(one.stderr.text.contains("limit exceeded"), "{one:?}");
    ok(&sh(
        &guest,
        "dd if=/dev/zero of=/little bs=1M count=4 && rm /little",
    )
    .await);
    // ... and many files end the sandbox.
    let _ = guest
        .exec(&ExecRequest {
            timeout_ms: Some(20_000),
            ..ExecRequest::shell(
                "i=0; while :; do i=$((i+1)); dd if=/dev/zero of=/f$i bs=1M count=4; sleep 0.05; done",
            )
        })
        .await;
    let cause = cause_of_end(&bed.engine, &id()).await;
    assert!(cause.contains("disk limit"), "{cause}");
    bed.end().await;
}

#[test]
fn a_disk_bomb_ends_the_sandbox_with_the_cause_as_root() {
    run(disk_bomb());
}

#[test]
fn a_disk_bomb_ends_the_sandbox_with_the_cause_as_a_plain_user() {
    run_as_plain_user(
        "limits::a_disk_bomb_ends_the_sandbox_with_the_cause_as_a_plain_user",
        disk_bomb(),
    );
}

#[test]
fn cpu_time_is_shared_out_by_the_cgroup() {
    assert!(is_root(), "needs writable cgroups");
    run(async {
        let bed = Bed::new().await;
        let spec = limited(
            busybox(),
            Limits {
                cpus: Some(0.25),
                ..Limits::default()
            },
        );
        let guest = bed.start("box", &spec).await.unwrap();
        let before = bed.engine.stats(&id()).await.unwrap().cpu_seconds.unwrap();
        let busy = ExecRequest {
            timeout_ms: Some(1_500),
            ..ExecRequest::shell("while :; do :; done & while :; do :; done")
        };
        let since = Instant::now();
        guest.exec(&busy).await.unwrap();
        let after = bed.engine.stats(&id()).await.unwrap().cpu_seconds.unwrap();
        let share = (after - before) / since.elapsed().as_secs_f64();
        assert!(share < 0.4, "used {share} of a core");
        bed.end().await;
    });
}

#[test]
fn a_cpu_limit_that_nothing_can_hold_is_refused_before_anything_is_made() {
    run(async {
        let bed = Bed::with(without_cgroups()).await;
        let spec = limited(
            busybox(),
            Limits {
                cpus: Some(1.0),
                ..Limits::default()
            },
        );
        let error = bed.engine.create(&id(), &spec).await.unwrap_err();
        assert!(
            matches!(error, EngineError::LimitUnsupported { limit: "cpus", .. }),
            "{error}"
        );
        bed.end().await;
    });
}

#[test]
fn an_oom_kill_names_its_victim_when_it_was_the_guest_that_died() {
    run(async {
        let bed = Bed::new().await;
        let spec = limited(
            debian(),
            Limits {
                memory_bytes: Some(32 << 20),
                ..Limits::default()
            },
        );
        let guest = bed.start("box", &spec).await.unwrap();
        // Memory nobody can be killed for but whoever is there.
        let _ = guest
            .exec(&ExecRequest {
                timeout_ms: Some(5_000),
                ..ExecRequest::shell("dd if=/dev/zero of=/dev/shm/x bs=1M; sleep 1; cat /dev/zero | head -c 64m | tail")
            })
            .await;
        let stats = bed.engine.stats(&id()).await.unwrap();
        assert!(stats.oom_kills >= 1, "{stats:?}");
        bed.end().await;
    });
}
