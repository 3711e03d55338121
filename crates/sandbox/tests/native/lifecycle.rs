//! From create to destroy, on every kind of image and root.

use crate::bed::{Bed, busybox, debian, image_path, is_root, ok, run, run_as_plain_user, sh};
use skyrl_protocol::SandboxId;
use skyrl_protocol::guest::{ExecRequest, UserGroup};
use skyrl_sandbox::native::NativeOptions;
use skyrl_sandbox::rootfs::RootMethod;
use skyrl_sandbox::{Engine, EngineError, ImageRef, Liveness, SandboxSpec, SnapshotMode};

fn id(name: &str) -> SandboxId {
    name.parse().unwrap()
}

/// The whole life of a sandbox, and what it sees.
async fn a_sandbox_lives_and_leaves_nothing() {
    let bed = Bed::new().await;
    let mut spec = busybox();
    spec.env.insert("GREETING".into(), "hello".into());
    spec.workdir = Some("/work/deep".into());
    let guest = bed.start("box", &spec).await.unwrap();
    let seen = sh(
        &guest,
        "echo $GREETING; pwd; hostname; id -u; cat /etc/hostname; ls -d /tmp /proc/1 /sys/class; echo $$",
    )
    .await;
    let seen = ok(&seen);
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(
        lines[..5],
        ["hello", "/work/deep", "box", "0", "box"],
        "{seen}"
    );
    ok(&sh(
        &guest,
        "echo x > /etc/new && rm /bin/ls && mkdir /srv/x -p && test -w /tmp",
    )
    .await);
    ok(&sh(
        &guest,
        "ping -c 1 -W 1 127.0.0.1 || nc -z 127.0.0.1 1; true",
    )
    .await);
    let stats = bed.engine.stats(&id("box")).await.unwrap();
    assert!(stats.memory_bytes.unwrap() > 0, "{stats:?}");
    assert!(stats.pids.unwrap() >= 1, "{stats:?}");
    assert!(stats.cpu_seconds.is_some(), "{stats:?}");
    assert!(stats.disk_bytes.unwrap() > 0, "{stats:?}");
    assert_eq!(
        bed.engine.liveness(&id("box")).await.unwrap(),
        Liveness::Running
    );
    let again = bed.engine.create(&id("box"), &spec).await.unwrap_err();
    assert!(matches!(again, EngineError::Exists(_)), "{again}");
    bed.engine.destroy(&id("box")).await.unwrap();
    bed.engine.destroy(&id("box")).await.unwrap();
    assert!(image_path("busybox/bin/ls").exists());
    bed.end().await;
}

#[test]
fn a_sandbox_lives_and_leaves_nothing_as_root() {
    run(a_sandbox_lives_and_leaves_nothing());
}

#[test]
fn a_sandbox_lives_and_leaves_nothing_as_a_plain_user() {
    run_as_plain_user(
        "lifecycle::a_sandbox_lives_and_leaves_nothing_as_a_plain_user",
        a_sandbox_lives_and_leaves_nothing(),
    );
}

async fn images_without_a_shell_run_programs() {
    let bed = Bed::new().await;
    let spec = SandboxSpec::new(ImageRef::Directory(image_path("static")));
    let guest = bed.start("static", &spec).await.unwrap();
    let result = guest
        .exec(&ExecRequest::argv(["/probe", "args", "a b", "c"]))
        .await
        .unwrap();
    assert_eq!(ok(&result), "a b\nc");
    let error = guest.exec(&ExecRequest::shell("true")).await.unwrap_err();
    assert!(error.to_string().contains("sh"), "{error}");
    bed.end().await;
}

#[test]
fn an_image_of_one_static_program_runs_it_as_root() {
    run(images_without_a_shell_run_programs());
}

#[test]
fn an_image_of_one_static_program_runs_it_as_a_plain_user() {
    run_as_plain_user(
        "lifecycle::an_image_of_one_static_program_runs_it_as_a_plain_user",
        images_without_a_shell_run_programs(),
    );
}

