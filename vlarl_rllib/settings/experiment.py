"""A Tune experiment as a small YAML file: a config, a search space of dotted keys, a scheduler.

    config: ../configs/quickstart.yaml             # beside this file; or the sections themselves
    set: {run.iterations: 20, evaluation.every: 5}
    search:
      training.lr: {loguniform: [1.0e-5, 1.0e-3]}  # or uniform, quniform, randint, choice; a plain list is a grid
    seeds: [0, 1, 2]
    samples: 8
    scheduler: {asha: {grace_iterations: 5}}

A mistake is one line, before Ray starts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.settings import messages
from vlarl_rllib.settings.fields import Fraction, Natural, PositiveInt, Section
from vlarl_rllib.settings.in_place import IN_PLACE, can_change_in_place, flat
from vlarl_rllib.settings.load import Settings, known_keys
from vlarl_rllib.settings.overrides import apply_override, with_keys
from vlarl_rllib.settings.published import absolute_unless_name
from vlarl_rllib.settings.yaml_text import read_yaml

NOT_SEARCHED = {
    "run.seed": "list them under seeds",
    "run.iterations": "set it under set; a scheduler ends trials earlier",
    "run.checkpoint_every": "set it under set, for all trials",
    "evaluation.every": "set it under set, for all trials, or they cannot be compared",
    "evaluation.episodes": "set it under set, for all trials, or they cannot be compared",
    "run.wandb": "set it under set, for all trials",
    "run.dashboard": "set it under set, for all trials",
    "run.max_restarts": "set it under set, for all trials",
    "run.keep_checkpoints": "set it under set, for all trials",
    "run.stop_seconds": "set it under set, for all trials",
}
"""Keys that belong to the whole experiment, and what to do instead."""
MAX_COMBINATIONS = 10_000
"""Of a grid; each is checked."""
VARIANT = "variant"
"""Name under which Tune samples one of `variants`."""


class Asha(Section):
    """Asynchronous successive halving (arXiv 1810.05934): the worse trials end at each rung."""

    grace_iterations: PositiveInt = Field(1, description="Iterations before a trial may be ended: the first rung.")
    reduction_factor: Annotated[float, Field(gt=1, le=100)] = Field(
        3.0, description="One of so many trials goes on at each rung, and rungs are so many times as far apart."
    )


class PopulationBased(Section):
    """Population based training (arXiv 1711.09846): bad trials go on from good ones, with other values."""

    perturb_every: PositiveInt = Field(5, description="Iterations between two looks at the population.")
    quantile: Annotated[float, Field(gt=0, le=0.5)] = Field(0.25, description="Share of the trials that give up.")
    resample: Fraction = Field(
        0.25, description="Probability of a new draw from the space, instead of the donor's value times 0.8 or 1.2."
    )


class Schedulers(Section):
    """One of them."""

    asha: Asha | None = Field(None, description="Asynchronous successive halving.")
    pbt: PopulationBased | None = Field(None, description="Population based training.")


Metric = Literal["evaluation_success_rate", "best_evaluation_success_rate", "success_rate", "reward_mean"]


class ExperimentSpec(Section):
    """The keys of the file."""

    config: str | dict[str, Any] = Field(description="YAML file of the config, beside this one, or its sections.")
    set: dict[str, Any] = Field({}, description="Values of all trials, by dotted key, over the config's.")
    search: dict[str, Any] = Field({}, description="Values by dotted key: a list, or a distribution.")
    variants: list[dict[str, Any]] = Field(
        [], description="Sets of dotted keys that go together, such as a suite and its checkpoint; each is played."
    )
    seeds: list[Natural] = Field([], description="Of each sample, a trial with every one of these seeds.")
    samples: PositiveInt = Field(1, description="Draws from the distributions; a grid is played for each.")
    metric: Metric | None = Field(
        None,
        description="What is best; null = evaluation_success_rate where there are evaluations, else success_rate.",
    )
    scheduler: Schedulers = Field(
        Schedulers(), description="Ends or changes trials on the way: {asha: {...}} or {pbt: {...}}; {} = none."
    )
    sampler: Literal["random", "optuna"] = Field("random", description="What draws samples; optuna where installed.")
    concurrent: PositiveInt | None = Field(
        1,
        description="Trials at once, if there is room; null, and always under pbt: as many as there is room for.",
    )
    reuse_actors: bool = Field(False, description="Trials take over the processes and models of earlier ones.")


class Uniform(Section):
    uniform: tuple[float, float]


class LogUniform(Section):
    loguniform: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class QuantizedUniform(Section):
    quniform: tuple[float, float, Annotated[float, Field(gt=0)]]


class RandInt(Section):
    randint: tuple[int, int]


class Choice(Section):
    choice: Annotated[list[Any], Field(min_length=1)]


@dataclass(frozen=True)
class Distribution:
    """What a searched key may be."""

    kind: Literal["grid", "choice", "uniform", "loguniform", "quniform", "randint"]
    values: tuple[Any, ...]
    """Of a grid or choice; else the bounds, and the step of quniform. randint's upper bound is left out, as Tune's."""

    @property
    def is_numeric(self) -> bool:
        return self.kind not in ("grid", "choice")

    @property
    def corners(self) -> tuple[Any, ...]:
        """Values that must be allowed for all to be."""
        if self.kind == "randint":
            return self.values[0], self.values[1] - 1
        return self.values[:2] if self.is_numeric else self.values

    def clamp(self, value: Any) -> Any:
        """The nearest value within the bounds; what is chosen from a list stays."""
        return min(max(value, self.corners[0]), self.corners[-1]) if self.is_numeric else value


_DISTRIBUTIONS: dict[str, type[Section]] = {
    "uniform": Uniform, "loguniform": LogUniform, "quniform": QuantizedUniform, "randint": RandInt, "choice": Choice,
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """A file that was read and checked: `Experiment.from_yaml(path)`."""

    spec: ExperimentSpec
    base: Settings
    """Of all trials, before anything is sampled."""
    space: dict[str, Distribution]
    """By dotted key."""

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """Read and check.

        Args:
            overrides: `a.b=value` over the config and the file's `set`.

        Raises:
            SettingsError: one line with what is wrong.
        """
        values = read_yaml(path)
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: holds no experiment; it needs config: and search:, seeds: or variants:")
        try:
            spec = ExperimentSpec.model_validate(values)
        except ValidationError as error:
            raise SettingsError(f"{path}: {messages.one_line(error, ExperimentSpec)}") from None
        spec = spec.model_copy(
            update={
                "search": {key: _absolute(key, value) for key, value in spec.search.items()},
                "variants": [{key: _absolute(key, value) for key, value in one.items()} for one in spec.variants],
            }
        )
        base = _base(spec, Path(path).parent, overrides)
        experiment = cls(spec, base, {key: _distribution(key, value) for key, value in spec.search.items()})
        experiment._check(overrides)
        return experiment

    def to_dict(self) -> dict[str, Any]:
        """The experiment in one file, whatever becomes of the config's."""
        given = self.spec.model_dump(mode="json", exclude_unset=True)
        return given | {"config": self.base.to_dict(), "set": {}}

    @property
    def metric(self) -> str:
        """Name of the number that says which trial is best, in `result["vlarl"]`; larger is better."""
        return self.spec.metric or ("evaluation_success_rate" if self.base.evaluation.episodes else "success_rate")

    @property
    def concurrent(self) -> int | None:
        """Trials at once; None = as many as there is room for."""
        return None if self.spec.scheduler.pbt else self.spec.concurrent

    @property
    def grids(self) -> dict[str, tuple[Any, ...]]:
        """All that is played for each draw, by dotted key; `variant` for sets of keys."""
        grids = {key: found.values for key, found in self.space.items() if found.kind == "grid"}
        if self.spec.variants:
            grids[VARIANT] = tuple(self.spec.variants)
        if self.spec.seeds:
            grids["run.seed"] = tuple(self.spec.seeds)
        return grids

    @property
    def drawn(self) -> dict[str, Distribution]:
        """What is drawn at random."""
        return {key: found for key, found in self.space.items() if found.kind != "grid"}

    @property
    def num_trials(self) -> int:
        return self.spec.samples * math.prod(len(values) for values in self.grids.values())

    def combinations(self) -> Iterator[Settings]:
        """The settings of every combination of the grids, with each corner of what is drawn.

        Raises `SettingsError` for an impossible one.
        """
        grids = {key: values for key, values in self.grids.items() if key != "run.seed"}
        num_corners = max((len(found.corners) for found in self.drawn.values()), default=1)
        for *values, corner in itertools.product(*grids.values(), range(num_corners)):
            drawn = {key: found.corners[min(corner, len(found.corners) - 1)] for key, found in self.drawn.items()}
            chosen = drawn | dict(zip(grids, values, strict=True))
            try:
                yield Settings.from_dict(with_keys(self.base.to_dict(), chosen))
            except SettingsError as error:
                raise SettingsError(f"search: {error}") from None

    def kinds(self) -> Iterator[Settings]:
        """One of the combinations for each kind of processes that they need."""
        seen = set()
        for settings in self.combinations():
            kind = repr([(key, value) for key, value in flat(settings.to_dict()) if not can_change_in_place(key)])
            if kind not in seen:
                seen.add(kind)
                yield settings

    def _check(self, overrides: Sequence[str]) -> None:
        spec, keys = self.spec, [*self.space, *{key for variant in self.spec.variants for key in variant}]
        if not keys and not spec.seeds:
            raise SettingsError("search: nothing to search over; give search, variants or seeds, or use vlarl train")
        for key in keys:
            _check_key(key)
        for key in keys:
            if spec.reuse_actors and not can_change_in_place(key):
                self._refuse_reuse(key)
        fixed = {*spec.set, *(override.partition("=")[0].strip() for override in overrides)}
        searched = [*keys, *(["run.seed"] if spec.seeds else [])]
        for key in searched:
            if key in fixed or searched.count(key) > 1:
                raise SettingsError(f"search: {key} is given twice: by search, variants, seeds, set or --set")
        if math.prod(len(values) for values in self.grids.values()) > MAX_COMBINATIONS:
            raise SettingsError(f"search: more than {MAX_COMBINATIONS:,} combinations; use choice instead of a list")
        for _ in self.combinations():
            pass
        self._check_draws()
        self._check_scheduler()

    def _refuse_reuse(self, key: str) -> None:
        raise SettingsError(
            f"reuse_actors: {key} needs new processes in each trial; leave reuse_actors out, or search over "
            f"{', '.join(IN_PLACE)} alone"
        )

    def _check_draws(self) -> None:
        spec = self.spec
        if spec.samples > 1 and not self.drawn:
            raise SettingsError(
                f"samples: {spec.samples}, but nothing is drawn, so they would all be the same; leave it out, or give "
                "seeds, or a distribution under search"
            )
        if spec.sampler == "optuna" and (self.grids or not self.drawn):
            raise SettingsError(
                "sampler: optuna draws from distributions and plays no lists, variants or seeds; use choice or uniform"
            )

    def _check_scheduler(self) -> None:
        spec, base = self.spec, self.base
        of_evaluations = self.metric != "success_rate" and "evaluation" in self.metric
        if of_evaluations and not base.evaluation.episodes:
            raise SettingsError(
                f"metric: {self.metric} needs evaluations; set evaluation.episodes, or use success_rate"
            )
        asha, pbt = spec.scheduler.asha, spec.scheduler.pbt
        if asha and pbt:
            raise SettingsError("scheduler: asha and pbt exclude each other; give one")
        if (asha or pbt) and of_evaluations and not base.evaluation.every:
            raise SettingsError(
                f"scheduler: {'asha' if asha else 'pbt'} looks at {self.metric} on the way, but evaluation.every is 0, "
                "so there are evaluations at the ends alone; set it under set, or use metric: success_rate"
            )
        first_look = asha.grace_iterations if asha else pbt.perturb_every if pbt else 0
        if (asha or pbt) and of_evaluations and first_look < base.evaluation.every:
            raise SettingsError(
                f"scheduler: the first look is behind iteration {first_look}, where no trial has been evaluated yet "
                f"(evaluation.every: {base.evaluation.every}); evaluate more often, or look later"
            )
        if asha and asha.grace_iterations >= base.run.iterations:
            raise SettingsError(
                f"scheduler.asha.grace_iterations: {asha.grace_iterations} is not below run.iterations "
                f"({base.run.iterations}), so no trial could be ended"
            )
        if pbt and (not self.drawn or spec.sampler == "optuna"):
            raise SettingsError("scheduler: pbt changes what is drawn; give distributions and sampler: random")
        if pbt and "concurrent" in spec.model_fields_set and spec.concurrent is not None:
            raise SettingsError(
                f"concurrent: {spec.concurrent}, but all trials of pbt are there from the start, and take turns where "
                "there is no room for all; leave it out"
            )
        if pbt and self.grids:
            raise SettingsError(
                "scheduler: under pbt a trial takes over all values of another one, "
                f"{next(iter(self.grids))} among them; leave out lists, variants and seeds"
            )
        if pbt and self.num_trials < 2:
            raise SettingsError("samples: 1, but population based training needs at least 2 trials")


