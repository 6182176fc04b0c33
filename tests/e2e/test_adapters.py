"""Adapters and a separate critic through the whole loop: what the engine samples with is what an export gives."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from vlarl_rllib import VLAPPO, VLAPPOConfig
from vlarl_rllib.models.openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.runs.export import export_merged, find_training_checkpoint
from vlarl_rllib.settings import Settings
from vlarl_rllib.types import SampleRequest


@pytest.fixture
def algorithm(ray_session: None, tmp_path: Path) -> Iterator[VLAPPO]:
    settings = Settings.from_dict(
        {
            "model": {"lora": {"rank": 4}, "critic": "separate"},
            "env": {
                "name": "synthetic",
                "tasks": [0, 1],
                "num_envs": 2,
                "num_processes": 1,
                "models_per_process": 2,
                "max_steps": 10,
            },
            "rollout": {"steps_per_iteration": 32},
            "learners": {"num": 1, "micro_batch_size": 32},
            "training": {"minibatch_size": 32, "lr": 1e-3, "value_lr": 1e-3},
            "evaluation": {"episodes": 0},
        }
    )
    algorithm = VLAPPOConfig.from_settings(settings, tmp_path / "run").build_algo()
    yield algorithm
    algorithm.stop()


def test_adapters_are_sampled_with_saved_and_exported(algorithm: VLAPPO, tmp_path: Path) -> None:
    rows = [algorithm.train()["vlarl"] for _ in range(3)]
    for row in rows:
        assert row["logprob_gap_max"] < 1e-4 and row["first_ratio_deviation"] < 1e-4
        assert row["approx_kl"] > 0.0, "the adapters did not move, so the equality would mean nothing"
    assert rows[-1]["value_loss"] != rows[0]["value_loss"]
    pointer = tmp_path / "pointer"
    pointer.mkdir()
    algorithm.save_checkpoint(str(pointer))

    generator = np.random.default_rng(0)
    frames = [generator.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(8)]
    instructions = ["push the bowl", "open the drawer"] * 4
    requests = [
        SampleRequest(frame, instruction, 0, 0.0) for frame, instruction in zip(frames, instructions, strict=True)
    ]
    replies = ray.get(algorithm.engine_pool.handles[0].sample.remote(requests))

    checkpoint = find_training_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.iteration == 3
    export_merged(checkpoint, tmp_path / "out")
    predictions = {}
    for name in (str(tmp_path / "out"), resolve_model(checkpoint.settings.model.path)):
        inputs = OpenVLAProcessor.from_pretrained(name)(images=frames, instructions=instructions)
        predictions[name] = OpenVLAForActionPrediction.from_pretrained(name, dtype=torch.float32).predict_action(
            **inputs, unnorm_key="libero_spatial"
        )
    exported, base = predictions.values()
    for row, reply in enumerate(replies):
        assert exported.tokens[row].tolist() == reply.tokens.tolist()
        np.testing.assert_allclose(exported.log_probs[row], reply.log_probs, atol=1e-4)
    assert not torch.equal(exported.tokens, base.tokens), "three iterations at this learning rate change some action"
