"""Supervised fine-tuning: what it computes, with one learner and two, and the checkpoint it leaves."""

import importlib.util
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_helpers import run_here
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("tensorflow_datasets") is None:
    pytest.skip("RLDS data need the `data` extra", allow_module_level=True)

from vlarl_rllib.commands.sft import FineTuning
from vlarl_rllib.config import resolved
from vlarl_rllib.data import Demonstration, RLDSWriter, read_statistics, rlds
from vlarl_rllib.learner.rank_group import RankGroup
from vlarl_rllib.learner.supervised import SupervisedLearner, means, rate_factor
from vlarl_rllib.models.openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from vlarl_rllib.models.openvla.family import FAMILY as OPENVLA
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.runs.export import write_model
from vlarl_rllib.settings import Settings

SIDE = 28
COLORS = {"red": (220, 40, 40), "blue": (50, 70, 230)}


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The colour of the picture says where to go: a thing that a tiny policy learns in seconds."""
    root = tmp_path_factory.mktemp("demonstrations")
    generator = np.random.default_rng(0)
    with RLDSWriter(root, "pointing", OPENVLA) as writer:
        for index in range(24):
            color = list(COLORS)[index % 2]
            direction = 0.5 if color == "red" else -0.5
            noise = generator.normal(0, 0.1, (6, 7))
            actions = np.column_stack([np.full((6, 6), direction) + noise[:, :6], np.where(noise[:, 6] > 0, 1.0, -1.0)])
            writer.add(
                Demonstration(
                    [np.full((SIDE, SIDE, 3), COLORS[color], np.uint8)] * 6, actions, f"point at the {color} square"
                )
            )
    return root


@pytest.fixture(scope="module")
def stored(demonstrations: Path) -> list[dict[str, Any]]:
    return list(rlds.read_episodes(rlds.find_dataset(demonstrations), "train"))


@pytest.fixture
def read_once(stored: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """For learners in this process: TensorFlow takes seconds to start, and every reading has a process of its own."""
    monkeypatch.setattr(rlds, "read_episodes", lambda path, split: iter(stored))


def settings(data: Path, num_learners: int, **sft: Any) -> Settings:
    return Settings.from_dict(
        {
            "learners": {"num": num_learners, "micro_batch_size": 8, "timeout_seconds": 120},
            "sft": {"data": str(data), "batch_size": 24, "lr": 1e-3, "augment": False} | sft,
            "run": {"seed": 2},
        }
    )


@pytest.fixture
def make_group(ray_session: None, demonstrations: Path) -> Iterator[Callable[..., RankGroup]]:
    groups: list[RankGroup] = []

    def make(num_learners: int, **sft: Any) -> RankGroup:
        given = resolved(settings(demonstrations, num_learners, **sft))
        groups.append(RankGroup(SupervisedLearner, {"settings": given.to_dict()}, given))
        return groups[-1]

    yield make
    for group in groups:
        group.shutdown()


def test_the_loss_is_the_mean_cross_entropy_of_actions_and_end(
    make_group: Callable[..., RankGroup], demonstrations: Path, read_once: None
) -> None:
    group = make_group(0, lr=0.0)
    statistics = read_statistics(demonstrations, OPENVLA)[1]["action"]
    assert group.call("open_data", statistics) == [24 * 6]
    learner = group.local
    batch = next(learner._batches)
    reference = OpenVLAForActionPrediction.from_pretrained(
        resolve_model(learner.settings.model.path), dtype=torch.float32
    )
    with torch.no_grad():
        hidden, _ = reference.action_hidden_states(**batch.inputs, action_tokens=batch.targets)
        losses = F.cross_entropy(
            reference.language_model.lm_head(hidden).transpose(1, 2), batch.targets, reduction="none"
        )
    assert batch.targets.shape == (24, 8) and set(batch.targets[:, 7].tolist()) == {2}

    def supervise() -> dict[str, float]:
        learner._batches, learner._num_steps = iter([batch]), 5
        return means(group.call("supervise", 1)[0])

    metrics = supervise()
    assert metrics["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    likely = reference.language_model.lm_head(hidden)[:, :7].argmax(-1)
    assert metrics["token_accuracy"] == pytest.approx((likely == batch.targets[:, :7]).float().mean().item(), abs=1e-6)

    learner.settings = settings(demonstrations, 0, lr=0.0, augment=True)
    augmented = supervise()
    assert abs(augmented["loss"] - metrics["loss"]) > 1e-3, "other pictures"
    assert supervise() == augmented, "the same for the same step"


class Reads(TorchDispatchMode):
    """How often the host looks at a number of a tensor: on a GPU it waits each time until all before it is done."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_what_is_reported_is_read_once_and_sums_up_the_passes(
    make_group: Callable[..., RankGroup], demonstrations: Path, read_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group(0, lr=0.0, batch_size=20, augment=True)
    group.call("open_data", read_statistics(demonstrations, OPENVLA)[1]["action"])
    learner = group.local
    ids = learner._facts.actions.token_ids
    expected = dict.fromkeys(("loss", "correct", "l1"), 0.0)
    batches = [next(learner._batches) for _ in range(3)]
    reads, forward = Reads(), learner.sharded.forward

    def uncounted(**inputs: Any) -> Any:
        """transformers looks whether sequences are packed."""
        before, output = reads.count, forward(**inputs)
        reads.count = before
        return output

    monkeypatch.setattr(learner.sharded, "forward", uncounted)
    for number, batch in enumerate(batches):
        learner._generator.manual_seed((2 * 1_000_003 + number) * 1024)
        with reads:
            passes = learner._accumulate(batch)
        assert reads.count == 0 and [len(each.likely) for each in passes] == [8, 8, 4]
        for each in passes:
            expected["loss"] += float(each.loss) / 8
            expected["correct"] += float((each.likely == each.targets[:, :7]).sum()) / 7
            predicted = learner._codec.normalized(each.likely.numpy().clip(ids[0], ids[-1]))
            expected["l1"] += float(np.abs(predicted - each.actions.numpy()).sum()) / 7
    learner.sharded.optimizers["policy"].zero_grad()

    learner._batches = iter(batches)
    sums = group.call("supervise", 3)[0]
    assert (sums["samples"], sums["steps"]) == (60.0, 3.0)
    assert {name: sums[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_frames_that_do_not_fit_change_nothing(
    make_group: Callable[..., RankGroup], demonstrations: Path, read_once: None
) -> None:
    kept, decoded = (make_group(0, frames_gb=size) for size in (None, 0.0))
    for group in (kept, decoded):
        group.call("open_data", read_statistics(demonstrations, OPENVLA)[1]["action"])
    assert kept.call("supervise", 8) == decoded.call("supervise", 8)


def test_two_learners_imitate_too_and_write_what_they_learned(
    make_group: Callable[..., RankGroup], demonstrations: Path, tmp_path: Path
) -> None:
    group = make_group(2)
    assert group.call("open_data", read_statistics(demonstrations, OPENVLA)[1]["action"]) == [12 * 6, 12 * 6]
    first, *_, last = (means(group.call("supervise", 5)[0]) for _ in range(6))
    assert first["loss"] > 3.0, "ln 576 = 6.4 at the start"
    assert last["loss"] < 0.75 * first["loss"] and last["l1"] < first["l1"] and last["skipped"] == 0
    base, out = resolve_model(group.settings.model.path), tmp_path / "out"
    group.call("with_weights", partial(write_model, family=OPENVLA, base=base, out=out, dtype="float32"))
    OpenVLAForActionPrediction.from_pretrained(out, dtype=torch.float32)


def test_the_command_leaves_a_checkpoint_that_acts_and_a_resumed_run_leaves_the_same(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run, every = tmp_path / "sft.yaml", tmp_path / "run", "steps: 120, report_every: 40, checkpoint_every: 50"
    config.write_text(
        "learners: {num: 0, micro_batch_size: 24}\n"
        f"sft: {{data: {demonstrations}, {every}, batch_size: 24, lr: 2.0e-3, schedule: cosine, augment: true}}\n"
    )
    assert run_here("sft", config, "--run-dir", run) == 0
    rows = RunDirectory(run).read_rows()
    assert [row["step"] for row in rows] == [40, 50, 90, 100, 120] and rows[-1]["loss"] < rows[0]["loss"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 120 and summary["unnorm_key"] == "pointing" and summary["demonstrated_steps"] == 144

    model = OpenVLAForActionPrediction.from_pretrained(run / "model", dtype=torch.float32)
    assert set(model.config.norm_stats) == {"pointing"}, "in other units than the data's the model does not act"
    frames = [np.full((SIDE, SIDE, 3), color, np.uint8) for color in COLORS.values()]
    inputs = OpenVLAProcessor.from_pretrained(run / "model")(
        images=frames, instructions=[f"point at the {color} square" for color in COLORS]
    )
    actions = model.predict_action(**inputs, unnorm_key="pointing").actions
    assert (actions[0, :6] > 0.2).all() and (actions[1, :6] < -0.2).all()

    assert run_here("sft", config, "--run-dir", run) == 2
    assert "holds a run already; continue it with --resume" in capsys.readouterr().err
    assert run_here("sft", "--resume", "--run-dir", run) == 2
    assert "sft.steps: all 120 steps are made" in capsys.readouterr().err

    # Ctrl-C at step 71; the disk was full at step 50.
    second = tmp_path / "second"
    monkeypatch.setattr(FineTuning, "_supervise", interrupt_at(71))
    with monkeypatch.context() as patch:
        patch.setattr(
            SupervisedLearner,
            "save_sharded",
            fail_once(OSError("No space left on device"), SupervisedLearner.save_sharded),
        )
        assert run_here("sft", config, "--run-dir", second) == 130
    output = capsys.readouterr().out
    assert "no checkpoint of step 50: OSError: No space left on device" in output
    assert f"stopped at step 71 of 120; continue from step 71 with: vlarl sft --resume --run-dir {second}" in output
    assert [path.name for path in (second / "checkpoints").iterdir()] == ["step_000071"]
    stopped = (second / "model" / "model.safetensors").read_bytes()
    monkeypatch.undo()
    assert run_here("sft", "--resume", "--run-dir", second) == 0
    again = RunDirectory(second).read_rows()
    assert [row["step"] for row in again] == [40, 50, 71, 111, 120]
    weights = (second / "model" / "model.safetensors").read_bytes()
    assert weights == (run / "model" / "model.safetensors").read_bytes() != stopped

    (second / "summary.json").unlink()
    (data,) = demonstrations.rglob("dataset_statistics.json")
    other = shutil.copytree(data.parent, tmp_path / "pointing" / "1.0.0")
    (other / "more").touch()
    settings_file = second / "config.yaml"
    settings_file.write_text(settings_file.read_text().replace(str(demonstrations), str(other)))
    assert run_here("sft", "--resume", "--run-dir", second) == 2
    assert "is not what it was when step_000120 was written" in capsys.readouterr().err


def interrupt_at(step: int) -> Callable[[FineTuning, int], dict[str, float]]:
    """`_supervise` that is told to end, by Ctrl-C, so that this step is the last."""
    original, done = FineTuning._supervise, 0

    def supervise(self: FineTuning, num_steps: int) -> dict[str, float]:
        nonlocal done
        last = done + num_steps >= step
        sums = original(self, step - done if last else num_steps)
        done += int(sums["steps"])
        if last:
            signal.raise_signal(signal.SIGINT)
        return sums

    return supervise


def fail_once(error: Exception, then: Callable[..., Any]) -> Callable[..., Any]:
    errors = [error]

    def call(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return then(*args)

    return call


def test_the_learning_rate_rises_and_falls() -> None:
    sft = settings(Path("unused"), 0, lr=1.0, steps=100, warmup_steps=10, schedule="cosine").sft
    assert [rate_factor(step, sft) for step in (0, 9)] == pytest.approx([0.1, 0.5 * (1 + math.cos(0.09 * math.pi))])
    assert rate_factor(50, sft) == pytest.approx(0.5) and rate_factor(99, sft) < 1e-3
    assert {rate_factor(step, settings(Path("unused"), 0, steps=100).sft) for step in range(100)} == {1.0}