async fn the_host_image_has_the_hosts_programs() {
    let bed = Bed::new().await;
    let guest = bed
        .start("host", &SandboxSpec::new(ImageRef::Host))
        .await
        .unwrap();
    ok(&sh(&guest, "command -v sh && touch /tmp/x /root/x").await);
    let denied = sh(&guest, "touch /usr/x").await;
    assert!(!denied.success(), "wrote to the host's /usr");
    bed.end().await;
}

#[test]
fn the_host_image_works_as_root() {
    run(the_host_image_has_the_hosts_programs());
}

#[test]
fn the_host_image_works_as_a_plain_user() {
    run_as_plain_user(
        "lifecycle::the_host_image_works_as_a_plain_user",
        the_host_image_has_the_hosts_programs(),
    );
}

async fn another_user() {
    let bed = Bed::new().await;
    let mut spec = busybox();
    spec.user = Some(UserGroup {
        uid: 1000,
        gid: 1000,
    });
    spec.workdir = Some("/home/somebody".into());
    let guest = bed.start("box", &spec).await.unwrap();
    let seen = ok(&sh(&guest, "id -u; id -g; touch mine && stat -c %u:%g mine .").await);
    assert_eq!(seen, "1000\n1000\n1000:1000\n1000:1000");
    bed.end().await;
}

async fn a_distribution() {
    let bed = Bed::new().await;
    let guest = bed.start("debian", &debian()).await.unwrap();
    let python = sh(&guest, "python3 -c 'import ctypes, ssl; print(6 * 7)'").await;
    assert_eq!(ok(&python), "42");
    bed.end().await;
}

#[test]
fn a_distribution_works_as_root() {
    run(a_distribution());
}

#[test]
fn a_distribution_owned_by_somebody_else_works_as_a_plain_user() {
    run_as_plain_user(
        "lifecycle::a_distribution_owned_by_somebody_else_works_as_a_plain_user",
        a_distribution(),
    );
}

#[test]
fn a_sandbox_runs_as_the_user_it_is_given_as_root() {
    run(another_user());
}

#[test]
fn a_sandbox_runs_as_the_user_it_is_given_as_a_plain_user() {
    run_as_plain_user(
        "lifecycle::a_sandbox_runs_as_the_user_it_is_given_as_a_plain_user",
        another_user(),
    );
}

async fn read_only_root() {
    let bed = Bed::new().await;
    let mut spec = busybox();
    spec.read_only_root = true;
    let guest = bed.start("ro", &spec).await.unwrap();
    ok(&sh(&guest, "touch /tmp/x /dev/shm/x").await);
    for place in ["/x", "/etc/x", "/bin/x"] {
        let denied = sh(&guest, &format!("touch {place}")).await;
        assert!(denied.stderr.text.contains("Read-only"), "{denied:?}");
    }
    bed.end().await;
}

#[test]
fn a_read_only_root_leaves_tmp_writable_as_root() {
    run(read_only_root());
}

#[test]
fn a_read_only_root_leaves_tmp_writable_as_a_plain_user() {
    run_as_plain_user(
        "lifecycle::a_read_only_root_leaves_tmp_writable_as_a_plain_user",
        read_only_root(),
    );
}

async fn pausing_stops_time() {
    let bed = Bed::new().await;
    let guest = bed.start("box", &busybox()).await.unwrap();
    ok(&sh(
        &guest,
        "(while :; do echo x >> /tmp/log; sleep 0.01; done) >/dev/null 2>&1 &",
    )
    .await);
    bed.engine.pause(&id("box")).await.unwrap();
    assert_eq!(
        bed.engine.liveness(&id("box")).await.unwrap(),
        Liveness::Paused
    );
    let health = tokio::time::timeout(std::time::Duration::from_millis(300), guest.health()).await;
    assert!(health.is_err(), "a paused guest answered");
    bed.engine.resume(&id("box")).await.unwrap();
    guest.health().await.unwrap();
    assert_eq!(
        bed.engine.liveness(&id("box")).await.unwrap(),
        Liveness::Running
    );
    // Destroying works from the paused state too.
    bed.engine.pause(&id("box")).await.unwrap();
    bed.engine.destroy(&id("box")).await.unwrap();
    bed.end().await;
}

#[test]
fn pausing_stops_time_as_root() {
    run(pausing_stops_time());
}

