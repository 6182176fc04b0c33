"""`vlarl jobs`, and what `vlarl submit` shares with it: the jobs of a Ray cluster, through its dashboard."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass, urlopen

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from vlarl_rllib.process.console import make_console
from vlarl_rllib.process.signals import END
from vlarl_rllib.process.surroundings import PROBE_SECONDS, check_token, ray_token, unreachable
from vlarl_rllib.rllib_compat import quiet_dashboard_client
from vlarl_rllib.settings import SettingsError

EXAMPLE = "http://head:8265"
STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
SAY_SECONDS = 10.0
"""Between two lines that say that a job has not ended yet."""
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0
"""With a dashboard that does not answer any more while a job is followed."""
STOPPED_CODE = 143
"""As of a process that SIGTERM has ended: whoever follows a job is told that it is not done."""
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
NOT_KNOWN = "status code 404"
"""Ray's client's words for a job that there is not."""
NOT_FOUND_CODE = 127
"""A shell's, for a program that is not there."""
NO_MODULE = "No module named"
"""Python's words for a package that is not installed."""


@dataclass
class Printed:
    """How much of a job's log is printed."""

    characters: int = 0


class Cluster:
    """The jobs of one cluster.

    Args:
        address: of its dashboard.

    Raises:
        SettingsError: there is none, or it does not take our token; within 10 s.
    """

    def __init__(self, address: str) -> None:
        self.address = parse_dashboard_address(address)
        check_token()
        _probe(self.address)
        # Ray's client sends a token where RAY_AUTH_MODE says so alone; a cluster asks for one where its head has one.
        token = None if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled" else ray_token()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        with self._asked():
            self._client = JobSubmissionClient(self.address, headers=dict(self._headers))

    def command(self, verb: str, job: str, *options: str) -> str:
        """What a person types for it."""
        return shlex.join(["vlarl", "jobs", verb, job, *options, "--address", self.address])

    def resources(self) -> dict[str, float]:
        """Sums of what the nodes have, by name."""
        from ray.util.state import StateApiClient
        from ray.util.state.common import ListApiOptions, StateResource

        totals: dict[str, float] = {}
        alive = ListApiOptions(filters=[("state", "=", "ALIVE")], detail=True)
        with self._asked():
            nodes = StateApiClient(self.address, headers=dict(self._headers)).list(
                StateResource.NODES, alive, raise_on_missing_output=False
            )
        for node in nodes:
            for kind, amount in (node.resources_total or {}).items():
                totals[kind] = totals.get(kind, 0.0) + amount
        return totals

    def jobs(self) -> list[JobDetails]:
        """All that were submitted, the newest first."""
        with self._asked():
            found = self._client.list_jobs()
        return sorted((job for job in found if job.submission_id), key=lambda job: -(job.start_time or 0))

    def job_at(self, run_dir: Path) -> str | None:
        """The job that is writing to a run's directory."""
        for job in self.jobs():
            if (job.metadata or {}).get("run_dir") == str(run_dir) and job.status not in ENDED:
                return str(job.submission_id)
        return None

    def submit(self, job: str, entrypoint: str, directory: Path, metadata: dict[str, str], stop_seconds: int) -> str:
        """Upload the directory and start the command in it; the job's name."""
        with self._asked():
            return self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job,
                runtime_env={"working_dir": str(directory), "env_vars": {STOP_VARIABLE: str(stop_seconds)}},
                metadata=metadata,
            )

    def follow(self, job: str) -> int:
        """Print the job's log until it ends; its exit code, 143 where it was stopped. Ctrl-C ends the following
        alone."""
        try:
            self._print_log(job)
        except KeyboardInterrupt:
            make_console().print(
                f"{job} runs on; follow it with: {self.command('logs', job, '--follow')}; stop it with: "
                f"{self.command('stop', job)}"
            )
            return END.code
        return self._say_end(self._info(job))

    def show_log(self, job: str) -> int:
        with self._asked(job):
            sys.stdout.write(self._client.get_job_logs(job))
        return 0

    def stop(self, job: str) -> int:
        """Ask the job to end, and wait until it has; 1 where a run had to be killed."""
        console = make_console()
        info, began = self._info(job), time.monotonic()
        if info.status in ENDED:
            console.print(f"{job} has ended already: {_state(info)}")
            return 0
        END.words = lambda: f"{job} goes on ending; see: {self.command('logs', job)}"
        granted = float((info.runtime_env or {}).get("env_vars", {}).get(STOP_VARIABLE, 3))
        with self._asked(job):
            self._client.stop_job(job)
        console.print(f"{job} is ending, within {granted:g} s", style="dim")
        said = began
        while (info := self._info(job)).status not in ENDED:
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                console.print(f"waiting for {job} to end ... {said - began:.0f} s", style="dim")
            time.sleep(POLL_SECONDS)
        console.print(f"{job} has ended, after {time.monotonic() - began:.0f} s: {_state(info)}")
        with self._asked(job):
            words = [line for line in self._client.get_job_logs(job).splitlines() if line.startswith("stopped")]
        if words:
            console.print(words[-1].partition("; continue from")[0].partition(": start again")[0])
        elif time.monotonic() - began >= granted:
            console.print("it was killed before it could write a checkpoint; raise run.stop_seconds", style="yellow")
        command = (info.metadata or {}).get("command")
        if command:
            console.print(f"go on with the same command: {command} --address {self.address}")
        return 1 if command and not words and info.status != JobStatus.SUCCEEDED else 0

    def _info(self, job: str) -> JobDetails:
        with self._asked(job):
            return self._client.get_job_info(job)

    def _print_log(self, job: str) -> None:
        """Until the job has ended. A connection that breaks is made anew, where the log goes on."""
        printed, since = Printed(), time.monotonic()
        while True:
            try:
                with quiet_dashboard_client():
                    ended = self._client.get_job_info(job).status in ENDED
                    asyncio.run(self._tail(job, printed))
                if ended:
                    return
                since = time.monotonic()
            except (OSError, HTTPException, RuntimeError, AuthenticationError) as error:
                if time.monotonic() - since > PATIENCE_SECONDS or NOT_KNOWN in str(error):
                    raise self._mistake(error, job) from None
            time.sleep(POLL_SECONDS)

    async def _tail(self, job: str, printed: Printed) -> None:
        """Print what of the log has not been printed yet, and what comes, until the connection ends."""
        import aiohttp

        seen = 0
        try:
            async for text in self._client.tail_job_logs(job):
                new = text[max(0, printed.characters - seen) :]
                seen += len(text)
                printed.characters = max(printed.characters, seen)
                sys.stdout.write(new)
                sys.stdout.flush()
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from None

    def _say_end(self, info: JobDetails) -> int:
        console = make_console()
        console.print(f"{info.submission_id}: {_state(info)}")
        if info.status == JobStatus.SUCCEEDED:
            return 0
        if info.status == JobStatus.STOPPED:
            return STOPPED_CODE
        if info.driver_exit_code == NOT_FOUND_CODE or NO_MODULE in (info.message or ""):
            console.print(
                "the cluster's Python has no vlarl-rllib; name the one that has it with --python, as its head finds it"
            )
        return info.driver_exit_code or 1

    @contextmanager
    def _asked(self, job: str | None = None) -> Iterator[None]:
        """Around a call: what it raises is one line."""
        try:
            with quiet_dashboard_client():
                yield
        except SettingsError:
            raise
        except (OSError, HTTPException, RuntimeError, ValueError, AuthenticationError) as error:
            raise self._mistake(error, job) from None

    def _mistake(self, error: Exception, job: str | None) -> SettingsError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if isinstance(error, AuthenticationError) or "status code 401" in lines[0] or "status code 403" in lines[0]:
            return SettingsError(_about_token(self.address))
        if NOT_KNOWN in lines[0] and job is not None:
            return SettingsError(
                f"JOB: {job!r} is not known at {self.address}; see vlarl jobs list --address {self.address}"
            )
        if "status code 413" in lines[0]:
            return SettingsError(f"--code: {self.address} takes no upload of this size; Ray's limit is 100 MB")
        return SettingsError(f"--address: {self.address}: {lines[0]}{f' ... {lines[-1]}' if lines[1:] else ''}")


