"""Starting programs with little overhead, and looking at what they use."""

import os
import signal
import subprocess
import time

from .samples import Stopwatch

NULL = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]


def timed(argv, env=None):
    """Milliseconds from spawn to exit; a failing program raises."""
    watch = Stopwatch()
    pid = os.posix_spawnp(argv[0], argv, env or os.environ, file_actions=NULL)
    _, status = os.waitpid(pid, 0)
    spent = watch.ms()
    if status != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {os.waitstatus_to_exitcode(status)}")
    return spent


def start(argv, log, env=None, cwd=None):
    """A server in a process group of its own, its output in the file `log`."""
    with open(log, "ab") as out:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                env=env, cwd=cwd, start_new_session=True)


def stop(process):
    """Ends a server and its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(10)
            if number == signal.SIGKILL:
                break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def users_of(directory):
    """Every process whose command line names `directory`, which is ours."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if int(pid) != os.getpid() and any(os.fsencode(directory) in word for word in words):
            found.append(int(pid))
    return found


def stop_users_of(directory):
    for pid in users_of(directory):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _children(pid):
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in file.read().split():
                    yield int(child)
    except OSError:
        return


def tree(pid):
    """A process and all below it."""
    found, todo = [], [pid]
    while todo:
        at = todo.pop()
        found.append(at)
        todo.extend(_children(at))
    return found


def memory_mib(pids, field="Rss"):
    """Sum over processes of `Rss` or `Pss` (shared pages divided), in MiB."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as file:
                for line in file:
                    if line.startswith(field + ":"):
                        total += int(line.split()[1])
        except OSError:
            continue  # it ended meanwhile
    return total / 1024


def cpu_seconds(pids):
    """User and system time spent so far."""
    ticks = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def running(program):
    """Every process of this very program: mounted elsewhere, or run from a
    copy in memory that keeps its name."""
    wanted, found = os.stat(program), []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            at, name = os.stat(f"/proc/{pid}/exe"), os.readlink(f"/proc/{pid}/exe")
        except OSError:
            continue
        if (at.st_dev, at.st_ino) == (wanted.st_dev, wanted.st_ino) or os.path.basename(program) in name:
            found.append(int(pid))
    return found


def free_memory_mib():
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def settle(seconds=0.5):
    """Lets the machine finish what the last operation left behind."""
    time.sleep(seconds)
