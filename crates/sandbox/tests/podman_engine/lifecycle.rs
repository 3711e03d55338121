//! The life of a sandbox: what it sees, what it may, and that nothing of it
//! stays. Each story runs as root and as plain users.

use crate::support::{Place, assert_no_traces, groups, id, out, sh, start, unique};
use crate::users::{Subordinate, run, run_as_plain_user};
use skyrl_protocol::guest::{ExecRequest, UserGroup};
use skyrl_sandbox::podman::PodmanOptions;
use skyrl_sandbox::rootfs::RootMethod;
use skyrl_sandbox::{
    Engine, EngineError, HostMount, ImageRef, Liveness, Network, PodmanEngine, SandboxSpec,
    SnapshotMode,
};

async fn a_sandbox_is_as_asked_for_and_leaves_nothing() {
    let place = Place::new();
    let engine = place.engine().await;
    let shared = place.dir.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("file"), "of the host").unwrap();
    let mut spec = place.spec();
    spec.env.insert("GREETING".into(), "hello".into());
    spec.workdir = Some("/work/deep".into());
    spec.hostname = Some("named".into());
    spec.mounts.push(HostMount {
        source: shared,
        target: "/data".into(),
        read_only: true,
    });
    let name = unique("life");
    let guest = start(&engine, &name, &spec).await;
    assert_eq!(
        out(
            &guest,
            "echo $GREETING; pwd; hostname; id -u; cat /data/file"
        )
        .await,
        "hello\n/work/deep\nnamed\n0\nof the host"
    );
    assert!(!sh(&guest, "echo x > /data/file").await.success());
    // Only what the sandbox is meant to have: loopback, no capabilities to
    // mount, no device nodes, no way to the host's processes.
    assert_eq!(out(&guest, "cd /sys/class/net && echo *").await, "lo");
    for refused in [
        "mount -t tmpfs none /root",
        "mknod /dev/sda b 8 0",
        "unshare -U true",
        "echo 1 > /proc/sys/kernel/core_pattern",
        "echo 1 > /sys/fs/cgroup/memory/memory.limit_in_bytes",
    ] {
        assert!(
            !sh(&guest, refused).await.success(),
            "{refused} was let through"
        );
    }
    assert_eq!(out(&guest, "cat /proc/1/comm").await, "guest");
    assert_eq!(
        engine.liveness(&id(&name)).await.unwrap(),
        Liveness::Running
    );
    let again = engine.create(&id(&name), &spec).await;
    assert!(matches!(again, Err(EngineError::Exists(_))));

    engine.destroy(&id(&name)).await.unwrap();
    engine.destroy(&id(&name)).await.unwrap();
    assert!(groups(&name).is_empty());
    assert!(!place.lock.dir().sandbox(&id(&name)).exists());
    engine.shutdown().await.unwrap();
    assert_no_traces(place.dir.path());
}

async fn a_root_can_be_read_only() {
    let place = Place::new();
    let engine = place.engine().await;
    let mut spec = place.spec();
    spec.read_only_root = true;
    let guest = start(&engine, &unique("fixed"), &spec).await;
    assert!(!sh(&guest, "echo x > /etc/passwd").await.success());
    assert_eq!(
        out(
            &guest,
            "echo x > /tmp/file && echo y > /dev/shm/file && cat /tmp/file"
        )
        .await,
        "x"
    );
}

async fn a_paused_sandbox_stands_still() {
    let place = Place::new();
    let engine = place.engine().await;
    let name = unique("still");
    let guest = start(&engine, &name, &place.spec()).await;
    out(
        &guest,
        "echo > /tmp/ticks; (while true; do echo x >> /tmp/ticks; sleep 0.02; done) >/dev/null 2>&1 &",
    )
    .await;
    engine.pause(&id(&name)).await.unwrap();
    engine.pause(&id(&name)).await.unwrap();
    assert_eq!(engine.liveness(&id(&name)).await.unwrap(), Liveness::Paused);
    let ticks = place.lock.dir().sandbox(&id(&name)).join("upper/tmp/ticks");
    let before = std::fs::read(&ticks).unwrap().len();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(std::fs::read(&ticks).unwrap().len(), before);
    engine.resume(&id(&name)).await.unwrap();
    assert_eq!(out(&guest, "echo awake").await, "awake");
    let stats = engine.stats(&id(&name)).await.unwrap();
    assert!(stats.cpu_seconds.is_some() && stats.memory_bytes.unwrap() > 0);
    assert!(stats.pids.unwrap() >= 2 && stats.disk_bytes.is_some());
    // A paused one can be destroyed too.
    engine.pause(&id(&name)).await.unwrap();
    engine.destroy(&id(&name)).await.unwrap();
}

