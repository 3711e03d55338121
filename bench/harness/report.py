"""Turns samples into bench/RESULTS.md. Knows the goals, measures nothing."""

import datetime
import os
import platform
import shlex
import subprocess
import sys

from .samples import median, percentile

# Operation, title, unit, what the figure includes.
SECTIONS = [
    ("first_result", "From nothing to the first command's result", "ms",
     "Create, start, run `true`, have its exit code. crun runs `true` as the container's own process on a "
     "shared root without overlay; it is the floor, not an equal."),
    ("start", "Start alone", "ms", "Until the sandbox accepts commands (ours: the guest answered)."),
    ("fork", "A copy of a prepared sandbox, to its first command's result", "ms",
     "The files were frozen before (next table). The figure is to be held against the engine's own plain start."),
    ("freeze", "Freezing a prepared sandbox's files", "ms",
     "Once per group of copies. `consume` ends the sandbox, `copy` lets it go on."),
    ("exec", "`true` in a live sandbox, one caller", "ms",
     "Ours over the sandbox's Unix socket through the library. \"Same client\" is the client that also calls "
     "OpenHands and SWE-ReX, sending the very request it sends to OpenHands' agent-server."),
    ("exec16", "The same with 16 callers: time of each call", "ms", ""),
    ("exec16_rate", "The same with 16 callers: commands per second", "1/s", ""),
    ("destroy", "Destroy", "ms", "Until every process, mount and directory is gone."),
    ("healthy", "The server inside: start to healthy", "ms",
     "Started on the bare host. OpenHands is told not to fetch model prices from a network."),
    ("cpu_to_healthy", "The server inside: CPU time until then", "s", ""),
    ("rss", "The server inside: resident memory, idle", "MiB", "Ours: of a guest in a sandbox that ran commands."),
    ("program", "The server inside: size of its program", "MiB", ""),
    ("crowd_start", "Idle sandboxes: time to start all", "s", "The number in a name is how many."),
    ("crowd_memory", "Idle sandboxes: memory of all", "MiB",
     "What MemAvailable lost counts the kernel's share too (cgroups, mounts, sockets), and whatever else the "
     "machine did meanwhile. PSS is of the guests, the engine's helpers and the driver."),
    ("crowd_exec", "Idle sandboxes: `true` in one picked at random", "ms", ""),
    ("crowd_destroy", "Idle sandboxes: time to destroy all", "s", ""),
    ("noise", "The machine itself", "ms",
     "Starting /bin/true and a fixed loop of arithmetic between the other measurements: what differs by less "
     "than their spread is no difference."),
]


def figure(value):
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


class Goal:
    """A number to reach, and whether the table shows it reached."""

    def __init__(self, what, goal, check):
        self.what, self.goal, self.check = what, goal, check

    def row(self, table):
        try:
            measured, met = self.check(table)
        except LookupError:
            measured, met = "not measured", None
        verdict = {True: "yes", False: "**no**", None: "-"}[met]
        return f"| {self.what} | {self.goal} | {measured} | {verdict} |"


def p50(table, operation, subject):
    values = table.get(operation, subject)
    if not values:
        raise LookupError(operation, subject)
    return median(values)


def p99(table, operation, subject):
    values = table.get(operation, subject)
    if not values:
        raise LookupError(operation, subject)
    return percentile(values, 0.99)


def native_first(table):
    ours, crun = p50(table, "first_result", "native"), p50(table, "first_result", "crun run true")
    return f"{figure(ours)} ms, {ours / crun:.2f}x crun's {figure(crun)} ms", ours <= 15 and ours <= 2 * crun


def podman_first(table):
    ours, bare = p50(table, "first_result", "podman"), p50(table, "first_result", "libpod API")
    return f"{figure(ours)} ms, {ours / bare:.2f}x", ours <= 1.2 * bare


def destroyed(engine):
    def check(table):
        ours = p50(table, "destroy", engine)
        return f"{figure(ours)} ms", ours <= 10
    return check


def executed(table):
    middle, tail = p50(table, "exec", "native"), p99(table, "exec", "native")
    return f"{figure(middle)} / {figure(tail)} ms", middle <= 1.5 and tail <= 5


def executed16(table):
    rate = p50(table, "exec16_rate", "native")
    return f"{figure(rate)}/s", rate >= 1000


def guest(table):
    start, rss, size = (p50(table, name, "guest") for name in ("healthy", "rss", "program"))
    return (f"{figure(start)} ms; {figure(rss)} MiB; {figure(size)} MiB",
            start <= 5 and rss <= 4 and size <= 4)


def forked(engine):
    def check(table):
        plain = p50(table, "first_result", engine)
        small, large = (p50(table, "fork", f"{engine}, {size} MiB prepared") for size in (1, 200))
        return (f"{small / plain:.2f}x with 1 MiB, {large / plain:.2f}x with 200 MiB prepared",
                max(small, large) <= 1.3 * plain)
    return check


