"""Opens whatever it is given as a user would: `open_everything.py DIRECTORY...`, each from inside. Prints what came of
it as JSON.

Everything is imported where it is needed, as the commands do, with the directory as the working directory.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def open_model(path: str) -> Any:
    from vlarl_rllib.models.family import read_facts
    from vlarl_rllib.models.openvla import OpenVLAForActionPrediction, OpenVLAProcessor

    OpenVLAProcessor.from_pretrained(path)
    model = OpenVLAForActionPrediction.from_pretrained(path)
    read_facts(path)
    return model


def check_model(path: str) -> Any:
    """As before a run."""
    from vlarl_rllib.models.family import read_facts

    return read_facts(path)


def open_adapter(path: str) -> Any:
    from vlarl_rllib.models.build import build_policy
    from vlarl_rllib.models.presets import resolve_model
    from vlarl_rllib.settings import Settings

    return build_policy(Settings.from_dict({"model": {"path": resolve_model("tiny"), "lora": {"adapter": path}}}).model)


def open_checkpoint(path: str) -> Any:
    import torch
    from traps import small_model

    from vlarl_rllib.learner import fsdp
    from vlarl_rllib.learner.checkpoint import load_sharded, load_trained

    module, optimizers = small_model()
    learners = Path(path) / "checkpoints" / "iteration_000003" / "learners"
    refused: Exception | None = None
    try:
        load_trained(learners, module)
    except Exception as error:
        refused = error
    fsdp.init_process_group(torch.device("cpu"), 0, 1, torch.distributed.HashStore(), 60.0)
    try:
        load_sharded(learners, module, optimizers)
    finally:
        torch.distributed.destroy_process_group()
    if refused:
        raise refused


def open_run(path: str) -> Any:
    """With every command that takes one."""
    from vlarl_rllib.commands.report import write_report
    from vlarl_rllib.evaluation.libero_protocol import EvaluationRequest
    from vlarl_rllib.runs.directory import RunDirectory
    from vlarl_rllib.runs.export import find_training_checkpoint

    outcomes = []
    for command in (
        lambda: write_report(Path(path)),
        lambda: RunDirectory(Path(path)).settings(),
        lambda: find_training_checkpoint(Path(path)),
        lambda: EvaluationRequest(path, env="synthetic").check(),
    ):
        try:
            command()
        except ValueError as error:
            outcomes.append(str(error))
    raise ValueError("; ".join(outcomes))


def open_judge(path: str) -> Any:
    from vlarl_rllib.rewards.judges import load_judge

    return load_judge(path)


def open_data(path: str) -> Any:
    """Also one that is whole, with TensorFlow Datasets in a process of its own."""
    from vlarl_rllib.data import RLDSDataset

    return RLDSDataset(path)[0]


def open_states(path: str) -> Any:
    from vlarl_rllib.envs.libero_tasks import load_torch_array

    return load_torch_array(Path(path) / "task.pruned_init")


def collect_here(path: str) -> Any:
    """The subprocesses that play, those that collect and the one that writes, from a directory of decoys; then what
    they wrote is read."""
    from vlarl_rllib.data.collect import CollectRequest, collect
    from vlarl_rllib.envs import EnvSpec
    from vlarl_rllib.envs.vector import SlotProcesses
    from vlarl_rllib.models.openvla.family import FAMILY

    spec = EnvSpec(name="synthetic", image_size=28)
    processes = SlotProcesses(spec, [0], num_processes=1)
    try:
        processes.send_reset(0, 0, 0, 0)
        (event,) = processes.poll(60.0)
        assert event.kind == "reset", event.error
    finally:
        processes.close()
    return open_data(
        str(collect(CollectRequest(spec, family=FAMILY, tasks=(0,), episodes=1, out=Path(path) / "collected")))
    )


OPENERS: dict[str, Callable[[str], Any]] = {
    "model": open_model,
    "adapter": open_adapter,
    "checkpoint": open_checkpoint,
    "run": open_run,
    "judge": open_judge,
    "data": open_data,
    "states": open_states,
    "working": collect_here,
}
"""By the first word of the directory's name."""


def opened(directory: Path, path: str) -> str:
    """ "read", or why not, in the words that a user would see."""
    try:
        OPENERS[directory.name.partition("_")[0]](path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


if __name__ == "__main__":
    outcomes = {}
    for name in sys.argv[1:]:
        os.chdir(name)
        outcomes[Path(name).name] = opened(Path(name), ".")
    sys.stdout.write("\n" + json.dumps(outcomes))
