"""The greedy evaluation of a run: held-out starts on the runners of training, films and numbers of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlarl_rllib.observability.ledger import Ledger
from vlarl_rllib.observability.metrics import evaluation_metrics
from vlarl_rllib.process.calls import EndRequested
from vlarl_rllib.process.storage import place_of
from vlarl_rllib.rollout.collector import RolloutCollector
from vlarl_rllib.rollout.evaluation import held_out_starts
from vlarl_rllib.rollout.video import keep_videos
from vlarl_rllib.settings import RuntimeArgs, Settings


class GreedyEvaluation:
    """Of one trial.

    Args:
        run_dir: where films go; None = there are none.
        ledger: gets the seconds.
        call_back: RLlib's callbacks by name, `on_evaluate_start` and `on_evaluate_end`.
    """

    def __init__(
        self, settings: Settings, plan: RuntimeArgs, run_dir: str | None, ledger: Ledger, call_back: Callable[..., None]
    ) -> None:
        self.num_episodes = plan.evaluation_episodes
        self._settings, self._run_dir, self._ledger, self._call_back = settings, run_dir, ledger, call_back

    def is_due(self, done: int) -> bool:
        """Whether one is asked for behind so many iterations; 0 = before the first."""
        if self.num_episodes == 0:
            return False
        every = self._settings.evaluation.every
        return done == 0 or done >= self._settings.run.iterations or (every > 0 and done % every == 0)

    def play(self, collector: RolloutCollector, after: int) -> dict[str, Any] | None:
        """`evaluation_metrics` of all held-out starts; None where the run ends meanwhile.

        Args:
            after: so many iterations.

        Raises:
            EndRequested: the run ends meanwhile, before its first iteration.
        """
        self._call_back("on_evaluate_start")
        starts = held_out_starts(self._settings, self.num_episodes)
        record = frozenset(starts[: self._settings.evaluation.videos]) if self._run_dir else frozenset()
        try:
            with self._ledger.timed("evaluation"):
                rounds = list(collector.evaluate(starts, record=record))
        except EndRequested:
            if after == 0:
                raise
            return None  # the iteration before it is whole, and counts
        results = [result for played in rounds for result in played.results]
        if self._run_dir:
            keep_videos(place_of(self._run_dir) / "videos", after, results)
        metrics = evaluation_metrics(results)
        self._call_back("on_evaluate_end", evaluation_metrics=metrics)
        return metrics
