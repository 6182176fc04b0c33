"""Environment classes and their scripted experts by name, and the facts about a suite that need no simulator.

Worker processes receive an `EnvSpec` and call `make_env`; settings, curricula and evaluation ask for tasks, initial
states and horizons. An installed package adds environments and experts through entry points:

    [project.entry-points."vlarl_rllib.environments"]
    drawer = "my_robots.drawer:DrawerEnv"                  # a VLAEnv
    [project.entry-points."vlarl_rllib.experts"]
    drawer = "my_robots.drawer:DrawerExpert"               # called with the pace; see data/experts.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlarl_rllib.process.plugins import added_by_packages, load_class
from vlarl_rllib.types import EnvSpec

if TYPE_CHECKING:
    from vlarl_rllib.envs.base import VLAEnv


@dataclass(frozen=True)
class EnvironmentFacts:
    """What is asked of an environment before any simulator is loaded."""

    reference: str
    """`module:Class`."""
    tasks: Mapping[str, int]
    """Number of tasks by suite; under "" where there are no suites."""
    num_held_out: int
    """Initial states of each task that only evaluation uses."""
    statistics: str | None = None
    """Key of the action statistics that fit it; None = the suite's name."""
    crops: bool = False
    """Whether frames pass the centre crop of `EnvSpec.center_crop`."""
    needs_gl: bool = False
    """Whether it draws with MuJoCo."""


ENVIRONMENTS = {
    "libero": EnvironmentFacts(
        "vlarl_rllib.envs.libero:LiberoEnv",
        {
            "libero_spatial": 10,
            "libero_object": 10,
            "libero_goal": 10,
            "libero_10": 10,
            "libero_90": 90,
        },  # arXiv 2306.03310, section 4
        num_held_out=10,
        crops=True,
        needs_gl=True,
    ),
    "tabletop": EnvironmentFacts(
        "vlarl_rllib.envs.tabletop:TabletopEnv", {"": 18}, num_held_out=200, statistics="tabletop", needs_gl=True
    ),
    "synthetic": EnvironmentFacts(
        "vlarl_rllib.envs.synthetic:SyntheticEnv", {"": 4}, num_held_out=10
    ),  # any suite's statistics will do
}
"""The environments that come with the package, by their short names."""
DEFAULT_ENVIRONMENT, DEFAULT_SUITE = "libero", "libero_spatial"
EXPERTS = {
    "synthetic": "vlarl_rllib.data.experts:SyntheticExpert",
    "tabletop": "vlarl_rllib.data.experts:TabletopExpert",
}
"""By the name of the environment that they play."""

HELD_OUT_FRACTION = 0.2
"""Share of a task's initial states that only evaluation uses: 10 of LIBERO's 50."""


def make_env(spec: EnvSpec) -> VLAEnv:
    """Build the environment that `spec` names.

    Raises:
        ValueError: there is no such environment, or it has no such suite.
    """
    return env_class(spec.name)(spec)


def env_class(name: str) -> type[VLAEnv]:
    """The class behind a short name or `module:Class`.

    Raises:
        ValueError: neither form, or nothing can be imported under it.
    """
    reference = environments().get(name, name)
    if ":" not in reference:
        raise ValueError(
            f"env.name is {name!r}; choose one of {', '.join(environments())}, or name a class as module:Class"
        )
    found: type[VLAEnv] = _load("env.name", name, reference)
    return found


def expert_class(name: str) -> Any:
    """The expert of an environment, to be called with a pace.

    Raises ValueError where it has none, or none can be imported.
    """
    if name not in experts():
        raise ValueError(f"{name} has no scripted expert; {', '.join(experts())} have")
    return _load("the expert of env.name", name, experts()[name])


def environments() -> dict[str, str]:
    """`module:Class` by short name: what installed packages add, and the package's own, which win."""
    return added_by_packages("vlarl_rllib.environments") | {
        name: facts.reference for name, facts in ENVIRONMENTS.items()
    }


def experts() -> dict[str, str]:
    """`module:Class` by the name of the environment; as `environments`."""
    return added_by_packages("vlarl_rllib.experts") | EXPERTS


def _load(what: str, name: str, reference: str) -> Any:
    try:
        return load_class(reference)
    except ValueError as error:
        raise ValueError(f"{what} is {name!r}, but {error}") from error


def task_instructions(suite: str, *, name: str = DEFAULT_ENVIRONMENT) -> list[str]:
    """The language instruction of every task of `suite`, in task order."""
    return env_class(name).task_instructions(suite)


def suites(name: str) -> tuple[str, ...]:
    """The suites that an environment of ours has, else none."""
    facts = ENVIRONMENTS.get(name)
    return tuple(suite for suite in facts.tasks if suite) if facts else ()


def label(name: str, suite: str) -> str:
    """What to call the tasks of an environment: by their suite where there are several."""
    return suite if suites(name) else name


def eval_options(name: str, suite: str) -> str:
    """Options of `vlarl eval` for these tasks."""
    return f"--suite {suite}" if name == DEFAULT_ENVIRONMENT else f"--env {name}"


def default_statistics(name: str, suite: str) -> str:
    """Key of the action statistics that fit an environment."""
    facts = ENVIRONMENTS.get(name)
    return (facts.statistics or suite) if facts else name


def num_tasks(suite: str, *, name: str = DEFAULT_ENVIRONMENT) -> int:
    """How many tasks `suite` has; task ids are 0 to this minus 1."""
    facts = ENVIRONMENTS.get(name)
    tasks = facts.tasks.get(suite if suites(name) else "") if facts else None
    return len(task_instructions(suite, name=name)) if tasks is None else tasks


def num_held_out_states(spec: EnvSpec, task_id: int) -> int:
    """Initial states of a task that only evaluation uses."""
    facts = ENVIRONMENTS.get(spec.name)
    return facts.num_held_out if facts else len(training_and_held_out_states(spec, task_id)[1])


def num_initial_states(suite: str, task_id: int, *, name: str = DEFAULT_ENVIRONMENT) -> int:
    """How many initial states the task has (LIBERO: 50 in every standard suite)."""
    return env_class(name).num_initial_states(suite, task_id)


def horizon(suite: str, *, name: str = DEFAULT_ENVIRONMENT) -> int:
    """Policy steps after which an episode of `suite` is cut off."""
    return env_class(name).horizon(suite)


def frames_per_second(name: str) -> float:
    """At which films of an environment are shown."""
    from vlarl_rllib.envs.base import VLAEnv

    rate: float = env_class(name).metadata.get("render_fps", VLAEnv.metadata["render_fps"])
    return rate


def split_initial_states(
    num_states: int, held_out_fraction: float = HELD_OUT_FRACTION
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide the initial states of a task into (training, held out): the last ones are held out, at least one on each
    side.

    Raises:
        ValueError: fewer than two states cannot be divided.
    """
    if num_states < 2:
        raise ValueError(
            f"{num_states} initial state(s) cannot be divided into training and held-out ones; at least 2 are needed"
        )
    num_held_out = min(max(1, round(num_states * held_out_fraction)), num_states - 1)
    boundary = num_states - num_held_out
    return tuple(range(boundary)), tuple(range(boundary, num_states))


def training_and_held_out_states(spec: EnvSpec, task_id: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`split_initial_states` of one task of the environment that `spec` names."""
    return split_initial_states(num_initial_states(spec.suite, task_id, name=spec.name))
