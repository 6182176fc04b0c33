"""A Ray cluster of several nodes on one machine, whose nodes share nothing but what nodes of a real one share.

Each node is a raylet in namespaces of its own: address (on a bridge that only they see), host name, process numbers,
/dev/shm, and a private directory with its home, working directory, TMPDIR and Ray's session. Objects and weights travel
over the network or not at all. All nodes see one more directory, `shared`, as they would a network file system, and the
same installation. Needs root, or a kernel that lets users make namespaces.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

PATIENCE_SECONDS = 120.0
TOKEN = "feedfacefeedfacefeedfacefeedface"
GATEWAY, NETWORK = "10.77.0.254", "10.77.0"
GCS_PORT = 6379

QUICK_TO_NOTICE = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1500"}
"""A node that does not answer five times is dead: within 10 s, not the minute that Ray allows by itself."""
FEW_CORES = {"RAY_enable_metrics_collection": "false"}
"""While a lost node's bundles have no place, Ray 2.60 tries to place them without a pause (ray-project/ray#65007): one
core for that, and another for its metrics, on a machine of two."""

HALL = f"""
ip link set lo up
ip link add bridge type bridge && ip addr add {GATEWAY}/24 dev bridge && ip link set bridge up
# whoever asks for an address outside is told at once that there is none
ip route add unreachable default && echo 1 > /proc/sys/net/ipv4/ip_forward
echo ready
exec sleep infinity
"""
"""The first process of all, whose end is the end of all nodes."""

NODE = """
set -e
hostname "$NAME"
mount -t tmpfs -o size=1g,mode=1777 none /dev/shm
mount -t tmpfs -o size=4g none "$PRIVATE"
mkdir "$HOME" "$TMPDIR" "$PRIVATE/here" "$PRIVATE/r"
printf '127.0.0.1 localhost\\n%s %s\\n' "$ADDRESS" "$NAME" > "$PRIVATE/hosts"
mount --bind "$PRIVATE/hosts" /etc/hosts
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$GATEWAY"
cd "$PRIVATE/here"
"$@" &
wait $!
"""
"""First process of a node. Not the raylet itself, so that drivers on the node may outlive it."""


AS_ROOT = () if os.geteuid() == 0 else ("--user", "--map-root-user")
LIKE_ROOT = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")


def _unshare(*namespaces: str, mine: Sequence[str] = AS_ROOT) -> list[str]:
    """Run in new namespaces; what runs there dies with the one who asked."""
    kinds = [f"--{name}" for name in ("mount", "pid", "net", *namespaces)]
    return ["unshare", *mine, *kinds, "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]


@functools.cache
def why_not() -> str | None:
    """Why this machine cannot have such a cluster; None where it can."""
    for tool in ("unshare", "nsenter", "setpriv", "ip", "mount"):
        if shutil.which(tool) is None and not Path("/usr/sbin", tool).exists():
            return f"{tool} is not installed"
    script = f"mount -t tmpfs none /dev/shm && {HALL.replace('exec sleep infinity', '')}"
    tried = subprocess.run([*_unshare("uts"), "sh", "-ec", script], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"namespaces cannot be made here: {tried.stderr.strip()}"


class Node:
    """A machine of the cluster."""

    def __init__(self, name: str, address: str, entry: subprocess.Popen[bytes], first: psutil.Process) -> None:
        self.name, self.address, self._entry, self.first = name, address, entry, first

    def enter(self) -> list[str]:
        """Words before a command that runs on the node."""
        return ["nsenter", f"--target={self.first.pid}", "--mount", "--pid", "--net", "--uts", *LIKE_ROOT]

    def kill(self) -> None:
        """As a power cut: all processes of the node at once."""
        self.first.kill()
        self._entry.wait(30)

    def process(self, pid: int) -> psutil.Process:
        """The process that is `pid` for those on the node, where numbers begin anew."""
        for process in self.first.children(recursive=True):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                continue
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
            if numbers[-1] == str(pid):
                return process
        raise LookupError(f"{self.name} has no process {pid}")


class Raylets:
    """Nodes that come and go; a context manager, at whose end nothing is left.

    Args:
        num_cpus: of the head, where drivers run, too.
    """

    def __init__(self, num_cpus: int = 1, labels: Mapping[str, str] | None = None, **resources: float) -> None:
        if reason := why_not():
            pytest.skip(f"several nodes on one machine: {reason}")
        self._root = Path(tempfile.mkdtemp(dir="/tmp", prefix="vn"))  # short: Ray's sockets lie below
        self.shared, self._private = self._root / "shared", self._root / "n"
        self.private = self._private
        """Of each node; here, outside, it is empty."""
        self.nodes: dict[str, Node] = {}
        self._given = 0
        for directory in (self.shared, self._private):
            directory.mkdir()
        try:
            self._hall = self._popen([*_unshare(), "sh", "-ec", HALL], stdout=subprocess.PIPE)
            assert self._hall.stdout is not None and self._hall.stdout.readline() == b"ready\n"
            self._in_hall = self._first_below(self._hall.pid, 1)
            self.head = self.add("head", num_cpus, labels, **resources)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Raylets:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(self, name: str, num_cpus: int, labels: Mapping[str, str] | None = None, **resources: float) -> Node:
        """Start a node and wait until the head knows it; the first one is the head.

        Args:
            resources: custom ones.
        """
        self._given += 1
        address, is_head = f"{NETWORK}.{self._given}", not self.nodes
        where = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"] if is_head else []
        where = where or [f"--address={self.head.address}:{GCS_PORT}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={address}", f"--num-cpus={num_cpus}", "--num-gpus=0"]
        command += [f"--object-store-memory={80 * 2**20}", f"--resources={json.dumps(resources)}"]
        command += [f"--labels={','.join(f'{key}={value}' for key, value in (labels or {}).items())}"] * bool(labels)
        command += [f"--temp-dir={self._private}/r"] * is_head
        log = (self._root / f"{name}.txt").open("wb")
        entry = self._popen(
            [*self._enter_hall("--mount", "--pid"), *_unshare("uts", mine=()), "bash", "-c", NODE, "node", *command],
            env=self.environment(NAME=name, ADDRESS=address, GATEWAY=GATEWAY, PRIVATE=str(self._private)),
            stdout=log, stderr=log,
        )  # fmt: skip
        node = self.nodes[name] = Node(name, address, entry, self._first_below(entry.pid, 2))
        link = f"ip link add v{self._given} type veth peer name eth0 netns {node.first.pid}"
        link += f" && ip link set v{self._given} master bridge up"
        subprocess.run([*self._enter_hall(), "sh", "-ec", link], check=True)
        _wait(lambda: "Ray runtime started" in self._said(name) or entry.poll() is not None, f"{name} does not start")
        assert entry.poll() is None, self._said(name)
        return node

    def kill(self, name: str) -> None:
        """As a power cut: all processes of the node at once."""
        self.nodes.pop(name).kill()

    def environment(self, **variables: str) -> dict[str, str]:
        """Of what runs on a node."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONSAFEPATH"))}
        ours = {"HOME": f"{self._private}/home", "TMPDIR": f"{self._private}/tmp", "OMP_NUM_THREADS": "1"}
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": f"{NETWORK}.1:{GCS_PORT}"}
        return kept | ours | ray | QUICK_TO_NOTICE | FEW_CORES | variables

    def popen(self, *arguments: str, on: str = "head", **variables: str) -> subprocess.Popen[bytes]:
        """Start a command in the working directory of a node; its output goes to `output` behind `run`."""
        change = ["sh", "-c", f'cd {self._private}/here && exec "$@"', "sh"]
        with (self._root / "command.txt").open("ab") as log:
            return self._popen(
                [*self.nodes[on].enter(), *change, *arguments],
                env=self.environment(**variables), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def run(self, *arguments: str, on: str = "head", timeout: float = PATIENCE_SECONDS, **variables: str) -> Any:
        """Run a command on a node, to its end: subprocess's CompletedProcess, with text."""
        change = ["sh", "-c", f'cd {self._private}/here && exec "$@"', "sh"]
        return subprocess.run(
            [*self.nodes[on].enter(), *change, *arguments],
            env=self.environment(**variables), capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def vlarl(self, *arguments: str, **options: Any) -> Any:
        """`run`, of one of our commands."""
        return self.run(sys.executable, "-m", "vlarl_rllib", *arguments, **options)

    def python(self, code: str, *arguments: str, **options: Any) -> Any:
        """`run`, of a piece of Python."""
        return self.run(sys.executable, "-c", textwrap.dedent(code), *arguments, **options)

    def output(self) -> str:
        """Of everything that `popen` started."""
        return (self._root / "command.txt").read_text()

    def close(self) -> None:
        if hasattr(self, "_hall"):
            self._hall.kill()  # and the kernel the rest
            self._hall.wait()
            _wait(lambda: not self._is_used(), "something outlives the cluster")
        shutil.rmtree(self._root, ignore_errors=True)

    def _is_used(self) -> bool:
        return any(node.first.is_running() for node in self.nodes.values()) or self._in_hall.is_running()

    def _popen(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Dies with this process, also by a kill."""
        return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, **options)

    def _enter_hall(self, *namespaces: str) -> list[str]:
        return ["nsenter", f"--target={self._in_hall.pid}", "--net", *namespaces, *LIKE_ROOT]

    def _first_below(self, pid: int, generations: int) -> psutil.Process:
        """The only child of the only child."""
        found = psutil.Process(pid)
        for _ in range(generations):
            _wait(lambda parent=found: bool(parent.children()), "no namespaces")  # type: ignore[misc]
            found = found.children()[0]
        return found

    def _said(self, name: str) -> str:
        return (self._root / f"{name}.txt").read_text()


def _wait(condition: Callable[[], Any], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def interrupt(command: subprocess.Popen[bytes], number: signal.Signals = signal.SIGINT) -> None:
    """Send a signal to what `Raylets.popen` started; `nsenter`, its parent, hands none on."""
    psutil.Process(command.pid).children()[0].send_signal(number)
