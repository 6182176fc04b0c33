"""What of the settings may change where a run goes on from a checkpoint, checked before anything starts.

A checkpoint brings weights, AdamW's moments, counters and the curriculum's record, never a setting: those are the
config's. What the weights only fit together with, the model and its adapters, must be what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlarl_rllib.models.family import family_name
from vlarl_rllib.models.fingerprint import fingerprint
from vlarl_rllib.models.presets import HUB_MODELS, presets
from vlarl_rllib.process.storage import Place
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.settings import Settings, SettingsError
from vlarl_rllib.settings.in_place import flat

LIMITS = (
    "run.iterations", "run.checkpoint_every", "run.keep_checkpoints", "run.max_restarts",
    "run.stop_seconds", "run.wandb", "run.dashboard", "weights.transport",
)  # fmt: skip
"""What may be edited in a run's config.yaml before `--resume`, beside `placement`: none of it changes what is
learned."""
PLACEMENT = "placement."
"""On which nodes the actors lie: another day's cluster has others."""


def _is_free(key: str) -> bool:
    return key in LIMITS or key.startswith(PLACEMENT)


MODELS = ("model.path", "model.critic_path")
"""Compared by content: a model may lie elsewhere now."""
FAMILY = "model.family"
"""Compared by what it means: null is what the checkpoint says."""
OF_THE_WEIGHTS = ("model.lora", "model.oft", "model.critic", FAMILY, *MODELS)
"""What the weights of a checkpoint only fit together with."""


def check_resume(checkpoint: Place, settings: Settings) -> None:
    """Raise `SettingsError` where a run's config has changed since the checkpoint was written, but for its `LIMITS` and
    places."""
    for key, old, new in _changes(checkpoint, settings):
        if not _is_free(key):
            raise _changed(key, old, new)


def _changed(key: str, old: Any, new: Any) -> SettingsError:
    return SettingsError(
        f"{key}: {new!r} in config.yaml, but the run was made with {old!r}, and under --resume only "
        f"{', '.join(LIMITS)} and {PLACEMENT}* may change; "
        "put it back, or start a new run with --resume-from"
    )


def check_same(old: Settings, new: Settings) -> None:
    """The same where nothing but the config of the run itself says what it was."""
    before, after = dict(flat(old.to_dict())), dict(flat(new.to_dict()))
    for key in sorted(before.keys() | after.keys()):
        if not _is_free(key) and before.get(key) != after.get(key):
            raise _changed(key, before.get(key), after.get(key))


def check_resume_from(checkpoint: Place, settings: Settings) -> None:
    """Raise `SettingsError` where a new run's config asks for what the checkpoint's weights do not fit."""
    for key, old, new in _changes(checkpoint, settings):
        if key.startswith(OF_THE_WEIGHTS):
            raise SettingsError(
                f"{key}: {new!r}, but the weights of {checkpoint.name} were trained with {old!r}; set it to "
                "that, or start without --resume-from"
            )
        if key == "training.critic_warmup_iterations" and 0 < new <= (
            done := CheckpointStore.read_facts(checkpoint)["iteration"]
        ):
            raise SettingsError(
                f"{key}: {new} would be over, since iterations count from the run's first and {checkpoint.name} "
                f"is behind iteration {done}; "
                f"set it to {done + new} for {new} more"
            )


def _changes(checkpoint: Place, settings: Settings) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value behind the checkpoint, value now) of all settings that differ."""
    facts = CheckpointStore.read_facts(checkpoint)
    old, new = dict(flat(facts["settings"])), dict(flat(settings.to_dict()))
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        # other machines have other numbers of cores
        derived = key == "env.num_processes" and settings.env.num_processes is None
        if key == FAMILY and _meant(before, new) == _meant(after, new):
            continue
        if before == after or derived or (key in MODELS and after and facts["models"].get(key) == fingerprint(after)):
            continue
        yield key, before, after
    for key in MODELS:
        if (path := new.get(key)) and path == old.get(key) and facts["models"].get(key) != fingerprint(path):
            yield key, f"{path} as it was then", f"{path} as it is now"


def _meant(family: str | None, values: Mapping[str, Any]) -> str:
    """The family that `model.family` stands for with the model that there is now."""
    path = values["model.path"]
    return family or (presets()[path].name if path in presets() else family_name(HUB_MODELS.get(path, path)))
