"""The container tools as peers: crun alone, Podman's command line, and the
bare libpod API. All start the busybox root without a network."""

import json
import os
import resource
import shutil
import subprocess

from . import process, web
from .samples import Stopwatch

IMAGE = "localhost/skyrl-test/busybox:v1"


class Crun:
    """crun on a bundle whose root is shared: no overlay, no store."""

    name = "crun"

    def __init__(self, images, work):
        self.source, self.work, self.count = os.path.join(images, "busybox"), os.path.join(work, "crun"), 0

    def missing(self):
        return None if shutil.which("crun") else "crun is not installed"

    def _bundle(self, name, argv):
        path = os.path.join(self.work, name)
        os.makedirs(path)
        subprocess.run(["crun", "spec"], cwd=path, check=True)
        with open(os.path.join(path, "config.json")) as file:
            spec = json.load(file)
        spec["root"] = {"path": self.rootfs, "readonly": False}
        spec["process"]["args"] = argv
        spec["process"]["terminal"] = False
        with open(os.path.join(path, "config.json"), "w") as file:
            json.dump(spec, file)
        return path

    def open(self):
        os.makedirs(self.work)
        # crun makes mount points in the root: use a copy of our own.
        self.rootfs = os.path.join(self.work, "root")
        shutil.copytree(self.source, self.rootfs, symlinks=True)
        self.once = self._bundle("once", ["true"])
        self.sleeper = self._bundle("sleeper", ["sleep", "100000"])
        self.live = self._name()
        process.timed(["crun", "run", "-d", "-b", self.sleeper, self.live])

    def close(self):
        subprocess.run(["crun", "delete", "-f", self.live], check=False)

    def _name(self):
        self.count += 1
        return f"skyrl-bench-{os.getpid()}-{self.count}"

    def first_result(self, table):
        table.add("first_result", "crun run true", process.timed(["crun", "run", "-b", self.once, self._name()]))

    def start_destroy(self, table):
        name = self._name()
        table.add("start", "crun run -d", process.timed(["crun", "run", "-d", "-b", self.sleeper, name]))
        table.add("destroy", "crun delete -f", process.timed(["crun", "delete", "-f", name]))

    def exec(self, table):
        table.add("exec", "crun exec", process.timed(["crun", "exec", self.live, "true"]))

    def exec16(self, table, seconds):
        call = ["crun", "exec", self.live, "true"]
        latencies, rate = web.crowd([lambda: process.timed(call)] * 16, seconds)
        table.add("exec16", "crun exec", *latencies)
        table.add("exec16_rate", "crun exec", rate)

    operations = {"first_result": 10, "start_destroy": 3, "exec": 10, "exec16": 1}


class Podman:
    """Podman's command line, on storage of its own."""

    name = "podman"

    def __init__(self, images, work):
        self.archive = os.path.join(images, "busybox.docker.tar")
        self.work, self.count = os.path.join(work, "podman"), 0

    def missing(self):
        return None if shutil.which("podman") else "podman is not installed"

    def open(self):
        os.makedirs(self.work)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        processes = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        limit = f"nproc=4096:{4096 if processes == resource.RLIM_INFINITY else min(4096, processes)}"
        conf = os.path.join(self.work, "containers.conf")
        with open(conf, "w") as file:
            file.write(f'[containers]\ndefault_ulimits = ["nofile=1024:{min(hard, 20000)}", "{limit}"]\n'
                       '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "crun"\n')
        self.env = {**os.environ, "CONTAINERS_CONF": conf}
        self.base = ["podman", "--root", f"{self.work}/root", "--runroot", f"{self.work}/run",
                     "--tmpdir", f"{self.work}/tmp", "--storage-driver", "overlay"]
        self._run("load", "-q", "-i", self.archive)
        self.live = self._name()
        self._start(self.live)

    def _argv(self, *args):
        return [*self.base, *args]

    def _run(self, *args):
        subprocess.run(self._argv(*args), env=self.env, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)

    def close(self):
        subprocess.run(self._argv("rm", "-f", "-a", "-t0"), env=self.env, check=False,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Monitors of API execs linger for 5 minutes, then start podman again.
        process.stop_users_of(self.work)
        subprocess.run(["umount", f"{self.work}/root/overlay"], check=False, stderr=subprocess.DEVNULL)

    def _name(self):
        self.count += 1
        return f"bench-{self.count}"

    def _start(self, name):
        return process.timed(self._argv("run", "-d", "--network", "none", "--name", name, IMAGE,
                                        "sleep", "100000"), self.env)

    def lifetime(self, table):
        name = self._name()
        started = self._start(name)
        executed = process.timed(self._argv("exec", name, "true"), self.env)
        table.add("start", "podman run -d", started)
        table.add("first_result", "podman run -d + exec", started + executed)
        table.add("destroy", "podman rm -f -t0", process.timed(self._argv("rm", "-f", "-t0", name), self.env))

    def exec(self, table):
        table.add("exec", "podman exec", process.timed(self._argv("exec", self.live, "true"), self.env))

    def exec16(self, table, seconds):
        call = self._argv("exec", self.live, "true")
        latencies, rate = web.crowd([lambda: process.timed(call, self.env)] * 16, seconds)
        table.add("exec16", "podman exec", *latencies)
        table.add("exec16_rate", "podman exec", rate)

    operations = {"lifetime": 3, "exec": 4, "exec16": 1}


class Libpod:
    """The calls our podman engine can't do without, and nothing else."""

    name = "libpod"

    def __init__(self, podman):
        self.podman = podman

    def missing(self):
        return self.podman.missing()

    def open(self):
        path = f"{self.podman.work}/api.sock"
        self.server = process.start(self.podman._argv("system", "service", "--time=0", f"unix://{path}"),
                                    f"{self.podman.work}/api.log", self.podman.env)
        web.wait_healthy(path, "/v4.0.0/libpod/_ping")
        self.path = path
        self.client = web.Client(path)

    def close(self):
        self.client.close()
        process.stop(self.server)

    def _exec(self, container):
        made = self.client.call("POST", f"/v4.0.0/libpod/containers/{container}/exec",
                                {"Cmd": ["true"], "AttachStdout": True, "AttachStderr": True})
        # The reply is the output itself, until the connection ends.
        stream = web.Client(self.path)
        stream.call("POST", f"/v4.0.0/libpod/exec/{made['Id']}/start", {"Detach": False})
        stream.close()

    def lifetime(self, table):
        call = self.client.call
        nofile = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 20000)
        watch = Stopwatch()
        made = call("POST", "/v4.0.0/libpod/containers/create", {
            "image": IMAGE, "command": ["sleep", "100000"], "netns": {"nsmode": "none"},
            "r_limits": [{"type": "nofile", "soft": 1024, "hard": nofile},
                         {"type": "nproc", "soft": 4096, "hard": 4096}]})
        call("POST", f"/v4.0.0/libpod/containers/{made['Id']}/start")
        started = watch.ms()
        self._exec(made["Id"])
        table.add("first_result", "libpod API", watch.ms())
        table.add("start", "libpod API", started)
        watch = Stopwatch()
        self._exec(made["Id"])
        table.add("exec", "libpod API", watch.ms())
        watch = Stopwatch()
        call("DELETE", f"/v4.0.0/libpod/containers/{made['Id']}?force=true&timeout=0")
        table.add("destroy", "libpod API", watch.ms())

    operations = {"lifetime": 3}
