"""A small keep-alive HTTP client over TCP or a Unix socket, the same for every
server that is measured from Python."""

import http.client
import json
import socket
import threading
import time

from .samples import Stopwatch


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Client:
    """One connection to `address`: ("127.0.0.1", port) or a socket's path."""

    def __init__(self, address, headers=None, timeout=60):
        if isinstance(address, str):
            self.connection = UnixConnection(address, timeout)
        else:
            self.connection = http.client.HTTPConnection(*address, timeout=timeout)
        self.headers = {"Content-Type": "application/json", **(headers or {})}

    def call(self, method, path, body=None):
        """The reply's JSON (or bytes). Any status but 2xx raises."""
        data = None if body is None else json.dumps(body).encode()
        self.connection.request(method, path, data, self.headers)
        reply = self.connection.getresponse()
        text = reply.read()
        if not 200 <= reply.status < 300:
            raise RuntimeError(f"{method} {path}: {reply.status} {text[:300]!r}")
        if reply.getheader("Content-Type", "").startswith("application/json") and text:
            return json.loads(text)
        return text

    def close(self):
        self.connection.close()


def wait_healthy(address, path, headers=None, deadline=120, pause=0.005):
    """Milliseconds until `path` answers 2xx."""
    watch = Stopwatch()
    while True:
        client = Client(address, headers, timeout=5)
        try:
            client.call("GET", path)
            return watch.ms()
        except (OSError, RuntimeError, http.client.HTTPException):
            if watch.ms() > deadline * 1000:
                raise TimeoutError(f"{address}{path} was not healthy after {deadline} s") from None
            time.sleep(pause)
        finally:
            client.close()


def crowd(calls, seconds):
    """Each of `calls` is called over and over in a thread of its own.

    Returns (latencies in ms, calls per second).
    """
    latencies, errors, lock = [], [], threading.Lock()
    ready = threading.Barrier(len(calls) + 1)
    end = None

    def work(call):
        own = []
        ready.wait()
        try:
            while time.monotonic() < end:
                watch = Stopwatch()
                call()
                own.append(watch.ms())
        except Exception as error:  # raised below, from the main thread
            errors.append(error)
        with lock:
            latencies.extend(own)

    threads = [threading.Thread(target=work, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    watch = Stopwatch()
    ready.wait()
    for thread in threads:
        thread.join()
    wall = watch.ms() / 1000
    if errors:
        raise errors[0]
    return latencies, len(latencies) / wall