def _base(spec: ExperimentSpec, beside: Path, overrides: Sequence[str]) -> Settings:
    values = spec.config
    if isinstance(values, str):
        path = Path(values).expanduser()
        values = read_yaml(path if path.is_absolute() else beside / path) or {}
        if not isinstance(values, dict):
            raise SettingsError(f"config: {path} holds no sections")
    values = with_keys(values, spec.set)
    for override in overrides:
        apply_override(values, override)
    return Settings.from_dict(values)


def _absolute(key: str, value: Any) -> Any:
    """A model's path means the same wherever the experiment goes on."""
    if key not in ("model.path", "model.critic_path"):
        return value
    if isinstance(value, list):
        return [_absolute(key, one) for one in value]
    if isinstance(value, dict):
        return {name: _absolute(key, one) for name, one in value.items()}
    return absolute_unless_name(value) if isinstance(value, str) and value else value


def _distribution(key: str, value: Any) -> Distribution:
    if isinstance(value, list):
        if not value:
            raise SettingsError(f"search: {key} has an empty list; give values")
        return Distribution("grid", tuple(value))
    names = f"a list of values, or one of {', '.join(_DISTRIBUTIONS)}"
    if not isinstance(value, Mapping) or len(value) != 1 or (kind := next(iter(value))) not in _DISTRIBUTIONS:
        raise SettingsError(f"search: {key} is {value!r}; give {names}, such as {{loguniform: [1.0e-6, 1.0e-4]}}")
    try:
        found = getattr(TypeAdapter(_DISTRIBUTIONS[kind]).validate_python(value), kind)
    except ValidationError as error:
        raise SettingsError(f"search: {key}: {messages.one_line(error, _DISTRIBUTIONS[kind])}") from None
    if kind == "quniform" and any(abs(bound / found[2] - round(bound / found[2])) > 1e-6 for bound in found[:2]):
        raise SettingsError(f"search: {key}: the bounds of quniform must be multiples of its step {found[2]}")
    if kind != "choice" and not found[0] < found[1]:
        raise SettingsError(f"search: {key} goes from {found[0]} to {found[1]}; the first must be the smaller")
    return Distribution(kind, tuple(found))


def _check_key(key: str) -> None:
    if key in NOT_SEARCHED:
        raise SettingsError(f"search: {key} cannot be searched over; {NOT_SEARCHED[key]}")
    known = known_keys()
    if key not in known and not any(key.startswith(f"{name}.") for name in known if name == "rewards.others"):
        raise SettingsError(f"search: {key}: unknown key; {messages.nearest(key, known)}")
