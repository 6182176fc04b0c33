"""A head of a Ray cluster with a token, as `ray start --head` makes it, with ports and a directory of its own."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

PATIENCE_SECONDS = 120.0
TOKEN = "feedfacefeedfacefeedfacefeedface"
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
OURS = "VLARL_TEST_HEAD"


class Head:
    """A head, started; `stop` it.

    Args:
        num_cpus: that it says it has.
        root: where its token and home are; not its sockets, whose paths would be too long.
    """

    def __init__(self, num_cpus: int, root: Path) -> None:
        self.home, self.token_file = root / "home", root / "token"
        self.home.mkdir()
        self.token_file.write_text(TOKEN)
        self._temporary = tempfile.TemporaryDirectory(dir="/tmp", prefix="vj", ignore_cleanup_errors=True)
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.address, self.gcs_port = f"http://127.0.0.1:{ports['dashboard-port']}", ports["port"]
        self.environment = self._environment(RAY_AUTH_TOKEN_PATH=str(self.token_file))
        options = [f"--{name}={value}" for name, value in ports.items()]
        options += [f"--num-cpus={num_cpus}", f"--object-store-memory={2**27}", "--disable-usage-stats", "--block"]
        output = root / "head.txt"
        self._session = str(root)
        self._process = self._start(["--head", *options], output)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.answers():
            assert self._process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.3)

    def _start(self, options: list[str], output: Path, **variables: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
            cwd=output.parent, env=self.environment | {OURS: self._session} | variables, stdout=output.open("w"),
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def add_node(self, num_cpus: int) -> psutil.Process:
        """A second node of the cluster; its raylet."""
        options = [f"--address=127.0.0.1:{self.gcs_port}", f"--num-cpus={num_cpus}", "--disable-usage-stats", "--block"]
        options += [f"--object-store-memory={2**27}"]
        node = psutil.Process(self._start(options, self.home.parent / "node.txt", RAY_AUTH_MODE="token").pid)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            raylets = [child for child in node.children(recursive=True) if child.name() == "raylet"]
            if raylets and self.answers(num_nodes=2):
                return raylets[0]
            assert node.is_running() and time.monotonic() < deadline, (self.home.parent / "node.txt").read_text()
            time.sleep(0.3)

    def _environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONSAFEPATH"))}
        return kept | {"HOME": str(self.home), "RAY_TMPDIR": self._temporary.name} | variables

    def answers(self, num_nodes: int = 1) -> bool:
        """Whether its dashboard takes jobs and knows its nodes, which it does some seconds after it takes
        connections."""
        from urllib.error import URLError
        from urllib.request import Request, urlopen

        try:
            for what in ("jobs/", "v0/nodes"):
                request = Request(f"{self.address}/api/{what}", headers={"Authorization": f"Bearer {TOKEN}"})
                with urlopen(request, timeout=5) as answer:
                    found = answer.read()
        except (URLError, OSError):
            return False
        return found.count(b'"ALIVE"') >= num_nodes

    def vlarl(
        self, *arguments: str, package: Path | None = None, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        """A command of somebody who has the token, with the package of a clone."""
        return subprocess.run(
            [sys.executable, "-m", "vlarl_rllib", *arguments, "--address", self.address],
            env=self.client(package, **variables), capture_output=True, text=True, timeout=PATIENCE_SECONDS,
            cwd=self.home,
        )  # fmt: skip

    def client(self, package: Path | None = None, **variables: str) -> dict[str, str]:
        """The environment of somebody who has the token; theirs alone, no RAY_AUTH_MODE."""
        path = {"PYTHONPATH": str(package)} if package else {}
        return self._environment(RAY_AUTH_TOKEN_PATH=str(self.token_file), **path) | variables

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for process in psutil.process_iter():
            try:
                if process.environ().get(OURS) == self._session:
                    process.kill()
            except psutil.Error:
                continue
        self._temporary.cleanup()


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
