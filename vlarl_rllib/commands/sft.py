"""`vlarl sft`: supervised fine-tuning on demonstrations, through the learners of PPO. It leaves a checkpoint that
`train` and `eval` take.

RUN/config.yaml      the resolved settings
    metrics.jsonl    a line every `sft.report_every` steps
    checkpoints/     every `sft.checkpoint_every` steps, to resume from
    model/           the fine-tuned checkpoint, with the data's action statistics
    summary.json     written at the end
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from vlarl_rllib.config import resolved
from vlarl_rllib.data.rlds import fingerprint, read_statistics
from vlarl_rllib.envs.registry import ENVIRONMENTS, eval_options
from vlarl_rllib.errors import one_line
from vlarl_rllib.learner.rank_group import LearnerError, RankGroup
from vlarl_rllib.learner.supervised import SupervisedLearner, means
from vlarl_rllib.models.family import family_of
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.process.console import make_console, make_progress, pasted, saying_so, shown
from vlarl_rllib.process.lost_output import KEEP_TRYING_SECONDS, keep_trying
from vlarl_rllib.process.own_files import replace_file
from vlarl_rllib.process.signals import END
from vlarl_rllib.process.storage import Place
from vlarl_rllib.runs.checkpoints import number_of
from vlarl_rllib.runs.directory import ERROR_FILE, RowLog, RunDirectory, how_to_go_on
from vlarl_rllib.runs.export import write_model
from vlarl_rllib.runs.ray_session import ray_session
from vlarl_rllib.runs.sealing import WEIGHTS_FOLDER, note_shards
from vlarl_rllib.runs.versions import installed_versions
from vlarl_rllib.settings import Role, Settings, SettingsError, calculate_runtime_args

MODEL_DIRECTORY = "model"
DATA_FILE = "data.json"
"""In a checkpoint: the fingerprint of the data that its step number counts in."""
SECONDS_PER_CALL = 5.0
"""About so long learners learn between two looks at what the driver wants."""


def run_sft(settings: Settings, run: RunDirectory, *, resume: bool = False) -> int:
    """Fine-tune and write `model/`; the process's exit code.

    0 = done, 130 or 143 = ended by Ctrl-C or SIGTERM, with a checkpoint and the model as it was then, 1 = failed.
    Unlike training, SIGTERM is no good end: what comes after fine-tuning wants all of it.

    Args:
        resume: go on from the run's newest checkpoint.

    Raises:
        SettingsError: the data are not those that the checkpoint is of, or the cluster is too small.
    """
    console = make_console()
    END.limit_seconds, END.words = settings.run.stop_seconds, partial(how_to_go_on, run, "step")
    END.on_loss = run.write_error
    try:
        return _run(settings, run, console, run.newest_checkpoint("step") if resume else None)
    except SettingsError:
        raise
    except Exception as error:  # a learner's, the reader's, the disk's: none is a reason for a traceback on the screen
        run.write_error(traceback.format_exc())
        console.print(
            f"fine-tuning failed: {one_line(error)} (whole traceback in {shown(run.path)}/{ERROR_FILE})",
            style="red",
        )
        console.print(how_to_go_on(run, "step"))
        return 1


def _run(settings: Settings, run: RunDirectory, console: Console, checkpoint: Place | None) -> int:
    began, first = time.time(), number_of(checkpoint) if checkpoint else 0
    data = settings.sft.data or ""
    base = resolve_model(settings.model.path)
    family = family_of(base, settings.model.family_reference)
    name, statistics = read_statistics(data, family)
    identity = fingerprint(data)
    if checkpoint and json.loads((checkpoint / DATA_FILE).read_text())["fingerprint"] != identity:
        raise SettingsError(
            f"sft.data: {data} is not what it was when {checkpoint.name} was written; put the old data back, or "
            "start a new run"
        )
    what = f"{statistics['num_transitions']:,} demonstrated steps of {name}"
    whence = f", from step {first:,}" if checkpoint else ""
    console.print(f"run directory {shown(run.path)}: {what}, {settings.learners.num} learner(s){whence}")
    for outdated in ("summary.json", ERROR_FILE):
        (run.path / outdated).unlink(missing_ok=True)
    log = RowLog(run, "step")
    log.forget_after(first)
    earlier_seconds = sum(row["seconds"] for row in log.rows)
    with _learners(settings, run.path, data) as group, END.polled(partial(_notice, console)):
        with saying_so("the learners to open the data"):
            num_steps = sum(group.call("open_data", statistics["action"], first))
            if checkpoint:
                group.call("load_sharded", str(checkpoint / "learners"))
        END.check()
        row = FineTuning(group, settings, run, console, identity).learn(log, first)
        model, unfinished = run.path / MODEL_DIRECTORY, run.path / f".{MODEL_DIRECTORY}.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        write = partial(write_model, family=family, base=base, norm_stats={name: statistics})
        group.call("with_weights", partial(write, out=unfinished, dtype=settings.engines.dtype))
        shutil.rmtree(model, ignore_errors=True)  # of an earlier end of this run
        unfinished.rename(model)
    summary = {
        "steps": row["step"],
        "demonstrated_steps": num_steps,
        "data": identity,
        "unnorm_key": name,
        "last": row,
        "wall_seconds": earlier_seconds + time.time() - began,
        "versions": installed_versions(),
    }

    def write_summary() -> None:
        log.write()
        replace_file(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    if unwritten := keep_trying(write_summary, KEEP_TRYING_SECONDS if END.signal is None else 0.0):
        raise unwritten
    console.print(f"wrote {shown(model)}; {_how_to_use(pasted(model), name, settings)}")
    if END.signal is None:
        return 0
    if row["step"] < settings.sft.steps:
        console.print(f"stopped at step {row['step']:,} of {settings.sft.steps:,}; {how_to_go_on(run, 'step')}")
    return END.code


def _notice(console: Console, name: str) -> None:
    console.print(f"{name}: ending within {END.limit_seconds:g} s; once more to end at once")


def _how_to_use(model: str, key: str, settings: Settings) -> str:
    """It sees crops by default: what it was fine-tuned from may not have."""
    env, whole_frames = settings.env, not settings.sft.augment
    in_train = (
        f"--set model.path={model} --set model.unnorm_key={key}" + " --set model.center_crop=false" * whole_frames
    )
    family = settings.model.family
    in_train += f" --set model.family={family}" if family else ""
    crops = env.name in ENVIRONMENTS and ENVIRONMENTS[env.name].crops
    where = (
        eval_options(env.name, env.suite)
        + (f" --family {family}" if family else "")
        + " --no-center-crop" * (crops and whole_frames)
    )
    return f"use it with {in_train}, or vlarl eval {model} --unnorm-key {key} {where}"


class FineTuning:
    """The optimiser steps of a run: made, logged, saved.

    Args:
        identity: fingerprint of the data.
    """

    def __init__(
        self, group: RankGroup, settings: Settings, run: RunDirectory, console: Console, identity: str
    ) -> None:
        self._group, self._settings, self._run, self._console, self._identity = group, settings, run, console, identity

    def learn(self, log: RowLog, first: int) -> dict[str, Any]:
        """Make the steps from `first` on, until the last one or a signal; the last line of progress."""
        sft, every = self._settings.sft, self._settings.sft.checkpoint_every or self._settings.sft.steps
        row: dict[str, Any] = log.rows[-1] if log.rows and log.rows[-1]["step"] == first else {"step": first}
        saved = first
        with make_progress(self._console, "steps") as progress:
            bar = progress.add_task("", total=sft.steps, completed=first, shown="")
            while (done := row["step"]) < sft.steps and END.signal is None:
                row = self._make_steps(done, min(sft.report_every, saved + every - done, sft.steps - done))
                log.add(row)
                done, shown = row["step"], _shown(row)
                progress.update(bar, completed=done, shown=shown)
                self._console.print(f"step {done:>6}/{sft.steps}  {shown}")
                if sft.checkpoint_every and (done in (saved + every, sft.steps) or END.signal is not None):
                    self._save(done)
                    saved = done
        return row

    def _make_steps(self, done: int, num_steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        sums = self._supervise(num_steps)
        seconds = time.perf_counter() - began
        return {
            "step": done + int(sums["steps"]),
            **means(sums),
            "samples_per_second": sums["samples"] / seconds,
            "seconds": seconds,
        }

    def _supervise(self, num_steps: int) -> dict[str, float]:
        """Sums over that many steps, or fewer after a signal; in calls of seconds, each far within
        `learners.timeout_seconds`."""
        sums: Counter[str] = Counter()
        piece = 1
        while sums["steps"] < num_steps and (not sums["steps"] or END.signal is None):
            began = time.perf_counter()
            sums.update(self._group.call("supervise", piece)[0])
            piece = min(
                num_steps - int(sums["steps"]), max(1, int(piece * SECONDS_PER_CALL / (time.perf_counter() - began)))
            )
        return dict(sums)

    def _save(self, step: int) -> None:
        """Write a checkpoint; a disk that is full is no reason to end."""
        try:
            with self._run.checkpoints(self._settings.run.keep_checkpoints, "step").writing(step) as directory:
                learners = directory / WEIGHTS_FOLDER
                learners.mkdir()
                note_shards(directory, self._group.call("save_sharded", str(learners.resolve())))
                (directory / DATA_FILE).write_text(json.dumps({"fingerprint": self._identity}))
        except (OSError, LearnerError) as error:
            self._console.print(f"no checkpoint of step {step:,}: {one_line(error)}", style="yellow")


def _shown(row: dict[str, Any]) -> str:
    accuracy, rate = f"token accuracy {100 * row['token_accuracy']:.1f} %", f"{row['samples_per_second']:.0f} samples/s"
    return f"loss {row['loss']:.3f}  {accuracy}  L1 {row['l1']:.3f}  {rate}"


@contextmanager
def _learners(settings: Settings, run: Path, data: str) -> Iterator[RankGroup]:
    """The learners alone, in a Ray of their own or the cluster's; or in this process for `learners.num: 0`."""
    settings = resolved(settings)
    plan = calculate_runtime_args(settings).only(Role.LEARNER)
    with ray_session(plan, settings, run, {"sft.data": data}):
        with saying_so(f"{settings.learners.num} learner(s)"):
            group = RankGroup(SupervisedLearner, {"settings": settings.to_dict()}, settings, run=run.name)
        try:
            yield group
        finally:
            group.shutdown()