async fn an_end_is_told_with_its_cause() {
    let place = Place::new();
    let engine = place.engine().await;
    let name = unique("ending");
    let guest = start(&engine, &name, &place.spec()).await;
    // The guest refuses to be killed from inside; its owner's lease ends it.
    guest
        .renew_lease(1, std::time::Duration::from_secs(5))
        .await
        .unwrap();
    let cause = loop {
        match engine.liveness(&id(&name)).await.unwrap() {
            Liveness::Ended { cause } => break cause,
            _ => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
        }
    };
    assert!(cause.starts_with("exit code 0"), "{cause}");
    assert!(matches!(
        engine.pause(&id(&name)).await,
        Err(EngineError::Ended { .. })
    ));
    engine.destroy(&id(&name)).await.unwrap();
    assert!(matches!(
        engine.stats(&id(&name)).await,
        Err(EngineError::NotFound(_))
    ));
}

async fn forks_start_from_frozen_files_and_the_files_go_with_the_last_user() {
    let place = Place::new();
    let engine = place.engine().await;
    let (source, fork, twig) = (unique("source"), unique("fork"), unique("twig"));
    let guest = start(&engine, &source, &place.spec()).await;
    out(
        &guest,
        "echo base > /root/file; rm /bin/wget; mkdir -p /root/a/b; chmod 700 /root/a",
    )
    .await;
    // Files of other ids, where there are any to be had.
    let _ = sh(&guest, "mkdir /root/theirs && touch /root/theirs/x && chown -R 12:12 /root/theirs && chmod 700 /root/theirs").await;
    engine
        .snapshot(&id(&source), &"copy".parse().unwrap(), SnapshotMode::Copy)
        .await
        .unwrap();
    out(&guest, "echo later > /root/file").await;

    let spec = SandboxSpec::new(ImageRef::Snapshot("copy".parse().unwrap()));
    let forked = start(&engine, &fork, &spec).await;
    assert_eq!(
        out(
            &forked,
            "cat /root/file; ls -d /root/a/b; ls /bin | head -1; ls /bin/wget || true"
        )
        .await,
        "base\n/root/a/b\nbusybox"
    );
    out(&forked, "echo forked >> /root/file; rm -r /root/a").await;
    engine
        .remove_snapshot(&"copy".parse().unwrap())
        .await
        .unwrap();
    assert!(place.lock.dir().snapshot(&"copy".parse().unwrap()).exists());

    engine
        .snapshot(&id(&fork), &"moved".parse().unwrap(), SnapshotMode::Consume)
        .await
        .unwrap();
    assert!(matches!(
        engine.liveness(&id(&fork)).await,
        Err(EngineError::NotFound(_))
    ));
    let spec = SandboxSpec::new(ImageRef::Snapshot("moved".parse().unwrap()));
    let grown = start(&engine, &twig, &spec).await;
    assert_eq!(
        out(&grown, "cat /root/file; ls /root | head -1").await,
        "base\nforked\nfile"
    );
    engine
        .remove_snapshot(&"moved".parse().unwrap())
        .await
        .unwrap();
    engine.destroy(&id(&twig)).await.unwrap();
    for gone in ["copy", "moved"] {
        assert!(
            !place.lock.dir().snapshot(&gone.parse().unwrap()).exists(),
            "{gone}"
        );
    }
    assert_eq!(out(&guest, "cat /root/file").await, "later");
    engine.shutdown().await.unwrap();
    assert_no_traces(place.dir.path());
}

async fn the_host_image_shows_this_machines_programs() {
    let place = Place::new();
    let engine = place.engine().await;
    let spec = SandboxSpec::new(ImageRef::Host);
    let guest = start(&engine, &unique("host"), &spec).await;
    assert_eq!(
        out(&guest, "pwd; /usr/bin/env printf %s x; ls /home").await,
        "/workspace\nx"
    );
    assert!(!sh(&guest, "touch /usr/bin/x").await.success());
}

async fn the_network_is_the_one_asked_for() {
    let place = Place::new();
    let engine = place.engine().await;
    let mut spec = SandboxSpec::new(ImageRef::Host);
    spec.network = Network::Nat;
    let guest = start(&engine, &unique("nat"), &spec).await;
    assert_eq!(out(&guest, "ls /sys/class/net").await, "lo\ntap0");
    spec.network = Network::Host;
    let guest = start(&engine, &unique("open"), &spec).await;
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    let its = out(&guest, "readlink /proc/self/ns/net").await;
    assert_eq!(its, own.to_str().unwrap());
}

async fn other_users_exist_where_ids_are_granted() {
    let place = Place::new();
    let engine = place.engine().await;
    let mut spec = place.spec();
    spec.user = Some(UserGroup {
        uid: 1000,
        gid: 1000,
    });
    let guest = start(&engine, &unique("user"), &spec).await;
    assert_eq!(out(&guest, "id -u; id -g").await, "1000\n1000");
    let mut spec = place.spec();
    spec.user = None;
    let guest = start(&engine, &unique("root"), &spec).await;
    let request = ExecRequest {
        user: Some(UserGroup { uid: 12, gid: 12 }),
        ..ExecRequest::shell("id -u")
    };
    assert_eq!(guest.exec(&request).await.unwrap().stdout.text.trim(), "12");
}

