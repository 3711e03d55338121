//! Limits hold, by groups or by the watchdog, and their breach is reported.

use crate::bed::{Bed, busybox, cause_of_end, id, ok, run, sh, told_twice};
use skyrl_protocol::guest::ExecRequest;
use skyrl_sandbox::oci::OciOptions;
use skyrl_sandbox::{Engine, EngineError, ImageRef, Liveness, SandboxSpec};

const MIB: u64 = 1 << 20;

async fn memory() {
    let bed = Bed::new().await;
    let static_image = crate::bed::image_path("static");
    let mut spec = SandboxSpec::new(ImageRef::Directory(static_image));
    spec.limits.memory_bytes = Some(64 * MIB);
    let guest = bed.start("box", &spec).await.unwrap();
    let small = ExecRequest::argv(["/probe", "alloc", "16"]);
    ok(&guest.exec(&small).await.unwrap());
    let large = ExecRequest::argv(["/probe", "alloc", "1024"]);
    let killed = guest.exec(&large).await.unwrap();
    assert!(!killed.success(), "{killed:?}");
    let stats = bed.engine.stats(&id("box")).await.unwrap();
    assert!(stats.oom_kills >= 1, "{stats:?}");
    // Only the glutton died.
    ok(&guest.exec(&small).await.unwrap());
    let alive = bed.engine.liveness(&id("box")).await.unwrap();
    assert_eq!(alive, Liveness::Running);
    bed.end().await;
}

told_twice!(
    memory,
    memory_is_bounded_and_the_kill_counted_as_root,
    memory_is_bounded_and_the_kill_counted_as_a_plain_user
);

#[test]
fn a_command_killed_for_memory_says_so() {
    run(async {
        let bed = Bed::new().await;
        let mut spec = busybox();
        spec.limits.memory_bytes = Some(32 * MIB);
        let guest = bed.start("box", &spec).await.unwrap();
        let killed = sh(&guest, "dd if=/dev/zero of=/dev/null bs=200M count=1").await;
        assert!(killed.oom_killed, "{killed:?}");
        let denied = sh(&guest, "echo 1 > /proc/1/fd/4").await;
        assert!(!denied.success(), "the counter of kills can be written");
        bed.end().await;
    });
}

async fn processes() {
    let bed = Bed::new().await;
    let mut spec = busybox();
    spec.limits.pids = Some(40);
    let guest = bed.start("box", &spec).await.unwrap();
    let bomb = "i=0; while [ $i -lt 200 ]; do sleep 30 & i=$((i+1)); done; echo survived";
    let request = ExecRequest {
        timeout_ms: Some(5_000),
        ..ExecRequest::shell(bomb)
    };
    let result = guest.exec(&request).await.unwrap();
    let stats = bed.engine.stats(&id("box")).await.unwrap();
    assert!(stats.pids.unwrap() <= 41, "{stats:?} {result:?}");
    bed.engine.destroy(&id("box")).await.unwrap();
    bed.end().await;
}

told_twice!(
    processes,
    a_fork_bomb_is_contained_as_root,
    a_fork_bomb_is_contained_as_a_plain_user
);

#[test]
fn cpu_time_is_bounded() {
    run(async {
        let bed = Bed::new().await;
        let mut spec = busybox();
        spec.limits.cpus = Some(0.2);
        let guest = bed.start("box", &spec).await.unwrap();
        let used = || async {
            let stats = bed.engine.stats(&id("box")).await.unwrap();
            stats.cpu_seconds.unwrap()
        };
        let before = used().await;
        let busy = ExecRequest {
            timeout_ms: Some(2_000),
            grace_ms: 0,
            ..ExecRequest::shell("while :; do :; done")
        };
        guest.exec(&busy).await.unwrap();
        let spent = used().await - before;
        assert!((0.05..1.0).contains(&spent), "{spent} CPU seconds in 2");
        bed.end().await;
    });
}

async fn disk() {
    let bed = Bed::new().await;
    let mut spec = busybox();
    spec.limits.disk_bytes = Some(8 * MIB);
    let guest = bed.start("box", &spec).await.unwrap();
    ok(&sh(&guest, "dd if=/dev/zero of=/small bs=1M count=2").await);
    let whole = sh(&guest, "dd if=/dev/zero of=/large bs=1M count=64").await;
    assert!(!whole.success(), "one file went over the limit");
    // Many files: each below the bound of one.
    let many = ExecRequest::shell(
        "for i in 1 2 3 4 5 6 7 8 9; do dd if=/dev/zero of=/f$i bs=1M count=7; done; sleep 30",
    );
    // It does not come back: the sandbox is ended.
    let _ = guest.exec(&many).await;
    let cause = cause_of_end(&*bed.engine, &id("box")).await;
    assert!(cause.contains("disk"), "{cause}");
    bed.end().await;
}

told_twice!(
    disk,
    writing_too_much_ends_the_sandbox_as_root,
    writing_too_much_ends_the_sandbox_as_a_plain_user
);

#[test]
fn a_limit_that_can_not_be_held_is_refused() {
    run(async {
        let bed = Bed::with(OciOptions {
            without_cgroups: true,
            ..OciOptions::default()
        })
        .await;
        let mut spec = busybox();
        spec.limits.cpus = Some(1.0);
        let error = bed.engine.create(&id("box"), &spec).await.unwrap_err();
        let refused = matches!(error, EngineError::LimitUnsupported { limit: "cpus", .. });
        assert!(refused, "{error}");
        bed.end().await;
    });
}

#[test]
fn the_death_of_the_guest_is_told_with_how_it_died() {
    run(async {
        let bed = Bed::new().await;
        let guest = bed.start("box", &busybox()).await.unwrap();
        // The init of a PID namespace is immune to its own: the host kills.
        let pid = std::fs::read_to_string(bed.dir.path().join("owners/test/sandboxes/box/pid"));
        let pid = pid.unwrap().trim().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let cause = cause_of_end(&*bed.engine, &id("box")).await;
        assert!(cause.contains("guest"), "{cause}");
        assert!(guest.health().await.is_err());
        bed.end().await;
    });
}
