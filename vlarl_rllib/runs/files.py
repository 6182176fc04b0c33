"""What a report shows of a run, read from the files in the run's directory and checked: they may have been sent by
somebody, or damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vlarl_rllib.observability.curves import SHOWN_SECONDS
from vlarl_rllib.process.own_files import own_file, own_folder
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.settings import SettingsError

STAGES_FILE = "stages.json"
"""What `vlarl quickstart` leaves: a list of {stage, seconds, amount, success}; success = {rate, low, high, episodes,
by_task}, or None."""
SHOWN_METRICS = (
    "value_loss",
    "explained_variance",
    "approx_kl",
    "clip_fraction",
    "logprob_gap_mean",
    "logprob_gap_max",
)
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


class Row(BaseModel):
    """A line of `metrics.jsonl`, as far as a report shows it, `SHOWN_METRICS` aside."""

    model_config = ConfigDict(strict=True, extra="allow")

    iteration: Count
    env_steps: Count
    episodes: Count
    success_rate: Rate | None
    success_rate_by_task: TaskRates
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
STAGES = TypeAdapter(list[Stage])


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
        _checked(TypeAdapter(Row), row, where)
        _checked(METRICS, {name: row.get(name) for name in SHOWN_METRICS}, where)
        if missing := sorted(set(SHOWN_SECONDS) - set(row["seconds"])):
            raise SettingsError(f"{where}: seconds has no {missing[0]}; remove the line, or make the run again")
        rows.append(row)
    if not rows:
        raise SettingsError(
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
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error), "input": ""}
        key, found = ".".join(map(str, first["loc"])), repr(first["input"])
        raise SettingsError(
            f"{where}: {key or 'it'} is {found[:60]}: {first['msg']}; remove it, or make the run again"
        ) from None


def _text(run: Path, name: str) -> str | None:
    file = own_file(run, name, "RUN_DIR")
    try:
        return None if file is None else file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SettingsError(f"RUN_DIR: {file} cannot be read ({error.strerror}); remove it") from None