async fn a_lone_id_serves_root_only_and_says_so() {
    let place = Place::new();
    let engine = place.engine().await;
    let mut spec = place.spec();
    spec.user = Some(UserGroup {
        uid: 1000,
        gid: 1000,
    });
    let error = engine
        .create(&id(&unique("user")), &spec)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no subordinate ids"), "{error}");
    assert!(error.hint().unwrap().contains("/etc/subuid"));
    let guest = start(&engine, &unique("root"), &place.spec()).await;
    assert_eq!(out(&guest, "id -u").await, "0");
}

async fn a_long_state_directory_is_no_obstacle() {
    let outer = tempfile::tempdir().unwrap();
    let deep = outer.path().join("d".repeat(90));
    std::fs::create_dir(&deep).unwrap();
    let inner = tempfile::tempdir_in(&deep).unwrap();
    let place = Place::at(inner, &"o".repeat(63));
    let engine = place.engine().await;
    let guest = start(&engine, &"s".repeat(63), &place.spec()).await;
    assert_eq!(out(&guest, "echo reached").await, "reached");
}

/// The life of a sandbox with an engine told how to work.
async fn works_with(options: PodmanOptions) {
    let place = Place::new();
    let engine = PodmanEngine::open_with(place.context(), options)
        .await
        .unwrap();
    let (name, fork) = (unique("way"), unique("ways-fork"));
    let guest = start(&engine, &name, &place.spec()).await;
    out(
        &guest,
        "echo kept > /root/file; rm /bin/wget; mkdir -m 700 /root/d; echo x > /root/d/f",
    )
    .await;
    engine.pause(&id(&name)).await.unwrap();
    engine.resume(&id(&name)).await.unwrap();
    assert!(engine.stats(&id(&name)).await.unwrap().disk_bytes.unwrap() > 0);
    let frozen = "way".parse().unwrap();
    engine
        .snapshot(&id(&name), &frozen, SnapshotMode::Consume)
        .await
        .unwrap();
    let spec = SandboxSpec::new(ImageRef::Snapshot(frozen));
    let guest = start(&engine, &fork, &spec).await;
    assert_eq!(
        out(
            &guest,
            "cat /root/file /root/d/f; ls /bin/wget 2>/dev/null || echo gone"
        )
        .await,
        "kept\nx\ngone"
    );
    engine.destroy(&id(&fork)).await.unwrap();
    assert!(groups(&fork).is_empty() && groups(&name).is_empty());
    let guest = start(&engine, &unique("left"), &place.spec()).await;
    out(&guest, "true").await;
    engine.shutdown().await.unwrap();
    assert_no_traces(place.dir.path());
}

async fn roots_can_be_made_through_fuse() {
    works_with(PodmanOptions {
        root: Some(RootMethod::FuseOverlay),
        ..PodmanOptions::default()
    })
    .await;
}

async fn roots_can_be_copied() {
    works_with(PodmanOptions {
        root: Some(RootMethod::Copy),
        ..PodmanOptions::default()
    })
    .await;
}

async fn runc_serves_where_there_is_no_crun() {
    works_with(PodmanOptions {
        runtime: Some("runc".into()),
        ..PodmanOptions::default()
    })
    .await;
}

/// A story as root, and as plain users with and without subordinate ids.
macro_rules! stories {
    ($($story:ident)*) => {
        mod root {
            $(#[test]
            fn $story() {
                super::run(super::$story());
            })*
        }
        mod granted {
            use super::Subordinate;
            $(#[test]
            fn $story() {
                let name = concat!("lifecycle::granted::", stringify!($story));
                super::run_as_plain_user(name, Subordinate::Granted, super::$story());
            })*
        }
    };
}

stories! {
    a_sandbox_is_as_asked_for_and_leaves_nothing
    a_root_can_be_read_only
    a_paused_sandbox_stands_still
    an_end_is_told_with_its_cause
    forks_start_from_frozen_files_and_the_files_go_with_the_last_user
    the_host_image_shows_this_machines_programs
    the_network_is_the_one_asked_for
    other_users_exist_where_ids_are_granted
    a_long_state_directory_is_no_obstacle
    roots_can_be_made_through_fuse
    roots_can_be_copied
    runc_serves_where_there_is_no_crun
}

mod alone {
    use super::Subordinate;

    macro_rules! alone {
        ($($story:ident)*) => {
            $(#[test]
            fn $story() {
                let name = concat!("lifecycle::alone::", stringify!($story));
                super::run_as_plain_user(name, Subordinate::None, super::$story());
            })*
        };
    }

    alone! {
        a_sandbox_is_as_asked_for_and_leaves_nothing
        a_paused_sandbox_stands_still
        forks_start_from_frozen_files_and_the_files_go_with_the_last_user
        a_lone_id_serves_root_only_and_says_so
    }
}
