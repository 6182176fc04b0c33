"""What a report shows of a run, read from the files in the run's directory and checked: they may have been sent by
somebody, or damaged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vlarl_rllib.process.own_files import own_file, own_folder
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.settings import SettingsError
from vlarl_rllib.settings.in_place import flat

STAGES_FILE = "stages.json"
"""What `vlarl quickstart` leaves: a list of {stage, seconds, amount, success}; success = {rate, low, high, episodes,
by_task}, or None."""
SHOWN_METRICS = (
    "policy_loss",
    "value_loss",
    "explained_variance",
    "entropy",
    "grad_norm",
    "grad_norm_critic",
    "approx_kl",
    "clip_fraction",
    "logprob_gap_mean",
    "logprob_gap_max",
)
SHOWN_SECONDS = ("sample", "update", "sync", "evaluation", "recovery", "other")
MANY = 10**15


def _within(number: float) -> float:
    """Metrics of a run that went astray may be infinite or NaN, which a curve leaves out; what no float32 can be is no
    metric."""
    if abs(number) > 1e40 and abs(number) != float("inf"):
        raise ValueError("must not be larger than a float32")
    return number


Count = Annotated[int, Field(ge=0, le=MANY)]
Rate = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=MANY)]
Metric = Annotated[float, AfterValidator(_within)]
TaskRates = dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,5})$")], Rate]


class Evaluation(BaseModel):
    """Greedy episodes."""

    model_config = ConfigDict(strict=True, extra="allow")

    episodes: Annotated[int, Field(ge=1, le=MANY)]
    success_rate: Rate
    success_rate_by_task: TaskRates


class Applied(BaseModel):
    """What an update was made with."""

    model_config = ConfigDict(strict=True, extra="allow")

    lr: Metric
    value_lr: Metric


class Row(BaseModel):
    """A line of `metrics.jsonl`, as far as a report shows it, `SHOWN_METRICS` aside."""

    model_config = ConfigDict(strict=True, extra="allow")

    iteration: Count
    timestamp: Seconds
    git_revision: Annotated[str, Field(pattern=r"^[0-9a-f]{7,64}(-dirty)?$")] | None
    env_steps: Count
    episodes: Count
    return_mean: Metric | None
    episode_length: Seconds | None
    success_rate: Rate | None
    success_rate_by_task: TaskRates
    applied: Applied
    seconds: dict[str, Seconds]
    faults: dict[str, Count]
    initial_evaluation: Evaluation | None
    evaluation: Evaluation | None


class Summary(BaseModel):
    """`summary.json`, the same."""

    model_config = ConfigDict(strict=True, extra="allow")

    wall_seconds: Seconds
    versions: dict[str, str]


class StageSuccess(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    rate: Rate
    low: Rate
    high: Rate
    episodes: Count


class Stage(BaseModel):
    """An entry of `stages.json`."""

    model_config = ConfigDict(strict=True, extra="allow")

    stage: str
    seconds: Seconds
    amount: str
    success: StageSuccess | None


METRICS: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, Metric], config=ConfigDict(strict=True))
ROW, STAGES = TypeAdapter(Row), TypeAdapter(list[Stage])


class NoIterationError(SettingsError):
    """A run without a finished iteration."""


@dataclass(frozen=True)
class RunFiles:
    """A run with at least one iteration."""

    run: RunDirectory
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None
    """None before the run's end."""
    stages: list[dict[str, Any]]
    """Of a quickstart; none for other runs."""
    config: str
    """The text of `config.yaml`; empty where there is none."""

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        """By dotted keys, paths into the run's directory as `RUN_DIR/...`; None where this version cannot read them."""
        try:
            values = dict(flat(self.run.settings().to_dict()))
        except SettingsError:
            return None
        own = f"{self.run.path}/"
        return {
            key: value.replace(own, "RUN_DIR/", 1) if isinstance(value, str) and value.startswith(own) else value
            for key, value in values.items()
        }


