"""Groups of learners, and what they are fed with."""

from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from torch.distributed.tensor import DTensor

from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.learner.learner_group import VLALearnerGroup
from vlarl_rllib.models.family import ActionFormat
from vlarl_rllib.settings import Settings
from vlarl_rllib.types import DURATION_KEY, INSTRUCTION_KEY, LOG_PROBS_KEY, VALUE_KEY, VERSION_KEY
from vlarl_rllib.weights.receiver import Receiver
from vlarl_rllib.weights.sync import WeightSync

IMAGE_SIZE = 28
SPACES = (gym.spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), gym.spaces.MultiDiscrete([256] * 7))
ACTIONS = ActionFormat(1, 7, range(256, 512))
STEPS = (8, 11, 2, 9)
"""Of each slot's contribution below."""


def fragment(rng: np.random.Generator, length: int, terminated: bool, instruction: str) -> SingleAgentEpisode:
    episode = SingleAgentEpisode()
    episode.custom_data[INSTRUCTION_KEY] = instruction
    episode.add_env_reset(rng.integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))
    for t in range(length):
        episode.add_env_step(
            rng.integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8),
            rng.integers(256, 512, 7),
            float(rng.normal()),
            terminated=terminated and t == length - 1,
            extra_model_outputs={LOG_PROBS_KEY: np.full(7, -5.5, np.float32), DURATION_KEY: 1, VERSION_KEY: 0},
        )
    return episode.to_numpy()


def contributions() -> list[list[SingleAgentEpisode]]:
    """Four slots with uneven numbers of fragments, steps and prompt tokens."""
    rng = np.random.default_rng(0)
    return [
        [fragment(rng, 5, True, "push the bowl"), fragment(rng, 3, False, "push the bowl")],
        [fragment(rng, 11, False, "pick up the black bowl and place it on the plate")],
        [fragment(rng, 2, True, "open the drawer")],
        [fragment(rng, 9, False, "open the drawer")],
    ]


def build(
    num_learners: int,
    model: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    learners: dict[str, Any] | None = None,
    **training: Any,
) -> VLALearnerGroup:
    dtype = (model or {}).get("dtype", "float32")
    several = {"num": num_learners, "fsdp": {"min_unit_parameters": 1}}  # units as large models have them
    settings = Settings.from_dict(
        {
            "model": model or {},
            "engines": {"dtype": dtype},
            "rollout": rollout or {},
            "learners": {"micro_batch_size": 4, "timeout_seconds": 120} | several | (learners or {}),
            "training": {
                "minibatch_size": 10,
                "num_epochs": 2,
                "lr": 2e-5,
                "value_lr": 1e-3,
                "old_log_probs": "recompute",
            }
            | training,
            "run": {"seed": 3},
        }
    )
    config = VLAPPOConfig.from_settings(settings)
    config.validate()
    return config.build_learner_group(spaces={"__env__": SPACES, "__env_single__": SPACES, "default_policy": SPACES})


def add_values(episodes: list[list[SingleAgentEpisode]], group: VLALearnerGroup) -> None:
    """What an engine with the weights of this local group would reply, which has no separate critic."""
    policy, processor = group._learner.sharded.policy, group._learner._processor
    for episode in (episode for contribution in episodes for episode in contribution):
        frames = list(episode.get_observations(slice(0, len(episode))))
        inputs = processor.raw_inputs(frames, [episode.custom_data[INSTRUCTION_KEY]] * len(frames))
        with torch.no_grad():
            values = policy(**inputs).values
        episode.extra_model_outputs[VALUE_KEY] = InfiniteLookbackBuffer(values.numpy())


def update(
    group: VLALearnerGroup, iteration: int = 0, episodes: list[list[SingleAgentEpisode]] | None = None
) -> dict[str, float]:
    episodes = episodes or contributions()
    refs = [ray.put(fragments) for fragments in episodes] if group.is_remote else episodes
    assert group.receive(refs, STEPS) == []
    results = group.update(iteration=iteration)
    return {name: float(stats.peek()) for name, stats in results[0]["default_policy"].items()}


def weights(group: VLALearnerGroup, version: int) -> dict[str, torch.Tensor]:
    """What the learners publish, kept, as an engine reads it."""
    manifest = WeightSync(group, None, version - 1, transport="object_store", keep=True).push()
    receiver = Receiver(manifest, {spec.name: spec.shape for spec in manifest.tensors}, "cpu")
    return {name: tensor.clone() for bucket in manifest.buckets for name, tensor in receiver.fetch(bucket).items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a parameter, gathered where it is sharded."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def parameters(group: VLALearnerGroup) -> dict[str, torch.Tensor]:
    """All of a local learner's, whole."""
    named = group._learner.sharded.trained_modules().named_parameters()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}
