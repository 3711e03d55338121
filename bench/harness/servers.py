"""The servers that others put inside a sandbox: OpenHands' agent-server and
SWE-ReX, each from PyPI in a virtual environment of its own. They run on the
bare host here, which spares them the container they would need."""

import functools
import os
import shutil
import socket
import subprocess
import sys

from . import process, web
from .samples import Stopwatch

KEY = "benchmark"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def find_python(minor):
    """A Python 3.`minor` or newer that can make virtual environments."""
    here = sys.executable if sys.version_info >= (3, minor) else None
    named = [f"python3.{number}" for number in range(minor, minor + 3)]
    pyenv = os.path.expanduser("~/.pyenv/versions")
    kept = [os.path.join(pyenv, name, "bin", "python3") for name in sorted(os.listdir(pyenv))
            if name.startswith(tuple(f"3.{number}." for number in range(minor, minor + 3)))
            ] if os.path.isdir(pyenv) else []
    for candidate in [here, *map(shutil.which, named), *kept]:
        if candidate and subprocess.run([candidate, "-c", f"import sys,venv; sys.exit(sys.version_info < (3,{minor}))"],
                                        capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def environment(bench, name, minor):
    """Makes `.venv-name` from requirements-name.txt; its bin directory, or why not."""
    folder = os.path.join(bench, f".venv-{name}")
    wanted = os.path.join(bench, f"requirements-{name}.txt")
    stamp = os.path.join(folder, "installed.txt")
    with open(wanted) as file:
        text = file.read()
    if os.path.exists(stamp) and open(stamp).read() == text:
        return os.path.join(folder, "bin"), None
    python = find_python(minor)
    if python is None:
        return None, f"needs Python 3.{minor} or newer, and this machine has none"
    print(f"bench: installing {name} from PyPI into bench/.venv-{name} (about 2 minutes) ...", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    # Every dependency is pinned in the list, so pip need not resolve anything.
    for argv in ([python, "-m", "venv", folder],
                 [os.path.join(folder, "bin", "pip"), "install", "-q", "--no-deps", "-r", wanted]):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return None, f"could not be installed: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
    with open(stamp, "w") as file:
        file.write(text)
    return os.path.join(folder, "bin"), None


class Server:
    """What both have in common: start, health, memory."""

    def __init__(self, bench, work):
        self.work = os.path.join(work, self.name)
        self.bin, self.reason = environment(bench, self.name, self.python)

    def missing(self):
        return self.reason

    def open(self):
        os.makedirs(self.work, exist_ok=True)
        self.server = None
        self.launch()
        self.client = web.Client(self.address, self.headers)
        self.caller(self.client, "main")

    def launch(self):
        """Starts it afresh; milliseconds until it answers."""
        if self.server:
            process.stop(self.server)
        self.address = ("127.0.0.1", free_port())
        watch = Stopwatch()
        self.server = process.start(self.argv(self.address[1]), f"{self.work}/log", self.env(), self.work)
        web.wait_healthy(self.address, self.health, self.headers)
        self.crowd_ready = False
        return watch.ms()

    def close(self):
        self.client.close()
        process.stop(self.server)

    def healthy(self, table, options):
        for _ in range(1 if options.quick else 3):
            spent = self.launch()
            process.settle()
            pids = process.tree(self.server.pid)
            table.add("healthy", self.label, spent)
            table.add("rss", self.label, process.memory_mib(pids))
            table.add("cpu_to_healthy", self.label, process.cpu_seconds(pids))

    def refresh(self):
        """Opens a new connection: both close those that idled for 5 s."""
        self.client.close()
        self.client = web.Client(self.address, self.headers)
        self.true(self.client, "main")

    def exec(self, table):
        watch = Stopwatch()
        self.true(self.client, "main")
        table.add("exec", self.label, watch.ms())

    def exec16(self, table, seconds):
        names = [f"caller-{number}" for number in range(16)]
        if not self.crowd_ready:
            for name in names:
                self.refresh()
                self.caller(self.client, name)
            self.crowd_ready = True
        clients = [web.Client(self.address, self.headers) for _ in names]
        calls = [functools.partial(self.true, client, name) for client, name in zip(clients, names)]
        latencies, rate = web.crowd(calls, seconds)
        table.add("exec16", self.label, *latencies)
        table.add("exec16_rate", self.label, rate)

    def caller(self, client, name):
        """Whatever a caller must do once before its first command."""


class AgentServer(Server):
    """OpenHands 1.x agent-server, `POST /api/bash/execute_bash_command`."""

    name, label, python, health = "openhands", "OpenHands agent-server", 12, "/health"
    headers = {"X-Session-API-Key": KEY}
    operations = {"exec": 40, "exec16": 1}

    def argv(self, port):
        return [f"{self.bin}/python", "-m", "openhands.agent_server", "--host", "127.0.0.1", "--port", str(port)]

    def env(self):
        return {**os.environ, "SESSION_API_KEY": KEY, "OPENHANDS_SUPPRESS_BANNER": "1",
                # Without this it spends seconds asking a network for prices of models.
                "LITELLM_LOCAL_MODEL_COST_MAP": "True"}

    def true(self, client, _name):
        reply = client.call("POST", "/api/bash/execute_bash_command", {"command": "true"})
        if reply["exit_code"] != 0:
            raise RuntimeError(f"unexpected reply {reply}")


class SweRex(Server):
    """SWE-ReX, `POST /run_in_session`, one session per caller."""

    name, label, python, health = "swerex", "SWE-ReX", 10, "/is_alive"
    headers = {"X-API-Key": KEY}
    operations = {"exec": 10, "exec16": 1}

    def argv(self, port):
        return [f"{self.bin}/swerex-remote", "--host", "127.0.0.1", "--port", str(port), "--auth-token", KEY]

    def env(self):
        return dict(os.environ)

    def caller(self, client, name):
        client.call("POST", "/create_session", {"session_type": "bash", "session": name, "startup_timeout": 30.0})

    def true(self, client, name):
        reply = client.call("POST", "/run_in_session", {"action_type": "bash", "command": "true", "session": name})
        if reply["exit_code"] != 0:
            raise RuntimeError(f"unexpected reply {reply}")
