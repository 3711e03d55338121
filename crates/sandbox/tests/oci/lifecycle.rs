//! From create to destroy, on every kind of image and root.

use crate::bed::{
    Bed, busybox, busybox_directory, debian, id, image_path, ok, run, run_as_plain_user, sh,
    told_twice,
};
use skyrl_protocol::guest::{ExecRequest, UserGroup};
use skyrl_sandbox::oci::{OciOptions, RuntimeKind};
use skyrl_sandbox::rootfs::RootMethod;
use skyrl_sandbox::{
    Engine, EngineError, HostMount, ImageRef, Liveness, SandboxSpec, SnapshotMode,
};

async fn a_whole_life(options: OciOptions) {
    let bed = Bed::with(options).await;
    let mut spec = busybox();
    spec.env.insert("GREETING".into(), "hello".into());
    spec.workdir = Some("/work/deep".into());
    let guest = bed.start("box", &spec).await.unwrap();
    let seen = ok(&sh(
        &guest,
        "echo $GREETING; pwd; hostname; id -u; cat /etc/hostname; ls -d /tmp /proc/1; echo $$",
    )
    .await);
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(
        lines[..5],
        ["hello", "/work/deep", "box", "0", "box"],
        "{seen}"
    );
    ok(&sh(
        &guest,
        "echo x > /etc/new && rm /bin/ls && mkdir /brand-new && test -w /tmp",
    )
    .await);
    ok(&sh(
        &guest,
        "test -c /dev/null && echo x > /dev/null && test -d /dev/pts && test -d /dev/shm",
    )
    .await);
    let stats = bed.engine.stats(&id("box")).await.unwrap();
    assert!(stats.memory_bytes.unwrap() > 0, "{stats:?}");
    assert!(stats.pids.unwrap() >= 1, "{stats:?}");
    assert!(stats.cpu_seconds.is_some(), "{stats:?}");
    assert!(stats.disk_bytes.unwrap() > 0, "{stats:?}");
    let alive = bed.engine.liveness(&id("box")).await.unwrap();
    assert_eq!(alive, Liveness::Running);
    let again = bed.engine.create(&id("box"), &spec).await.unwrap_err();
    assert!(matches!(again, EngineError::Exists(_)), "{again}");
    bed.engine.destroy(&id("box")).await.unwrap();
    bed.engine.destroy(&id("box")).await.unwrap();
    assert!(image_path("busybox/bin/ls").exists());
    bed.end().await;
}

async fn a_sandbox_lives_and_leaves_nothing() {
    a_whole_life(OciOptions::default()).await;
}

told_twice!(
    a_sandbox_lives_and_leaves_nothing,
    a_sandbox_lives_and_leaves_nothing_as_root,
    a_sandbox_lives_and_leaves_nothing_as_a_plain_user
);

#[test]
fn runc_does_it_too() {
    run(a_whole_life(OciOptions {
        runtime: Some(RuntimeKind::Runc),
        ..OciOptions::default()
    }));
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

told_twice!(
    images_without_a_shell_run_programs,
    an_image_of_one_static_program_runs_it_as_root,
    an_image_of_one_static_program_runs_it_as_a_plain_user
);

async fn the_host_image_has_the_hosts_programs() {
    let bed = Bed::new().await;
    let spec = SandboxSpec::new(ImageRef::Host);
    let guest = bed.start("host", &spec).await.unwrap();
    ok(&sh(&guest, "command -v sh && touch /tmp/x /root/x").await);
    let denied = sh(&guest, "touch /usr/x").await;
    assert!(!denied.success(), "wrote to the host's /usr");
    bed.end().await;
}

told_twice!(
    the_host_image_has_the_hosts_programs,
    the_host_image_works_as_root,
    the_host_image_works_as_a_plain_user
);

async fn a_user_of_its_own() {
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
    let capabilities = ok(&sh(&guest, "grep CapEff /proc/self/status").await);
    assert!(capabilities.ends_with("0000000000000000"), "{capabilities}");
    bed.end().await;
}

told_twice!(
    a_user_of_its_own,
    a_sandbox_runs_as_the_user_it_is_given_as_root,
    a_sandbox_runs_as_the_user_it_is_given_as_a_plain_user
);

async fn debian_has_its_programs() {
    let bed = Bed::new().await;
    let guest = bed.start("debian", &debian()).await.unwrap();
    let python = sh(
        &guest,
        "python3 -c 'import ctypes, ssl; print(6 * 7)' && git --version",
    )
    .await;
    assert!(ok(&python).starts_with("42\ngit version"), "{python:?}");
    bed.end().await;
}

told_twice!(
    debian_has_its_programs,
    debian_works_as_root,
    debian_works_as_a_plain_user
);

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

told_twice!(
    read_only_root,
    a_read_only_root_leaves_tmp_writable_as_root,
    a_read_only_root_leaves_tmp_writable_as_a_plain_user
);

async fn host_paths() {
    let bed = Bed::new().await;
    let shared = bed.dir.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("given"), "from the host").unwrap();
    let mut spec = busybox();
    let mount = |target: &str, read_only| HostMount {
        source: shared.clone(),
        target: target.into(),
        read_only,
    };
    spec.mounts = vec![
        mount("/mnt/read", true),
        mount("/mnt/write", false),
        mount("/dev/shared", true),
    ];
    let guest = bed.start("box", &spec).await.unwrap();
    let seen = ok(&sh(
        &guest,
        "cat /mnt/read/given /dev/shared/given; echo back > /mnt/write/taken",
    )
    .await);
    assert_eq!(seen, "from the hostfrom the host");
    for place in ["/mnt/read", "/dev/shared"] {
        assert!(!sh(&guest, &format!("touch {place}/x")).await.success());
    }
    assert_eq!(
        std::fs::read_to_string(shared.join("taken")).unwrap(),
        "back\n"
    );
    bed.engine.destroy(&id("box")).await.unwrap();
    assert!(shared.join("given").exists());
    bed.end().await;
}

