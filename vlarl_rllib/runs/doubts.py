"""What may be meant of settings, but is more often a mistake. Every doubt is one line."""

from __future__ import annotations

from collections.abc import Iterator

from vlarl_rllib.envs import registry
from vlarl_rllib.envs.registry import ENVIRONMENTS
from vlarl_rllib.models.family import family_of
from vlarl_rllib.models.presets import HUB_MODELS, presets
from vlarl_rllib.process.surroundings import wandb_is_not_reached
from vlarl_rllib.runs.preflight import model_facts
from vlarl_rllib.settings import ModelSettings, Settings, SettingsError
from vlarl_rllib.settings.plan import num_training_starts

MANY_STARTS = 1000
"""More than a run plays often enough to tell the hard ones."""


def doubts(settings: Settings) -> list[str]:
    """What may be meant of a run of `vlarl train`, but is more often a mistake."""
    found = [f"{key} has no effect with {other}" for key, other in _idle_keys(settings)]
    found += _model_doubts(settings.model)
    key, suite, rollout = settings.unnorm_key, settings.env.suite, settings.rollout
    if suite in registry.suites(settings.env.name) and key not in (suite, f"{suite}_no_noops"):
        found.append(
            f"env.suite: {suite} is played with the action statistics of {key}; set env.suite, model.path or "
            "model.unnorm_key unless that is meant"
        )
    if settings.curriculum.kind == "adaptive" and not rollout.episodes_per_iteration:
        found.append(
            "curriculum.kind: adaptive counts whole episodes, and those that rollout.steps_per_iteration "
            f"{rollout.steps_per_iteration} leaves "
            "running are cut off at each checkpoint and evaluation, slow failures most; set "
            "rollout.episodes_per_iteration"
        )
    if settings.curriculum.kind == "adaptive" and (starts := num_training_starts(settings)) > MANY_STARTS:
        found.append(
            f"curriculum.kind: adaptive keeps a record of each of the {starts:,} starts, and learns of one only "
            "by playing it; "
            "set curriculum.starts_per_task to fewer"
        )
    if settings.run.wandb and (reason := wandb_is_not_reached()):
        found.append(
            f"run.wandb: Weights & Biases does not answer ({reason}); where that stays so, the run logs to wandb/ in "
            "its directory, to be sent with: wandb sync"
        )
    return found


def _model_doubts(model: ModelSettings) -> list[str]:
    """Of a family that the user names; a model that cannot be read is no doubt but a mistake."""
    if not model.family or model.path in presets():
        return []
    try:
        model_facts(model.path, "model.path", model.family_reference)
    except SettingsError:  # as `preflight.check` says
        return []
    path = HUB_MODELS.get(model.path, model.path)
    doubt = family_of(path, model.family_reference).doubt(path)
    return [doubt] if doubt else []


def _idle_keys(settings: Settings) -> Iterator[tuple[str, str]]:
    """(key, what keeps it from having an effect) of those that differ from their defaults.

    Not refused: a sweep may vary the other key.
    """
    for section, key, other, idle in (
        (
            settings.training,
            "training.importance_cap",
            "old_log_probs behaviour",
            settings.training.old_log_probs == "behaviour",
        ),
        (settings.rewards, "rewards.malformed", "samplers that choose among the action tokens alone", True),
        (settings.curriculum, "curriculum.rule", "kind fixed", settings.curriculum.kind == "fixed"),
        (settings.curriculum, "curriculum.temperature", "kind fixed", settings.curriculum.kind == "fixed"),
        (
            settings.placement,
            "placement.learners",
            "learners.num 0: set placement.algorithm",
            not settings.learners.num,
        ),
        (settings.placement, "placement.engines", "engines.num 0: set placement.runners", not settings.engines.num),
        (settings.placement, "placement.reward_worker", "rewards.process 0", not settings.rewards.process),
    ):
        name = key.partition(".")[2]
        if idle and getattr(section, name) != type(section).model_fields[name].default:
            yield key, other


def sft_doubts(settings: Settings) -> list[str]:
    """The same of a run of `vlarl sft`."""
    env, augment = settings.env.name, settings.sft.augment
    # what it is fine-tuned into has no crop of its own: null means true
    cropped = env in ENVIRONMENTS and ENVIRONMENTS[env].crops and settings.model.center_crop is not False
    if env not in ENVIRONMENTS or augment == cropped:
        return []
    remedy = "set it and model.center_crop alike" if ENVIRONMENTS[env].crops else "set sft.augment to false"
    seen = f"{'central crops' if cropped else 'whole frames'} when it acts in {env}"
    return [
        f"sft.augment: {str(augment).lower()}, so the policy learns from "
        f"{'crops' if augment else 'whole frames'} and will see {seen}; {remedy}"
    ]