def read_runs(paths: Sequence[Path]) -> tuple[list[RunFiles], list[str]]:
    """Those of runs, and of the trials in directories of Tune experiments; and what is to be told of them.

    Raises as `read_run`; a trial without an iteration is told and left out.
    """
    runs: list[RunFiles] = []
    told: list[str] = []
    for path in paths:
        trials = trial_directories(path)
        if not trials:
            runs.append(read_run(path))
            continue
        found: list[RunFiles] = []
        for trial in trials:
            try:
                found.append(read_run(trial))
            except NoIterationError:
                continue
        if not found:
            raise NoIterationError(f"RUN_DIR: no trial of {path} has a finished iteration; wait for one")
        if len(found) < len(trials):
            told.append(f"{len(trials) - len(found)} of {len(trials)} trials of {path.name} have no finished iteration")
        runs += found
    return runs, told


def trial_directories(path: Path) -> list[Path]:
    """The runs in the directory of a Tune experiment, in order; none where `path` is no such directory.

    Links, such as `runs/latest`, are not followed.
    """
    if (path / "metrics.jsonl").exists() or not path.is_dir():
        return []
    return sorted(
        folder
        for folder in path.iterdir()
        if folder.is_dir() and not folder.is_symlink() and (folder / "config.yaml").exists()
    )


def read_run(path: Path) -> RunFiles:
    """Read what a report shows.

    Raises `SettingsError`: no run there, none with an iteration, a damaged file, or a link that leads out.
    """
    run = RunDirectory(path.resolve())
    own_folder(run.path, "videos", "RUN_DIR")
    rows = _rows(run.path, path)
    summary = _object(run.path, "summary.json", TypeAdapter(Summary))
    stages = _object(run.path, STAGES_FILE, STAGES)
    return RunFiles(run, rows, summary, stages or [], _text(run.path, "config.yaml") or "")


def _rows(run: Path, told: Path) -> list[dict[str, Any]]:
    """A line that a kill has cut short ends the list."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate((_text(run, "metrics.jsonl") or "").splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if isinstance(row, dict) and "step" in row and "iteration" not in row:
            raise SettingsError(
                f"RUN_DIR: {told} is a run of vlarl sft, which has metrics.jsonl alone; give a run of vlarl "
                "train or quickstart"
            )
        where = f"RUN_DIR: {run / 'metrics.jsonl'}, line {number}"
        _checked(ROW, row, where)
        _checked(METRICS, {name: row.get(name) for name in SHOWN_METRICS}, where)
        if missing := sorted(set(SHOWN_SECONDS) - set(row["seconds"])):
            raise SettingsError(f"{where}: seconds has no {missing[0]}; remove the line, or make the run again")
        rows.append(row)
    if not rows:
        raise NoIterationError(
            f"RUN_DIR: {told} has no finished iteration (metrics.jsonl); give a run's directory such as runs/latest"
        )
    return rows


def _object(run: Path, name: str, kind: TypeAdapter[Any]) -> Any:
    """What a JSON file holds, checked; None where there is none."""
    text = _text(run, name)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"RUN_DIR: {run / name} cannot be read ({error}); remove it") from None
    _checked(kind, content, f"RUN_DIR: {run / name}")
    return content


def _checked(kind: TypeAdapter[Any], content: Any, where: str) -> None:
    try:
        kind.validate_python(content)
    except (ValidationError, OverflowError) as error:
        first: Any = (
            error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error), "input": ""}
        )
        key = ".".join(map(str, first["loc"])) or "it"
        wrong = "missing" if first.get("type") == "missing" else f"{first['input']!r:.60}: {first['msg']}"
        raise SettingsError(f"{where}: {key} is {wrong}; remove it, or make the run again") from None


def _text(run: Path, name: str) -> str | None:
    file = own_file(run, name, "RUN_DIR")
    try:
        return None if file is None else file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SettingsError(f"RUN_DIR: {file} cannot be read ({error.strerror}); remove it") from None
