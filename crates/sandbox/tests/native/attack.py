"""Tries to get out of the sandbox it runs in; prints what came of each try.

Nothing here harms even a host without any isolation, except by proving it.
"""

import ctypes
import errno
import json
import os
import socket
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
found = {}
# Before anything else opens one; the last is the listing itself.
found["descriptors"] = sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1]


def syscall(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in arguments))
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]


def text(value):
    return ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p).value


def trial(name):
    def run(function):
        try:
            found[name] = function()
        except OSError as error:
            found[name] = errno.errorcode[error.errno]
        except Exception as error:
            found[name] = repr(error)

    return run


NEWNS, NEWUSER, NEWPID, NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
buffer = ctypes.create_string_buffer(4096)
here = ctypes.addressof(buffer)

found["mount"] = syscall(165, text(b"none"), text(b"/mnt"), text(b"tmpfs"), 0, 0)
found["remount"] = syscall(165, 0, text(b"/proc/sys"), 0, 32, 0)
found["umount"] = syscall(166, text(b"/proc/sys"), 2)
found["pivot_root"] = syscall(155, text(b"/"), text(b"/"))
found["open_tree"] = syscall(428, -100, text(b"/"), 1)
found["fsopen"] = syscall(430, text(b"tmpfs"), 0)
found["mount_setattr"] = syscall(442, -100, text(b"/"), 0, here, 32)
for name, flag in (("user", NEWUSER), ("mount", NEWNS), ("pid", NEWPID), ("net", NEWNET)):
    found[f"unshare_{name}"] = syscall(272, flag)
# A clone that worked would come back twice; the flags alone refuse it.
found["clone_user"] = syscall(56, NEWUSER | 17, 0, 0, 0, 0)
found["clone3"] = syscall(435, here, 88)
found["keyctl"] = syscall(250, 0, -3, 0)
found["add_key"] = syscall(248, text(b"user"), text(b"x"), here, 1, -3)
found["bpf"] = syscall(321, 0, here, 64)
found["perf_event_open"] = syscall(298, here, 0, -1, -1, 0)
found["userfaultfd"] = syscall(323, 0)
found["io_uring"] = syscall(425, 1, here)
found["open_by_handle_at"] = syscall(304, -100, here, 0)
found["kexec_load"] = syscall(246, 0, 0, 0, 0)
found["init_module"] = syscall(175, here, 0, here)
found["reboot"] = syscall(169, 0, 0, 0, 0)
found["swapon"] = syscall(167, text(b"/x"), 0)
found["syslog"] = syscall(103, 3, here, 10)
found["sethostname"] = syscall(170, text(b"x"), 1)
found["settimeofday"] = syscall(164, here, 0)
found["iopl"] = syscall(172, 3)
found["x32_getpid"] = syscall(0x40000000 | 39)


@trial("setns")
def _():
    return syscall(308, os.open("/proc/1/ns/mnt", os.O_RDONLY), 0)


@trial("mknod_block")
def _():
    os.mknod("/dev/shm/disk", 0o60600, os.makedev(254, 0))
    return "ok"


@trial("mknod_null_elsewhere")
def _():
    os.mknod("/dev/shm/null", 0o20666, os.makedev(1, 3))
    return "ok"


@trial("overwrite_guest")
def _():
    os.open("/proc/1/exe", os.O_WRONLY)
    return "ok"


for name, path, data in (
    ("core_pattern", "/proc/sys/kernel/core_pattern", b"|/tmp/x"),
    ("sysctl_net", "/proc/sys/net/ipv4/ip_forward", b"1"),
    ("sysrq", "/proc/sysrq-trigger", b"h"),
    ("sys", "/sys/kernel/mm/transparent_hugepage/enabled", b"always"),
    ("oom_adjust_down", "/proc/self/oom_score_adj", b"-1000"),
):

    @trial("write_" + name)
    def _():
        file = os.open(path, os.O_WRONLY)
        os.write(file, data)
        return "ok"


for name, path in (
    ("kcore", "/proc/kcore"),
    ("keys", "/proc/keys"),
    ("timer_list", "/proc/timer_list"),
    ("sched_debug", "/proc/sched_debug"),
):

    @trial("read_" + name)
    def _():
        return len(open(path, "rb").read(64))


@trial("list_firmware")
def _():
    return os.listdir("/sys/firmware")


@trial("list_cgroups")
def _():
    return os.listdir("/sys/fs/cgroup")


@trial("list_dev")
def _():
    return sorted(os.listdir("/dev"))


@trial("chroot_escape")
def _():
    # The classic: a working directory outside of the new root.
    os.makedirs("/dev/shm/jail", exist_ok=True)
    top = os.open("/", os.O_RDONLY)
    os.chroot("/dev/shm/jail")
    os.fchdir(top)
    for _ in range(64):
        os.chdir("..")
    os.chroot(".")
    return sorted(os.listdir("/")) == sorted(os.listdir(top))


@trial("guest_descriptors")
def _():
    return sorted({os.readlink(f"/proc/1/fd/{n}").split(":")[0] for n in os.listdir("/proc/1/fd")})


@trial("rewrite_counter")
def _():
    os.open("/proc/1/fd/4", os.O_RDWR)
    return "ok"


@trial("status")
def _():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    wanted = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
    return {name: fields[name].strip() for name in wanted}


@trial("processes")
def _():
    return sorted(int(n) for n in os.listdir("/proc") if n.isdigit())


@trial("cgroup_paths")
def _():
    return sorted({line.strip().split(":", 2)[2] for line in open("/proc/self/cgroup")})


@trial("mountinfo")
def _():
    return open("/proc/self/mountinfo").read()


@trial("guest_environment")
def _():
    return open("/proc/1/environ").read()


@trial("unix_sockets")
def _():
    return open("/proc/net/unix").read()


@trial("interfaces")
def _():
    return [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]]


host = json.loads(sys.argv[1])


@trial("host_abstract_socket")
def _():
    socket.socket(socket.AF_UNIX).connect("\0" + host["abstract"])
    return "ok"


@trial("host_tcp")
def _():
    socket.create_connection(("127.0.0.1", host["port"]), timeout=2)
    return "ok"


@trial("host_shared_memory")
def _():
    result = libc.shmget(host["shm_key"], 0, 0)
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]


@trial("host_process")
def _():
    os.kill(host["pid"], 0)
    return "ok"


@trial("host_file")
def _():
    return open(host["file"]).read()


@trial("vsock")
def _():
    socket.socket(40, socket.SOCK_STREAM)
    return "ok"


@trial("kernel_crypto")
def _():
    socket.socket(38, socket.SOCK_SEQPACKET)
    return "ok"


@trial("raise_limit")
def _():
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 21, 1 << 21))
    return "ok"


print(json.dumps(found))