def list_jobs(address: str) -> int:
    """Print the jobs of a cluster, the newest first, a line each."""
    rows = [("job", "state", "started", "took", "run directory")]
    for job in Cluster(address).jobs():
        started, ended = (job.start_time or 0) / 1000, (job.end_time or 0) / 1000 or time.time()
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
        run_dir = (job.metadata or {}).get("run_dir", "-")
        rows.append((str(job.submission_id), _state(job), when, f"{(ended - started) / 60:.1f} min", run_dir))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        make_console().print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def parse_dashboard_address(address: str) -> str:
    """`http://host:port`, without a slash behind it. Raises `SettingsError` for anything else."""
    url = address.strip()
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is none
        valid = False
    if valid and parts.username is not None:
        raise SettingsError(
            "--address: holds a user's name, and what is behind it would be for all to read; a Ray cluster takes a "
            "token instead: set RAY_AUTH_TOKEN"
        )
    if not valid:
        raise SettingsError(
            f"--address: {address!r} is no dashboard's address; give one such as {EXAMPLE} (not Ray's port 6379, and "
            "not Ray Client's ray://)"
        )
    return url.rstrip("/")


def _probe(address: str) -> None:
    """Raise `SettingsError` unless a dashboard answers; Ray's client would wait for ever."""
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    direct = parts.scheme not in getproxies() or proxy_bypass(host)
    if direct and (problem := unreachable(host, port)) is not None:
        raise SettingsError(
            f"--address: nothing answers at {address} ({problem}); is the cluster up, and this its "
            f"dashboard's address, such as {EXAMPLE}?"
        )
    try:
        with urlopen(f"{address}/api/version", timeout=PROBE_SECONDS - 1) as answer:
            found = json.load(answer)
        problem = None if isinstance(found, dict) and "ray_version" in found else "it answers as something else"
    except HTTPError as error:
        problem = None if error.code in (401, 403) else f"HTTP {error.code}"
    except (OSError, HTTPException, ValueError) as error:
        problem = str(error).strip() or type(error).__name__
    if problem is not None:
        raise SettingsError(
            f"--address: no Ray dashboard at {address} ({problem}); give its address, such as "
            f"{EXAMPLE}; Ray's own port, 6379, is another one"
        )


def _about_token(address: str) -> str:
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        why = "wants a token, and RAY_AUTH_MODE is disabled; unset that, and"
    elif ray_token():
        why = "does not take this token;"
    else:
        why = "wants a token, and there is none;"
    return (
        f"--address: {address} {why} set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's "
        "(`ray get-auth-token` on its head prints it)"
    )


def _state(job: JobDetails | Any) -> str:
    code = job.driver_exit_code
    return job.status.value.lower() + (f" with exit code {code}" if job.status == JobStatus.FAILED and code else "")
