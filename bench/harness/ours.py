"""Our engines, driven through one long-lived process each (bench/driver), and
the guest alone."""

import json
import os
import shutil
import subprocess
import sys

from . import process, web
from .samples import Stopwatch


class Driver:
    """A driver process: one JSON line asks, one JSON line answers."""

    def __init__(self, program, engine, work, log):
        with open(log, "ab") as errors:
            self.child = subprocess.Popen([program, engine, work], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                          stderr=errors, start_new_session=True)
        try:
            self.hello = self._read()
        except RuntimeError:
            self.child.wait()
            with open(log) as file:
                raise RuntimeError(file.read().strip()[-1000:]) from None

    def _read(self):
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError("the driver ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def ask(self, do, **what):
        self.child.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
        self.child.stdin.flush()
        return self._read()

    def close(self):
        """End of input makes it remove all it started."""
        self.child.stdin.close()
        try:
            if self.child.wait(120) != 0:
                print(f"bench: a driver ended with {self.child.returncode}", file=sys.stderr)
        except subprocess.TimeoutExpired:
            process.stop(self.child)
            raise


class Engine:
    """One of our engines."""

    operations = {"first_result": 10, "fork": 5, "freeze": 1, "exec": 1, "same_client": 40, "exec16": 1}

    def __init__(self, name, images, work, program):
        self.name, self.program = name, program
        self.image = "dir:" + os.path.join(images, "busybox")
        if name == "podman-engine":
            self.image = "docker-archive:" + os.path.join(images, "busybox.docker.tar")
        self.engine = name.removesuffix("-engine")
        self.state, self.log = os.path.join(work, f"state-{self.engine}"), os.path.join(work, f"{self.engine}.log")
        self.count = 0

    def missing(self):
        try:
            self.driver = Driver(self.program, self.engine, self.state, self.log)
        except RuntimeError as error:
            return str(error)
        return None

    def _fresh(self, kind):
        self.count += 1
        return f"{kind}{self.count}"

    def open(self):
        self.ask = self.driver.ask
        self.socket = self.ask("start", name="live", image=self.image)["socket"]
        for mib in (1, 200):
            name = f"prepared{mib}"
            self.ask("start", name=name, image=self.image)
            self._fill(name, mib)
            self.ask("snapshot", name=name, snapshot=name, mode="consume")

    def close(self):
        self.driver.close()
        shutil.rmtree(self.state, ignore_errors=True)

    def _fill(self, name, mib):
        self.ask("run", name=name, argv=["dd", "if=/dev/urandom", "of=/prepared", "bs=1048576", f"count={mib}"])

    def _begin_and_end(self, table, image, started, first):
        name = self._fresh("s")
        answer = self.ask("start", name=name, image=image)
        if started:
            table.add("start", self.engine, answer["start_ms"])
        table.add(*first, *answer["ms"])
        table.add("destroy", self.engine, *self.ask("destroy", name=name)["ms"])

    def first_result(self, table):
        self._begin_and_end(table, self.image, True, ("first_result", self.engine))

    def fork(self, table):
        for mib in (1, 200):
            self._begin_and_end(table, f"snapshot:prepared{mib}", False,
                                ("fork", f"{self.engine}, {mib} MiB prepared"))

    def freeze(self, table):
        for mib in (1, 200):
            for mode in ("copy", "consume"):
                name, snapshot = self._fresh("s"), self._fresh("frozen")
                self.ask("start", name=name, image=self.image)
                self._fill(name, mib)
                spent = self.ask("snapshot", name=name, snapshot=snapshot, mode=mode)["ms"]
                table.add("freeze", f"{self.engine}, {mib} MiB, {mode}", *spent)
                if mode == "copy":
                    self.ask("destroy", name=name)
                self.ask("remove_snapshot", snapshot=snapshot)

    def exec(self, table):
        table.add("exec", self.engine, *self.ask("exec", name="live", times=100)["ms"])

    def refresh(self):
        self.client = web.Client(self.socket)
        self._same_true()

    def _same_true(self):
        reply = self.client.call("POST", "/api/bash/execute_bash_command", {"command": "true"})
        if reply["exit_code"] != 0:
            raise RuntimeError(f"unexpected reply {reply}")

    def same_client(self, table):
        watch = Stopwatch()
        self._same_true()
        table.add("exec", f"{self.engine}, same client", watch.ms())

    def exec16(self, table, seconds):
        answer = self.ask("crowd", names=["live"], callers=16, seconds=seconds)
        table.add("exec16", self.engine, *answer["ms"])
        table.add("exec16_rate", self.engine, len(answer["ms"]) / answer["seconds"])

    def crowd(self, table, options):
        label = f"{self.engine}, {options.crowd}"
        process.settle(3)
        before = process.free_memory_mib()
        started = self.ask("start_many", prefix="idle", count=options.crowd, parallel=8, image=self.image)
        table.add("crowd_start", label, started["seconds"])
        process.settle(3)
        table.add("crowd_memory", f"{label}, off MemAvailable", before - process.free_memory_mib())
        ours = {self.driver.child.pid, *process.users_of(self.state), *process.running(self.driver.hello["guest"])}
        table.add("crowd_memory", f"{label}, PSS of all processes", process.memory_mib(ours, "Pss"))
        names = [f"idle{number}" for number in range(options.crowd)]
        table.add("crowd_exec", label, *self.ask("crowd", names=names, callers=1, seconds=options.seconds)["ms"])
        ended = self.ask("destroy_many", prefix="idle", count=options.crowd, parallel=8)
        table.add("crowd_destroy", label, ended["seconds"])


class Guest:
    """The guest's program, started on the bare host like its peers, and its
    memory in a sandbox."""

    name, operations = "guest", {}

    def __init__(self, engine, work):
        self.engine, self.work = engine, os.path.join(work, "guest")

    def missing(self):
        return None

    def open(self):
        os.makedirs(self.work)

    def close(self):
        pass

    def healthy(self, table, options):
        program = self.engine.driver.hello["guest"]
        table.add("program", "guest", self.engine.driver.hello["guest_bytes"] / 2**20)
        for number in range(5 if options.quick else 100):
            path = os.path.join(self.work, f"{number}.sock")
            watch = Stopwatch()
            server = process.start([program, "--listen", path], os.path.join(self.work, "log"))
            web.wait_healthy(path, "/v1/health", pause=0.0002)
            table.add("healthy", "guest", watch.ms())
            process.stop(server)
        pids = process.running(program)
        if not pids:
            raise RuntimeError("no running guest was found to measure its memory")
        table.add("rss", "guest", *(process.memory_mib([pid]) for pid in pids))
