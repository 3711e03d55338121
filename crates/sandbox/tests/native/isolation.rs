//! Attacks from inside, as root and as a plain user's sandbox.

use crate::bed::{Bed, busybox, debian, ok, run, run_as_plain_user, sh};
use serde_json::{Value, json};
use skyrl_protocol::guest::ExecRequest;
use skyrl_sandbox::{HostMount, ImageRef, Network, SandboxSpec};
use std::os::unix::fs::symlink;
use std::path::Path;

/// Things of the host that a sandbox must not reach.
struct Host {
    _abstract_socket: std::os::unix::net::UnixListener,
    _tcp: std::net::TcpListener,
    shm: i32,
    secret: tempfile::NamedTempFile,
    about: Value,
}

impl Host {
    fn new() -> Self {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("skyrl-test-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let listener = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let key = 0x5eed_0000 | std::process::id() as i32;
        // SAFETY: makes a segment that nothing maps.
        let shm = unsafe { libc::shmget(key, 4096, libc::IPC_CREAT | 0o666) };
        assert!(shm >= 0);
        let secret = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(secret.path(), "secret of the host").unwrap();
        let about = json!({
            "abstract": name,
            "port": tcp.local_addr().unwrap().port(),
            "shm_key": key,
            "pid": std::process::id(),
            "file": secret.path(),
        });
        Self {
            _abstract_socket: listener,
            _tcp: tcp,
            shm,
            secret,
            about,
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: removes the segment made above.
        unsafe { libc::shmctl(self.shm, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

async fn attack(spec: &SandboxSpec) -> Value {
    let host = Host::new();
    let bed = Bed::new().await;
    let guest = bed.start("victim", spec).await.unwrap();
    let script = include_str!("attack.py");
    let result = guest
        .exec(&ExecRequest {
            stdin: Some(script.into()),
            ..ExecRequest::argv(["python3", "-", &host.about.to_string()])
        })
        .await
        .unwrap();
    let mut found: Value = serde_json::from_str(&ok(&result)).unwrap();
    let place = bed.context.owner.root().display().to_string();
    for place_told in ["mountinfo", "guest_environment", "unix_sockets"] {
        let text = found[place_told].as_str().unwrap();
        assert!(
            !text.contains(&place),
            "{place_told} tells of the host: {text}"
        );
    }
    found["secret"] = host.secret.path().exists().into();
    bed.end().await;
    found
}

/// What every attack must come to, whatever the network.
fn assert_refused(found: &Value) {
    for refused in [
        "mount",
        "remount",
        "umount",
        "pivot_root",
        "open_tree",
        "fsopen",
        "mount_setattr",
        "unshare_user",
        "unshare_mount",
        "unshare_pid",
        "unshare_net",
        "clone_user",
        "keyctl",
        "add_key",
        "bpf",
        "perf_event_open",
        "userfaultfd",
        "io_uring",
        "open_by_handle_at",
        "kexec_load",
        "init_module",
        "reboot",
        "swapon",
        "syslog",
        "sethostname",
        "settimeofday",
        "iopl",
        "mknod_block",
        "mknod_null_elsewhere",
        "vsock",
        "kernel_crypto",
        "raise_limit",
    ] {
        let answer = &found[refused];
        let refusal = answer == "EPERM"
            || answer == "PermissionError(1, 'Operation not permitted')"
            || answer
                .as_str()
                .is_some_and(|text| text.contains("not allowed to raise"));
        assert!(refusal, "{refused}: {answer}");
    }
    // Programs must fall back from these two, not give up.
    assert_eq!(found["clone3"], "ENOSYS");
    assert_eq!(found["x32_getpid"], "ENOSYS");
    for (attack, answers) in [
        ("setns", &["EPERM", "EACCES"][..]),
        ("overwrite_guest", &["ETXTBSY", "EACCES", "EPERM"]),
        ("write_core_pattern", &["EROFS", "EACCES"]),
        ("write_sysctl_net", &["EROFS", "EACCES"]),
        ("write_sysrq", &["EROFS", "EACCES", "ENOENT"]),
        ("write_sys", &["EROFS", "EACCES", "ENOENT"]),
        ("write_oom_adjust_down", &["EACCES"]),
        ("rewrite_counter", &["EROFS", "EACCES", "ENOENT", "ENXIO"]),
        ("host_process", &["ESRCH"]),
        ("host_file", &["ENOENT"]),
        ("host_shared_memory", &["ENOENT"]),
    ] {
        let answer = found[attack].as_str().unwrap_or_default();
        assert!(answers.contains(&answer), "{attack}: {}", found[attack]);
    }
    for empty in [
        "read_kcore",
        "read_keys",
        "read_timer_list",
        "read_sched_debug",
    ] {
        assert!(
            found[empty] == 0 || found[empty] == "ENOENT",
            "{empty}: {}",
            found[empty]
        );
    }
    assert_eq!(found["chroot_escape"], true, "left the sandbox's root");
    assert_eq!(found["descriptors"], json!([0, 1, 2]));
    for link in found["guest_descriptors"].as_array().unwrap() {
        let link = link.as_str().unwrap();
        assert!(
            [
                "/dev/null",
                "anon_inode",
                "pipe",
                "socket",
                "/",
                "/memory.oom_control"
            ]
            .contains(&link),
            "the guest holds {link}"
        );
    }
}

fn assert_own_namespaces(found: &Value) {
    assert_eq!(found["interfaces"], json!(["lo"]));
    assert_eq!(found["host_abstract_socket"], "ECONNREFUSED");
    assert_eq!(found["host_tcp"], "ECONNREFUSED");
    assert_eq!(found["cgroup_paths"], json!(["/"]));
    assert_eq!(found["list_firmware"], json!([]));
    assert_eq!(found["list_cgroups"], json!([]));
    assert_eq!(
        found["list_dev"],
        json!([
            "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
            "tty", "urandom", "zero"
        ])
    );
    let processes = found["processes"].as_array().unwrap();
    assert!(processes.len() <= 3, "{processes:?}");
    let status = &found["status"];
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(status["Seccomp"], "2");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let held = u64::from_str_radix(status[set].as_str().unwrap(), 16).unwrap();
        // chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap,
        // net_bind_service, net_raw, sys_chroot, setfcap.
        assert_eq!(held & !0x8004_25fb, 0, "{set} {held:x}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
}

async fn escapes_are_refused() {
    let found = attack(&debian()).await;
    assert_refused(&found);
    assert_own_namespaces(&found);
    let mut spec = debian();
    spec.network = Network::Host;
    let found = attack(&spec).await;
    assert_refused(&found);
}

#[test]
fn escapes_are_refused_as_root() {
    run(escapes_are_refused());
}

#[test]
fn escapes_are_refused_as_a_plain_user() {
    run_as_plain_user(
        "isolation::escapes_are_refused_as_a_plain_user",
        escapes_are_refused(),
    );
}

async fn sandboxes_do_not_see_each_other() {
    let bed = Bed::new().await;
    let one = bed.start("one", &busybox()).await.unwrap();
    let two = bed.start("two", &busybox()).await.unwrap();
    ok(&sh(
        &one,
        "echo x > /tmp/mine; echo x > /dev/shm/mine; sleep 1000 >/dev/null 2>&1 & nc -l -p 4000 >/dev/null 2>&1 &",
    )
    .await);
    let seen = sh(
        &two,
        "ls /tmp /dev/shm; ps | grep -c '[s]leep 1000'; nc -w 1 127.0.0.1 4000 </dev/null && echo connected; hostname",
    )
    .await;
    let seen = &seen.stdout.text;
    assert!(
        !seen.contains("mine") && !seen.contains("connected"),
        "{seen}"
    );
    assert!(seen.contains("0\n") && seen.contains("two"), "{seen}");
    bed.end().await;
}

#[test]
fn sandboxes_do_not_see_each_other_as_root() {
    run(sandboxes_do_not_see_each_other());
}

#[test]
fn sandboxes_do_not_see_each_other_as_a_plain_user() {
    run_as_plain_user(
        "isolation::sandboxes_do_not_see_each_other_as_a_plain_user",
        sandboxes_do_not_see_each_other(),
    );
}

/// A root whose links lead to a directory of the host.
fn hostile_root(dir: &Path, host: &Path) {
    std::fs::create_dir_all(dir.join("bin")).unwrap();
    std::fs::copy(
        crate::bed::image_path("busybox/bin/busybox"),
        dir.join("bin/busybox"),
    )
    .unwrap();
    for applet in ["sh", "cat", "ls", "mount", "touch"] {
        symlink("busybox", dir.join("bin").join(applet)).unwrap();
    }
    let up = Path::new("../../../../../../../../..").join(host.strip_prefix("/").unwrap());
    for (name, target) in [
        ("etc", host.join("etc")),
        ("tmp", "../../var/tmp".into()),
        ("data", up.join("data")),
        ("work", host.join("work")),
        ("loop", "loop".into()),
    ] {
        symlink(target, dir.join(name)).unwrap();
    }
}

async fn links_of_an_image_do_not_lead_out() {
    let place = tempfile::tempdir().unwrap();
    let host = place.path().join("host");
    std::fs::create_dir(&host).unwrap();
    let shown = place.path().join("shown");
    std::fs::create_dir(&shown).unwrap();
    std::fs::write(shown.join("file"), "shown").unwrap();
    let root = place.path().join("root");
    hostile_root(&root, &host);
    let bed = Bed::new().await;
    let mut spec = SandboxSpec::new(ImageRef::Directory(root));
    spec.workdir = Some("/work/here".into());
    spec.mounts = vec![
        HostMount {
            source: shown.clone(),
            target: "/data/inner".into(),
            read_only: true,
        },
        HostMount {
            source: shown.join("file"),
            target: "/etc/shown".into(),
            read_only: false,
        },
    ];
    let guest = bed.start("box", &spec).await.unwrap();
    let seen = ok(&sh(
        &guest,
        "cat /data/inner/file /etc/shown /etc/hostname; touch /tmp/x",
    )
    .await);
    assert_eq!(seen, "shownshownbox");
    let denied = sh(&guest, "touch /data/inner/new").await;
    assert!(denied.stderr.text.contains("Read-only"), "{denied:?}");
    ok(&sh(&guest, "echo changed > /etc/shown").await);
    assert_eq!(
        std::fs::read_to_string(shown.join("file")).unwrap(),
        "changed\n"
    );
    let touched: Vec<_> = std::fs::read_dir(&host).unwrap().collect();
    assert!(touched.is_empty(), "written on the host: {touched:?}");
    // A link that leads nowhere is an error, not a hang.
    spec.mounts[0].target = "/loop/x".into();
    let error = bed.start("loop", &spec).await.err().unwrap();
    assert!(error.to_string().contains("loop/x"), "{error}");
    bed.end().await;
}

#[test]
fn links_of_an_image_do_not_lead_out_as_root() {
    run(links_of_an_image_do_not_lead_out());
}

#[test]
fn links_of_an_image_do_not_lead_out_as_a_plain_user() {
    run_as_plain_user(
        "isolation::links_of_an_image_do_not_lead_out_as_a_plain_user",
        links_of_an_image_do_not_lead_out(),
    );
}

#[test]
fn device_nodes_of_an_image_can_not_be_opened() {
    run(async {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("root");
        hostile_root(&root, place.path());
        std::fs::remove_file(root.join("etc")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("zero"),
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::from_raw_mode(0o666),
            rustix::fs::makedev(1, 5),
        )
        .unwrap();
        let bed = Bed::new().await;
        let spec = SandboxSpec::new(ImageRef::Directory(root));
        let guest = bed.start("box", &spec).await.unwrap();
        let opened = sh(&guest, "cat < /zero | true; : < /zero").await;
        assert!(
            opened.stderr.text.contains("ermission denied"),
            "{opened:?}"
        );
        bed.end().await;
    });
}
