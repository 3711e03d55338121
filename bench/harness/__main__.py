"""Runs the benchmark: see `--help`."""

import argparse
import os
import shutil
import sys
import tempfile

from . import process, report
from .containers import Crun, Libpod, Podman
from .ours import Engine, Guest
from .samples import Table
from .servers import AgentServer, SweRex

BENCH = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def arguments():
    parser = argparse.ArgumentParser(prog="bench/run.sh", description=__import__("harness").__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="rounds through all subjects (20)")
    parser.add_argument("--quick", action="store_true", help="two rounds and a small crowd: to try the harness, not to cite")
    parser.add_argument("--only", action="append", default=[], metavar="SUBJECT", help="measure only this; may be repeated")
    parser.add_argument("--out", default=os.path.join(BENCH, "RESULTS.md"), help="the report")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
    options.seconds = 1 if options.quick else 3
    options.crowd = 50 if options.quick else 500
    return options


def subjects(images, work):
    podman, driver = Podman(images, work), os.environ["SKYRL_BENCH_DRIVER"]
    engines = [Engine(name, images, work, driver) for name in ("native", "oci", "podman-engine")]
    return [*engines, Guest(engines[0], work), Crun(images, work), podman, Libpod(podman),
            AgentServer(BENCH, work), SweRex(BENCH, work)]


class Noise:
    """What the machine itself does: starting /bin/true, and a fixed loop of
    arithmetic. Their spread bounds what the other figures can mean."""

    name, operations = "machine", {"noise": 5}

    def missing(self):
        return None

    def open(self):
        pass

    def close(self):
        pass

    def noise(self, table):
        table.add("noise", "start /bin/true", process.timed(["/bin/true"]))
        watch = process.Stopwatch()
        sum(number * number for number in range(50_000))
        table.add("noise", "arithmetic", watch.ms())


def run(options, images, work):
    table, missing, opened = Table(), {}, []
    try:
        for subject in [Noise(), *subjects(images, work)]:
            if options.only and subject.name not in options.only:
                continue
            why = subject.missing()
            if why:
                say(f"{subject.name} is left out: {why}")
                missing[subject.name] = why
                continue
            say(f"preparing {subject.name} ...")
            subject.open()
            opened.append(subject)
        # A crowd needs seconds, not rounds, for a steady figure.
        crowds = {round(options.rounds * part / 4) for part in (1, 2, 3)}
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            for subject in opened[number % len(opened):] + opened[:number % len(opened)]:
                if hasattr(subject, "refresh"):
                    subject.refresh()
                for operation, times in subject.operations.items():
                    act = getattr(subject, operation)
                    if operation == "exec16":
                        if number in crowds:
                            act(table, options.seconds)
                        continue
                    for _ in range(times):
                        act(table)
        for subject in opened:
            for operation in ("healthy", "crowd"):
                if hasattr(subject, operation):
                    say(f"{subject.name}: {operation}")
                    getattr(subject, operation)(table, options)
    finally:
        for subject in reversed(opened):
            subject.close()
    return table, missing


def main():
    options = arguments()
    images = os.environ["SKYRL_TEST_IMAGES"]
    work = tempfile.mkdtemp(prefix="skyrl-bench-")
    before = os.getloadavg()
    watch = process.Stopwatch()
    try:
        table, missing = run(options, images, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report.write(options, table, missing, before, watch.ms() / 1000)
    say(f"wrote {options.out}")


main()