def crowded(table):
    name = "native, 500"
    seconds = p50(table, "crowd_start", name)
    mib = max(p50(table, "crowd_memory", f"{name}, {how}") for how in ("off MemAvailable", "PSS of all processes"))
    tail = p99(table, "crowd_exec", name)
    return (f"{figure(seconds)} s; {mib / 1024:.2f} GiB; {figure(tail)} ms",
            seconds <= 15 and mib <= 2.5 * 1024 and tail <= 50)


GOALS = [
    Goal("native: create to first command's result, p50", "<= 2x `crun run true` and <= 15 ms", native_first),
    Goal("podman engine: same", "<= 1.2x the bare libpod API calls", podman_first),
    *(Goal(f"{engine}: destroy, p50", "<= 10 ms", destroyed(engine)) for engine in ("native", "oci", "podman")),
    Goal("`true` in a live sandbox, p50 / p99 (directly to the guest; the goal is for the way through the "
         "runtime server, which does not exist yet)", "<= 1.5 / 5 ms", executed),
    Goal("same, 16 callers", ">= 1000/s", executed16),
    Goal("guest: start to healthy; RSS idle; binary", "<= 5 ms; <= 4 MiB; <= 4 MiB", guest),
    *(Goal(f"{engine}: fork of a prepared sandbox, against a plain start", "<= 1.3x, whatever was prepared",
           forked(engine)) for engine in ("native", "oci", "podman")),
    Goal("500 idle sandboxes (native): start all; memory; exec p99", "<= 15 s; <= 2.5 GiB; <= 50 ms", crowded),
]


def section(table, operation, title, unit, note):
    subjects = table.subjects(operation)
    if not subjects:
        return []
    lines = [f"### {title}", ""]
    if note:
        lines += [note, ""]
    base = median(table.get(operation, "native")) if table.get(operation, "native") else None
    lines += [f"| | p50 ({unit}) | p99 ({unit}) | n |" + (" native's p50 |" if base else ""),
              "|---|---:|---:|---:|" + ("---:|" if base else "")]
    for subject in sorted(subjects, key=lambda name: median(table.get(operation, name))):
        values = table.get(operation, subject)
        # A tail needs enough samples to be one.
        tail = figure(percentile(values, 0.99)) if len(values) >= 20 else "-"
        row = f"| {subject} | {figure(median(values))} | {tail} | {len(values)} |"
        if base:
            row += f" x {median(values) / base:.2f} |"
        lines.append(row)
    return [*lines, ""]


def output(*argv):
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def machine():
    model, memory = "unknown CPU", 0
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) / 1024 / 1024
    cgroups = "v2" if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else "v1"
    return (f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, Linux {platform.release()}, cgroup {cgroups}, "
            "as root")


def versions():
    first = lambda text: text.splitlines()[0] if text else "absent"
    names = [first(output("crun", "--version")), first(output("podman", "--version"))]
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name, package in (("openhands", "openhands-agent-server"), ("swerex", "swe-rex")):
        with open(os.path.join(here, f"requirements-{name}.txt")) as file:
            names += [line.strip().replace("==", " ") for line in file if line.startswith(package + "==")]
    return ", ".join(names)


def write(options, table, missing, load, seconds):
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    arguments = " ".join(map(shlex.quote, sys.argv[1:]))
    commit = output("git", "-C", os.path.dirname(__file__), "rev-parse", "--short", "HEAD")
    command = "make bench" + (f' BENCH="{arguments}"' if arguments else "")
    lines = [
        "# Sandboxes: measured beside their peers",
        "",
        f"Written by `{command}` on {date}, commit {commit or 'unknown'}, in {seconds / 60:.0f} minutes.",
        "",
        f"- Machine: {machine()}. Load before: {load[0]:.2f}.",
        f"- Peers: {versions()}.",
        f"- {options.rounds} rounds through all subjects, a few calls each, in rotating order: drift of the machine "
        "meets all alike. Figures are medians and nearest-rank p99; times are wall times.",
        "- Containers start from busybox without a network. Peers' servers run on the bare host, which spares "
        "them the container they would need.",
        "",
    ]
    if options.quick:
        lines += ["**A quick run, to try the harness: not to be cited.**", ""]
    lines += ["## Goals", "", "| what | goal | measured | met |", "|---|---|---|---|"]
    lines += [goal.row(table) for goal in GOALS]
    lines += ["", "## Figures", ""]
    for entry in SECTIONS:
        lines += section(table, *entry)
    if missing:
        lines += ["## Left out", ""] + [f"- {name}: {why}" for name, why in missing.items()] + [""]
    with open(options.out + ".new", "w") as file:
        file.write("\n".join(lines).rstrip() + "\n")
    os.rename(options.out + ".new", options.out)
