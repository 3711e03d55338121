//! What an attacker inside tries.

use crate::bed::{Bed, busybox, debian, ok, sh, told_twice};

async fn the_host_is_invisible() {
    let bed = Bed::new().await;
    let guest = bed.start("box", &busybox()).await.unwrap();
    let secret = bed.dir.path().join("secret");
    std::fs::write(&secret, "x").unwrap();
    let inside = sh(&guest, &format!("ls {} /proc/1/root{0}", secret.display())).await;
    assert!(!inside.success(), "{inside:?}");
    let processes = ok(&sh(&guest, "ls /proc | grep -c '^[0-9]'").await);
    assert!(
        processes.parse::<u32>().unwrap() < 10,
        "{processes} processes"
    );
    let mounts = ok(&sh(&guest, "cat /proc/self/mountinfo").await);
    let state = bed.dir.path().file_name().unwrap().to_str().unwrap();
    for word in [state, "cgroup"] {
        assert!(!mounts.contains(word), "{word} in {mounts}");
    }
    // The guest's own descriptors lead nowhere on the host.
    // Those of the command itself come and go while they are listed.
    let descriptors = ok(&sh(&guest, "ls -l /proc/1/fd 2>/dev/null; true").await);
    for line in descriptors.lines().filter(|line| line.contains("->")) {
        let target = line.rsplit("-> ").next().unwrap();
        let harmless = ["socket:", "pipe:", "anon_inode:", "/dev/null", "/memfd:"]
            .iter()
            .any(|prefix| target.starts_with(prefix))
            // The counter of kills, through a mount of that file alone.
            || target == "/";
        assert!(harmless, "the guest holds {target}");
    }
    let directories = sh(
        &guest,
        "for f in /proc/1/fd/*; do test -d $f && echo $f; done; true",
    );
    assert_eq!(ok(&directories.await), "");
    bed.end().await;
}

told_twice!(
    the_host_is_invisible,
    the_host_is_invisible_as_root,
    the_host_is_invisible_as_a_plain_user
);

async fn escapes_are_refused() {
    let bed = Bed::new().await;
    let guest = bed.start("box", &busybox()).await.unwrap();
    for attempt in [
        "mount -t tmpfs none /mnt",
        "mount -o remount,rw /proc/sys",
        "umount /proc/kcore",
        "mknod /tmp/disk b 254 0",
        "unshare -U true",
        "unshare -m true",
        "chroot /proc/1/root mount -t proc none /proc",
        "echo x > /proc/sys/kernel/hostname",
        "echo b > /proc/sysrq-trigger",
        "head -c 1 /proc/kcore | grep -q .",
        "head -c 1 /proc/kmsg | grep -q .",
        "dmesg",
        "hostname other",
        "date -s 2000-01-01; [ $(date +%Y) = 2000 ]",
        "swapoff -a && swapon /tmp",
        "echo x > /sys/kernel/uevent_helper",
        "ls /sys/fs/cgroup/* && touch /sys/fs/cgroup/x",
        "echo x > /proc/1/exe",
        "nsenter -t 1 -m true",
    ] {
        let result = sh(&guest, attempt).await;
        assert!(!result.success(), "{attempt}: {result:?}");
    }
    let status = ok(&sh(&guest, "cat /proc/self/status").await);
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.unwrap().split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    let bounding = u64::from_str_radix(&field("CapBnd:"), 16).unwrap();
    const SYS_ADMIN_PTRACE_MODULE_MKNOD: u64 = 1 << 21 | 1 << 19 | 1 << 16 | 1 << 27;
    assert_eq!(bounding & SYS_ADMIN_PTRACE_MODULE_MKNOD, 0, "{bounding:x}");
    bed.end().await;
}

told_twice!(
    escapes_are_refused,
    escapes_are_refused_as_root,
    escapes_are_refused_as_a_plain_user
);

async fn refused_calls_report_the_right_error() {
    let bed = Bed::new().await;
    let guest = bed.start("box", &debian()).await.unwrap();
    // errno of: keyctl, bpf, unshare of a user namespace, clone3, io_uring,
    // a socket of the kernel's crypto, a call that does not exist.
    let script = "import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def errno(*a):
    ctypes.set_errno(0)
    return ctypes.get_errno() if libc.syscall(*a) == -1 else 0
print(errno(250, 0, 0, 0), errno(321, 0, 0, 0), errno(272, 0x10000000), errno(435, 0, 0), errno(425, 1, 0))
try:
    socket.socket(38, socket.SOCK_SEQPACKET, 0)
except OSError as e:
    print(e.errno)
print(errno(9999))
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
print(os.fork() >= 0)";
    let request = skyrl_protocol::guest::ExecRequest::argv(["python3", "-c", script]);
    let said = ok(&guest.exec(&request).await.unwrap());
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..3], ["1 1 1 38 1", "1", "38"], "{said}");
    bed.end().await;
}

told_twice!(
    refused_calls_report_the_right_error,
    refused_calls_report_the_right_error_as_root,
    refused_calls_report_the_right_error_as_a_plain_user
);
