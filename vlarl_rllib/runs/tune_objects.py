"""An experiment as Ray Tune's own objects: space, scheduler, searcher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from vlarl_rllib.rllib_compat import population_based_training, successive_halving
from vlarl_rllib.settings.experiment import Distribution, Experiment

ITERATION = "training_iteration"
MODE = "max"


def tuned_metric(experiment: Experiment) -> str:
    """The experiment's metric as Tune finds it in a result."""
    return f"vlarl/{experiment.metric}"


def param_space(experiment: Experiment, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What Tune samples a trial's config from.

    Args:
        resolved: the base settings, with what depends on this machine filled in.
    """
    drawn = {key: _domain(found) for key, found in experiment.drawn.items()}
    grids = {key: tune.grid_search(list(values)) for key, values in experiment.grids.items()}
    return {"vla": dict(resolved), "sampled": drawn | grids}


def scheduler(experiment: Experiment) -> TrialScheduler | None:
    """None = every trial plays to its end, in order."""
    asha, pbt = experiment.spec.scheduler.asha, experiment.spec.scheduler.pbt
    if asha:
        return successive_halving(
            experiment.metric,
            time_attr=ITERATION,
            max_t=experiment.base.run.iterations,
            grace_period=asha.grace_iterations,
            reduction_factor=asha.reduction_factor,
        )
    if pbt:
        return population_based_training(
            time_attr=ITERATION,
            perturbation_interval=pbt.perturb_every,
            hyperparam_mutations={"sampled": {key: _mutations(found) for key, found in experiment.drawn.items()}},
            quantile_fraction=pbt.quantile,
            resample_probability=pbt.resample,
            custom_explore_fn=Clamp(experiment.drawn),
        )
    return None


def searcher(experiment: Experiment) -> SearchAlgorithm | Searcher:
    """What draws samples."""
    if experiment.spec.sampler == "random":
        return BasicVariantGenerator(
            constant_grid_search=True,
            random_state=experiment.base.run.seed,
            max_concurrent=experiment.concurrent or 0,  # TuneConfig's would be ignored
        )
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(metric=tuned_metric(experiment), mode=MODE, seed=experiment.base.run.seed)


class Clamp:
    """Keeps within the space what population based training multiplies beyond its bounds."""

    def __init__(self, drawn: Mapping[str, Distribution]) -> None:
        self._drawn = dict(drawn)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        sampled = config["sampled"]
        config["sampled"] = sampled | {key: found.clamp(sampled[key]) for key, found in self._drawn.items()}
        return config


def _mutations(found: Distribution) -> Any:
    """A list is shifted along, a distribution's value multiplied."""
    return list(found.values) if found.kind == "choice" else _domain(found)


def _domain(found: Distribution) -> Any:
    if found.kind == "choice":
        return tune.choice(list(found.values))
    return getattr(tune, found.kind)(*found.values)
