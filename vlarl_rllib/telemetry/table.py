"""Every metric that actors export, in one table: what is recorded, what Grafana shows and what docs/metrics.md explains
all follow from it.

Ray exports a metric `x` of this table as `ray_vlarl_x`, a counter as `ray_vlarl_x_total`, a histogram as
`ray_vlarl_x_bucket`, `_sum` and `_count`; each with the labels `run`, `suite`, `actor` and those that the table names.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

PREFIX = "vlarl_"
COMMON_LABELS = ("run", "suite", "actor")
"""Of every metric: the run's name, the suite or environment, and who tells it, such as `engine-0`."""
SECONDS_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Ray reports an observation as the middle of its bucket, so these are close to each other."""
STEPS_BOUNDS = (1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 400.0, 600.0)


class Kind(enum.Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    name: str
    kind: Kind
    row: str
    """Of the Grafana dashboard."""
    help: str
    """With the unit."""
    unit: str
    """What Grafana calls the unit of the panel, which shows a counter's rate."""
    labels: tuple[str, ...] = ()
    """Beside `COMMON_LABELS`."""
    by: tuple[str, ...] = ()
    """Labels whose values the panel shows apart, beside `run`."""
    fold: str = "max"
    """How the panel puts gauges of one run together."""
    share_of: str = ""
    """A gauge that the panel divides the rate by."""
    bounds: tuple[float, ...] = ()
    """Of a histogram's buckets."""
    needs: str = ""
    """What a run must have for this to be there; empty = any run has it."""

    @property
    def exported(self) -> str:
        """What Prometheus calls it; a histogram without `_bucket`."""
        return f"ray_{PREFIX}{self.name}{'_total' if self.kind is Kind.COUNTER else ''}"


def _counter(row: str, name: str, unit: str, text: str, labels: str = "", **more: object) -> Metric:
    return Metric(name, Kind.COUNTER, row, text, unit, tuple(labels.split()), **more)  # type: ignore[arg-type]


def _gauge(row: str, name: str, unit: str, text: str, labels: str = "", **more: object) -> Metric:
    return Metric(name, Kind.GAUGE, row, text, unit, tuple(labels.split()), **more)  # type: ignore[arg-type]


def _histogram(row: str, name: str, unit: str, text: str, labels: str = "", **more: object) -> Metric:
    return Metric(name, Kind.HISTOGRAM, row, text, unit, tuple(labels.split()), **more)  # type: ignore[arg-type]


POLICY_GAUGES = {
    "policy_loss": "Mean clipped surrogate loss of the policy in the last iteration",
    "value_loss": "Mean loss of the critic in the last iteration",
    "entropy": "Mean entropy of a decision's token distributions together, nats",
    "approx_kl": "Mean of r - 1 - ln r of the last iteration (k3)",
    "clip_fraction": "Share of probability ratios outside the clip range in the last iteration",
    "logprob_gap_mean": "Mean of |learner's - sampler's log-prob| before the first optimiser step",
    "logprob_gap_max": "Largest of |learner's - sampler's log-prob| before the first optimiser step",
    "explained_variance": "1 - Var(target - value) / Var(target) of the last iteration",
    "grad_norm": "Global gradient norm of the policy before clipping, mean over minibatches",
    "reward_mean": "Mean reward of a decision in the last iteration",
}
"""Numbers of an iteration's row that are gauges of the same name."""

_ALL = (
    _counter("Sampling", "env_steps", "ops", "Environment steps played", "task purpose", by=("purpose",)),
    _counter("Sampling", "episodes", "ops", "Episodes of training that ended", "task outcome", by=("outcome",)),
    _histogram(
        "Sampling", "episode_length_steps", "short", "Length of the episodes of training that ended, environment steps",
        "task", by=("task",), bounds=STEPS_BOUNDS,
    ),
    _gauge("Sampling", "success_rate", "percentunit",
           "Success of a task's episodes in the last iteration of training in which one ended", "task", by=("task",)),
    _gauge("Sampling", "evaluation_success_rate", "percentunit",
           "Success of the last greedy evaluation", needs="evaluation.episodes > 0"),
    _gauge("Sampling", "slots", "short", "Environments that a runner plays at once", fold="sum"),
    _counter("Sampling", "env_busy_seconds", "percentunit",
             "Seconds in calls of environments, summed over slots; over slots and time it is their busy share",
             share_of="slots"),
    _counter("Sampling", "sampler_wait_seconds", "percentunit",
             "Seconds that slots wait for decisions, summed over slots; over slots and time it is the share of it",
             share_of="slots"),
    _counter("Engines", "decisions", "ops", "Decisions sampled: replies of the policy", by=("actor",)),
    _counter("Engines", "actions", "ops", "Actions in these decisions"),
    _counter("Engines", "tokens", "ops", "Action tokens in these decisions"),
    _counter("Engines", "engine_busy_seconds", "percentunit",
             "Seconds with at least one request in the model; over time it is the busy share", by=("actor",)),
    _histogram("Engines", "engine_latency_seconds", "s", "Seconds from a request's arrival at an engine to its reply",
               by=("actor",), bounds=SECONDS_BOUNDS, needs="engines.num > 0"),
    _gauge("Engines", "engine_queue_length", "short", "Requests that wait for the model, or are in it", "state",
           by=("actor", "state"), fold="sum", needs="engines.num > 0"),
    _gauge("Engines", "engine_policy_version", "short", "Version of the weights that an engine samples with",
           by=("actor",)),
    _counter("Engines", "engine_load_seconds", "percentunit", "Seconds in which an engine takes new weights",
             by=("actor",), needs="engines.num > 0"),
    _gauge("Engines", "gpu_memory_bytes", "bytes", "GPU memory of an engine's or learner's process, by torch's account",
           "state", by=("actor", "state"), needs="a GPU"),
    _counter("Learners", "learner_seconds", "percentunit",
             "Seconds of a learner by phase; over time it is the busy share", "phase", by=("actor", "phase")),
    _counter("Learners", "trained_samples", "ops", "Decisions trained on, counted once an epoch"),
    _gauge("Learners", "learning_rate", "sci", "Of the policy's optimiser in the last iteration"),
    _gauge("Run", "iteration", "short", "Iterations done"),
    _gauge("Run", "iteration_seconds", "s", "Wall time of the last iteration by phase", "phase", by=("phase",)),
    _gauge("Run", "policy_version", "short", "Pushes of weights so far"),
    _counter("Run", "sync_bytes", "Bps", "Bytes of weights published"),
    _gauge("Run", "faults", "short", "Faults since the run began, rewards that failed among them", "kind",
           by=("kind",)),
    _histogram("Run", "judge_seconds", "s", "Seconds of one call of the reward worker", bounds=SECONDS_BOUNDS,
               needs="rewards.process"),
    *(_gauge("Policy", name, "short", text) for name, text in POLICY_GAUGES.items()),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""By name."""