#[test]
fn pausing_stops_time_as_a_plain_user() {
    run_as_plain_user(
        "lifecycle::pausing_stops_time_as_a_plain_user",
        pausing_stops_time(),
    );
}

async fn forks_start_from_what_was_prepared() {
    let bed = Bed::new().await;
    let guest = bed.start("first", &busybox()).await.unwrap();
    ok(&sh(
        &guest,
        "echo prepared > /state && rm /usr/bin/wc && mkdir -p /a/b && rm -rf /etc && mkdir /etc",
    )
    .await);
    let copy = "copy".parse().unwrap();
    bed.engine
        .snapshot(&id("first"), &copy, SnapshotMode::Copy)
        .await
        .unwrap();
    ok(&sh(&guest, "echo later > /state").await);
    let used = "used".parse().unwrap();
    bed.engine
        .snapshot(&id("first"), &used, SnapshotMode::Consume)
        .await
        .unwrap();
    for (snapshot, state) in [("copy", "prepared"), ("used", "later")] {
        let spec = SandboxSpec::new(format!("snapshot:{snapshot}").parse().unwrap());
        for n in 0..2 {
            let name = format!("{snapshot}-{n}");
            let fork = bed.start(&name, &spec).await.unwrap();
            let seen = ok(&sh(
                &fork,
                "cat /state; test ! -e /usr/bin/wc && echo gone; ls -d /a/b; echo mine > /state",
            )
            .await);
            assert_eq!(seen, format!("{state}\ngone\n/a/b"));
        }
    }
    // A fork of a fork.
    let deep = "deep".parse().unwrap();
    bed.engine
        .snapshot(&id("used-0"), &deep, SnapshotMode::Consume)
        .await
        .unwrap();
    let spec = SandboxSpec::new("snapshot:deep".parse().unwrap());
    let fork = bed.start("deep-0", &spec).await.unwrap();
    assert_eq!(ok(&sh(&fork, "cat /state").await), "mine");
    for snapshot in [&copy, &used, &deep] {
        bed.engine.remove_snapshot(snapshot).await.unwrap();
    }
    bed.end().await;
}

#[test]
fn forks_start_from_what_was_prepared_as_root() {
    run(forks_start_from_what_was_prepared());
}

#[test]
fn forks_start_from_what_was_prepared_as_a_plain_user() {
    run_as_plain_user(
        "lifecycle::forks_start_from_what_was_prepared_as_a_plain_user",
        forks_start_from_what_was_prepared(),
    );
}

async fn other_roots(method: RootMethod) {
    let bed = Bed::with(NativeOptions {
        root: Some(method),
        ..NativeOptions::default()
    })
    .await;
    let guest = bed.start("box", &busybox()).await.unwrap();
    // What a layer deleted or replaced stays so.
    let seen = sh(
        &guest,
        "find / -xdev -type c; test ! -e /opt/gone && cat /opt/kept",
    )
    .await;
    assert_eq!(ok(&seen), "from layer 1");
    ok(&sh(&guest, "rm /usr/bin/wc && echo x > /new && mkdir /opt/new").await);
    let snapshot = "s".parse().unwrap();
    bed.engine
        .snapshot(&id("box"), &snapshot, SnapshotMode::Consume)
        .await
        .unwrap();
    let spec = SandboxSpec::new("snapshot:s".parse().unwrap());
    let fork = bed.start("fork", &spec).await.unwrap();
    ok(&sh(&fork, "test ! -e /usr/bin/wc && cat /new && rm /bin/ls").await);
    assert!(image_path("busybox/usr/bin/wc").exists());
    bed.end().await;
}

#[test]
fn a_copied_root_works_as_root() {
    run(other_roots(RootMethod::Copy));
}

#[test]
fn a_copied_root_works_as_a_plain_user() {
    run_as_plain_user(
        "lifecycle::a_copied_root_works_as_a_plain_user",
        other_roots(RootMethod::Copy),
    );
}

#[test]
fn a_root_by_fuse_overlayfs_works() {
    assert!(is_root(), "/dev/fuse is root's here");
    run(other_roots(RootMethod::FuseOverlay));
}