told_twice!(
    host_paths,
    host_paths_are_seen_inside_as_root,
    host_paths_are_seen_inside_as_a_plain_user
);

async fn pausing_stops_time_with(options: OciOptions) {
    let bed = Bed::with(options).await;
    let guest = bed.start("box", &busybox()).await.unwrap();
    ok(&sh(
        &guest,
        "(while :; do echo x >> /tmp/log; sleep 0.01; done) >/dev/null 2>&1 &",
    )
    .await);
    bed.engine.pause(&id("box")).await.unwrap();
    let paused = bed.engine.liveness(&id("box")).await.unwrap();
    assert_eq!(paused, Liveness::Paused);
    let health = tokio::time::timeout(std::time::Duration::from_millis(300), guest.health()).await;
    assert!(health.is_err(), "a paused guest answered");
    bed.engine.resume(&id("box")).await.unwrap();
    guest.health().await.unwrap();
    let running = bed.engine.liveness(&id("box")).await.unwrap();
    assert_eq!(running, Liveness::Running);
    // Destroying works from the paused state too.
    bed.engine.pause(&id("box")).await.unwrap();
    bed.engine.destroy(&id("box")).await.unwrap();
    bed.end().await;
}

async fn pausing_stops_time() {
    pausing_stops_time_with(OciOptions::default()).await;
}

told_twice!(
    pausing_stops_time,
    pausing_stops_time_as_root,
    pausing_stops_time_as_a_plain_user
);

#[test]
fn pausing_stops_time_without_a_freezer() {
    run(pausing_stops_time_with(OciOptions {
        without_cgroups: true,
        ..OciOptions::default()
    }));
}

async fn forks_start_from_what_was_prepared() {
    let bed = Bed::new().await;
    let guest = bed.start("first", &busybox()).await.unwrap();
    ok(&sh(
        &guest,
        "echo prepared > /state && rm /usr/bin/wc && mkdir -p /a/b && rm -rf /etc && mkdir /etc",
    )
    .await);
    let (copy, used) = ("copy".parse().unwrap(), "used".parse().unwrap());
    let engine = &bed.engine;
    engine
        .snapshot(&id("first"), &copy, SnapshotMode::Copy)
        .await
        .unwrap();
    ok(&sh(&guest, "echo later > /state").await);
    engine
        .snapshot(&id("first"), &used, SnapshotMode::Consume)
        .await
        .unwrap();
    for (snapshot, state) in [("copy", "prepared"), ("used", "later")] {
        let spec = SandboxSpec::new(format!("snapshot:{snapshot}").parse().unwrap());
        for n in 0..2 {
            let fork = bed.start(&format!("{snapshot}-{n}"), &spec).await.unwrap();
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
    engine
        .snapshot(&id("used-0"), &deep, SnapshotMode::Consume)
        .await
        .unwrap();
    let spec = SandboxSpec::new("snapshot:deep".parse().unwrap());
    let fork = bed.start("deep-0", &spec).await.unwrap();
    assert_eq!(ok(&sh(&fork, "cat /state").await), "mine");
    for snapshot in [&copy, &used, &deep] {
        engine.remove_snapshot(snapshot).await.unwrap();
    }
    bed.end().await;
}

told_twice!(
    forks_start_from_what_was_prepared,
    forks_start_from_what_was_prepared_as_root,
    forks_start_from_what_was_prepared_as_a_plain_user
);

async fn other_roots(method: RootMethod) {
    let bed = Bed::with(OciOptions {
        root: Some(method),
        ..OciOptions::default()
    })
    .await;
    let guest = bed.start("box", &busybox_directory()).await.unwrap();
    ok(&sh(&guest, "echo x > /tmp/new").await);
    let snapshot = "s".parse().unwrap();
    bed.engine
        .snapshot(&id("box"), &snapshot, SnapshotMode::Consume)
        .await
        .unwrap();
    let spec = SandboxSpec::new("snapshot:s".parse().unwrap());
    let fork = bed.start("fork", &spec).await.unwrap();
    ok(&sh(&fork, "cat /tmp/new && ls /bin/ls").await);
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
    run(other_roots(RootMethod::FuseOverlay));
}
