"""`vlarl submit`: a run as a job of a Ray cluster.

What is uploaded is a directory with the resolved config, and with `--code` this package's source, which is then what
the job imports. The job is `vlarl train CONFIG --run-dir DIRECTORY --resume auto` on the cluster, so whether it begins
or goes on is decided where the run's directory is.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from vlarl_rllib.commands.jobs import Cluster
from vlarl_rllib.process.console import make_console
from vlarl_rllib.process.signals import GRACE_SECONDS
from vlarl_rllib.process.source_revision import source_revision
from vlarl_rllib.runs.places import too_small
from vlarl_rllib.settings import Settings, SettingsError, calculate_runtime_args

PACKAGE = Path(__file__).parents[1]
MAX_UPLOAD_BYTES = 100 * 2**20
"""Ray's dashboard takes no more (`DASHBOARD_CLIENT_MAX_SIZE`)."""
JUNK_FOLDERS = ("__pycache__", "runs", "venv", "build", "dist", "checkpoints", "*.egg-info")
"""In a package's folder, unless they are packages themselves."""
JUNK = shutil.ignore_patterns(
    ".*", "*.pyc", "*.safetensors", "*.pt", "*.pth", "*.bin", "*.zip", "*.tar*", "*.mp4", "*.tfrecord*"
)  # fmt: skip
STOP_MARGIN_SECONDS = 5
"""For the job's processes to be gone, behind the end that the run grants itself."""


@dataclass(frozen=True)
class Submission:
    """What `vlarl submit` is asked for.

    Attributes:
        run_dir: where the run goes, as the cluster's nodes see it; absolute.
        command: how a person has asked for it, for the job's metadata.
        python: the interpreter that has the package, as the cluster's head finds it.
        code: whether to upload the package's source.
        follow: whether to print the job's log until its end.
    """

    run_dir: Path
    command: str
    python: str = "python"
    code: bool = False
    follow: bool = False

    @property
    def entrypoint(self) -> str:
        """`exec`: a signal to the job is then the run's alone, not a shell's too."""
        train = ["-m", "vlarl_rllib", "train", "config.yaml", "--run-dir", str(self.run_dir), "--resume", "auto"]
        return f"exec {shlex.join([self.python, *train])}"

    def new_job(self) -> str:
        """A name for it: the run's, and the time."""
        run = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.run_dir.name).strip("-.") or "run"
        return f"{run}-{time.strftime('%Y%m%d-%H%M%S')}"


def submit(settings: Settings, submission: Submission, address: str) -> int:
    """Submit the run, and follow it where that is asked for; the exit code, see `Cluster.follow`.

    Raises:
        SettingsError: the cluster cannot be reached, is too small, or another job is at that directory; the upload is
            too large.
    """
    console = make_console()
    cluster = Cluster(address)
    has = cluster.resources()  # none of a head that has just been started and knows of no node yet
    for problem in (
        too_small(calculate_runtime_args(settings), has) if has and not settings.placement.wait_for_nodes else ()
    ):
        raise SettingsError(problem)
    if busy := cluster.job_at(submission.run_dir):
        raise SettingsError(
            f"--run-dir: job {busy} is at {submission.run_dir}; stop it with: {cluster.command('stop', busy)}"
        )
    for key, path in settings.paths():
        console.print(f"{key}: {path} is looked for on the cluster", style="dim")
    metadata = {"run": submission.run_dir.name, "run_dir": str(submission.run_dir), "command": submission.command}
    if revision := source_revision():
        metadata["git"] = revision
    with _staged(settings, submission.code) as directory:
        files = _files(directory)
        size = sum(file.stat().st_size for file in files)
        check_upload(directory, size)
        what = f"the config and {len(files) - 1} files of {PACKAGE.name}" if submission.code else "the config"
        console.print(f"uploading {size / 1e6:.2f} MB: {what}", style="dim")
        job = cluster.submit(submission.new_job(), submission.entrypoint, directory, metadata, stop_seconds(settings))
    console.print(f"submitted {job}: {submission.run_dir} on {cluster.address}")
    if submission.follow:
        return cluster.follow(job)
    console.print(f"follow it with: {cluster.command('logs', job, '--follow')}")
    console.print(f"stop it, with a checkpoint, with: {cluster.command('stop', job)}")
    return 0


def stop_seconds(settings: Settings) -> int:
    """How long Ray is to wait between SIGTERM and SIGKILL, a whole number: Ray reads it with `int`."""
    return math.ceil(settings.run.stop_seconds + GRACE_SECONDS + STOP_MARGIN_SECONDS)


@contextmanager
def _staged(settings: Settings, code: bool) -> Iterator[Path]:
    """A directory with what is uploaded."""
    with tempfile.TemporaryDirectory(prefix="vlarl-submit-") as temporary:
        directory = Path(temporary)
        (directory / "config.yaml").write_text(yaml.safe_dump(settings.to_dict(), sort_keys=False))
        if code:
            copy_source(PACKAGE, directory)
        yield directory


def copy_source(package: Path, directory: Path) -> None:
    """A package's source, without what else lies in its folder, and what its installation says of it: vLLM finds our
    plugin there."""
    shutil.copytree(package, directory / package.name, ignore=_no_source)
    try:
        installed = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        return
    facts = directory / f"{package.name}-{installed.version}.dist-info"
    facts.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        # an installation in place calls it PKG-INFO
        if text := installed.read_text(name) or (name == "METADATA" and installed.read_text("PKG-INFO")):
            (facts / name).write_text(text)


def _no_source(folder: str, names: list[str]) -> set[str]:
    """Of what lies in a package's folder."""
    folders = shutil.ignore_patterns(*JUNK_FOLDERS)(folder, names)
    return JUNK(folder, names) | {name for name in folders if not Path(folder, name, "__init__.py").is_file()}


def _files(directory: Path) -> list[Path]:
    return [file for file in sorted(directory.rglob("*")) if file.is_file()]


def check_upload(directory: Path, size: int) -> None:
    """Raise `SettingsError` where Ray takes no upload of that size, naming what is largest."""
    if size <= MAX_UPLOAD_BYTES:
        return
    largest = sorted(_files(directory), key=lambda file: -file.stat().st_size)[:3]
    named = ", ".join(f"{file.relative_to(directory)} ({file.stat().st_size / 1e6:.0f} MB)" for file in largest)
    raise SettingsError(
        f"--code: {size / 1e6:.0f} MB, and a Ray cluster takes {MAX_UPLOAD_BYTES / 1e6:.0f} MB at most; move out of "
        f"{PACKAGE} what is no source: {named}"
    )
