"""What is printed of a job, with a dashboard of words whose connection breaks; a real one: tests/e2e/test_jobs.py."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from vlarl_rllib.commands import jobs
from vlarl_rllib.commands.jobs import Cluster
from vlarl_rllib.process.signals import END
from vlarl_rllib.settings import SettingsError

LOG = (
    "run directory /data/run\n    1/3  12 %\n    2/3  25 %\nstopped with a checkpoint of iteration 2; continue from 2\n"
)


class Dashboard:
    """Stands in for Ray's client: a job that ends behind the last connection, and connections that break.

    Args:
        connections: how much of the log each one gives before it breaks; None = all of it, to an orderly end.
    """

    connections: tuple[int | None, ...] = (None,)
    state, code, message = JobStatus.SUCCEEDED, 0, ""

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        self._made, self._stopped = 0, False

    def get_job_info(self, job: str) -> JobDetails:
        if job != "job":
            raise RuntimeError("Request failed with status code 404: no such job.")
        over = self._made >= len(self.connections) or self._stopped
        facts = {
            "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "50"}},
            "metadata": {"command": "vlarl submit c"},
        }
        facts |= {"message": self.message, "driver_exit_code": self.code if over else None}
        state = self.state if over else JobStatus.RUNNING
        return JobDetails(type=JobType.SUBMISSION, submission_id=job, status=state, entrypoint="vlarl", **facts)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        length = self.connections[min(self._made, len(self.connections) - 1)]
        self._made += 1
        for letter in LOG[:length]:
            yield letter
        if length is not None:
            raise aiohttp.ClientConnectionError("reset")

    def stop_job(self, job: str) -> bool:
        self._stopped = True
        return True

    def get_job_logs(self, job: str) -> str:
        return LOG


@pytest.fixture(autouse=True)
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(jobs, "_probe", lambda address: None)
    monkeypatch.setattr(jobs, "JobSubmissionClient", Dashboard)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.001)
    for name, value in {"connections": (None,), "state": JobStatus.SUCCEEDED, "code": 0, "message": ""}.items():
        monkeypatch.setattr(Dashboard, name, value)
    yield Dashboard
    END._reset()


def test_a_connection_that_breaks_costs_no_line_and_repeats_none(
    dashboard: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.connections = (30, 0, 10, 60, None)
    assert Cluster("head:8265").follow("job") == 0
    assert capsys.readouterr().out == f"{LOG}job: succeeded\n"


def test_a_dashboard_that_is_gone_for_long_is_one_line(dashboard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard.connections = (0,)
    monkeypatch.setattr(jobs, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(SettingsError, match=r"^--address: http://head:8265: reset$"):
        Cluster("head:8265").follow("job")


@pytest.mark.parametrize(
    ("state", "code", "message", "exit_code", "words"),
    [
        (JobStatus.STOPPED, None, "", 143, "job: stopped"),
        (JobStatus.FAILED, 75, "", 75, "job: failed with exit code 75"),
        (JobStatus.FAILED, None, "", 1, "job: failed"),
        (JobStatus.FAILED, 1, "python: No module named vlarl_rllib", 1, "name the one that has it with --python"),
        (JobStatus.FAILED, 127, "sh: 1: python: not found", 127, "name the one that has it with --python"),
        (JobStatus.FAILED, 2, "vlarl: model.path: not found", 2, "job: failed with exit code 2"),
    ],
)
def test_the_exit_code_is_the_jobs(
    dashboard: Any,
    state: JobStatus,
    code: int | None,
    message: str,
    exit_code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dashboard.state, dashboard.code, dashboard.message = state, code, message
    assert Cluster("head:8265").follow("job") == exit_code
    assert words in capsys.readouterr().out.splitlines()[-1]


def test_stop_says_when_the_job_has_ended_what_it_has_kept_and_how_to_go_on(
    dashboard: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.state, dashboard.code = JobStatus.STOPPED, None
    assert Cluster("head:8265").stop("job") == 0
    assert capsys.readouterr().out.splitlines() == [
        "job is ending, within 50 s",
        "job has ended, after 0 s: stopped",
        "stopped with a checkpoint of iteration 2",
        "go on with the same command: vlarl submit c --address http://head:8265",
    ]
