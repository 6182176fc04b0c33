"""Sampling that runs ahead of the updates.

An iteration is made of one *share* of each slot: as much as it contributes to an iteration anyway. The share of
iteration i may be begun once all updates before i - max_staleness are in the engines; so what update i learns from is
at most max_staleness updates old, and slots that are through with a share go on to the next one. Runners report once a
second, or when they may play no more, and are called again at once: also while the learners update.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from vlarl_rllib.process.calls import EndRequested
from vlarl_rllib.rollout.collector import Rollout, RolloutCollector
from vlarl_rllib.rollout.contribution import Contribution, Order, Portion
from vlarl_rllib.rollout.runner_pool import numbered

REPORT_SECONDS = 1.0
"""How long a runner plays before it reports. What it plays goes on meanwhile; only its replies wait for the next call.
"""
POLL_SECONDS = 0.02
"""How long a runner's report may lie: RLlib waits for all of them, or so long."""
CALL = "play_ahead"


class AsyncCollector(RolloutCollector):
    """Keeps the runners playing, and hands over an iteration's shares once all runners that live have theirs.

    Args:
        max_staleness: updates that a decision's policy may be behind the learners'.
        runners_sync_and_pool, calls: see `RolloutCollector`.
    """

    def __init__(self, *runners_sync_and_pool: Any, max_staleness: int, **calls: Any) -> None:
        super().__init__(*runners_sync_and_pool, **calls)
        self._max_staleness = max_staleness
        self._generation = self._iteration = 0
        """The latter is being collected, or learned from."""
        self._versions: dict[int, int] = {}
        """By iteration, the version of the weights before its update."""
        self._since: dict[int, float] = {}
        """Calls under way: when each runner was called."""
        self._through: dict[int, int] = {}
        """By runner, the newest iteration whose shares it has played; before the first, the one before that."""
        self._waiting = Rollout()
        """What has come in and belongs to no iteration that was handed over."""
        self._wanted: tuple[int, Mapping[tuple[int, int], float]] = (0, {})
        self._fruitless = 0
        self.meanwhile = self.keep_playing

    def collect(
        self, iteration: int, quota: int, weights: Mapping[tuple[int, int], float], rollout: Rollout | None = None
    ) -> Rollout:
        """See `RolloutCollector.collect`."""
        if rollout is None:
            rollout = Rollout()
            self._iteration, self._wanted = iteration, (quota, weights)
            self._versions[iteration] = self._sync.version
            self._versions = {i: v for i, v in self._versions.items() if i >= iteration - self._max_staleness}
            self._sync.make_engines_current()
        self._drop_stale()
        while not self._is_whole(rollout):
            if self._ended.is_set():
                raise EndRequested
            if self._through and min(self._through.values()) >= self._last:
                self._forget_all()  # all have played what they may, and too much of it was lost
            self._pump(POLL_SECONDS)
            self._drop_stale()
        return self._take(rollout)

    def keep_playing(self) -> None:
        """Take what runners report, and call them again. Does not wait for them."""
        if not self._ended.is_set():
            self._pump(0.0)

    def leave_checkpoint(self) -> None:
        """Nothing: sampling goes on, and a resumed run is not this one to the bit anyway."""

    def begin_new_episodes(self) -> None:
        """Forget all that was played and is not learned from."""
        self._forget_all()
        self._versions = {}

    def _forget_all(self) -> None:
        """All begin anew, with the running iteration."""
        lost = self._waiting.lost_steps + sum(portion.env_steps for _, portion in self._waiting.portions)
        self._waiting = Rollout(lost_steps=lost, stale_steps=self._waiting.stale_steps)
        self._generation += 1
        self._through = {}

    # Who has played what

    def _is_whole(self, rollout: Rollout) -> bool:
        """Whether the iteration has the shares of all runners, and enough of them: where too few are left, since
        runners died, later ones will do."""
        is_owed = any(through < self._iteration for through in self._through.values())
        return not is_owed and len(rollout.portions) + len(self._waiting.portions) >= self._enough()

    @property
    def _last(self) -> int:
        """Newest iteration whose share may be begun."""
        return self._iteration + self._max_staleness

    def _drop_stale(self) -> None:
        oldest = min(self._versions.values())
        kept = [item for item in self._waiting.portions if min(item[1].versions) >= oldest]
        if len(kept) < len(self._waiting.portions):
            dropped = [portion for _, portion in self._waiting.portions if min(portion.versions) < oldest]
            self._waiting.stale_steps += sum(portion.env_steps for portion in dropped)
            self._waiting.portions = kept

    def _take(self, rollout: Rollout) -> Rollout:
        """Move what has come in for the iteration, and of later ones what is needed, into the rollout."""
        come, self._waiting = self._waiting, Rollout()
        come.portions.sort(key=lambda item: item[1].iteration)
        enough = max(
            sum(portion.iteration <= self._iteration for _, portion in come.portions),
            self._enough() - len(rollout.portions),
        )
        self._waiting.portions = come.portions[enough:]
        come.portions = come.portions[:enough]
        rollout.join(come)
        if self._filter_groups:
            rollout.filter_groups(self._enough())
        rollout.staleness = self._staleness(portion for _, portion in rollout.portions)
        return rollout

    def _staleness(self, portions: Iterable[Portion]) -> Mapping[int, int]:
        counts = Counter[int]()
        for portion in portions:
            for version, decisions in portion.versions.items():
                behind = max(iteration for iteration, known in self._versions.items() if known <= version)
                counts[self._iteration - behind] += decisions
        return counts

    # Calls

    def _pump(self, seconds: float) -> None:
        """Call the runners that have nothing to do, and take what is reported within this time."""
        self._restore()
        self._call_idle()
        began = time.monotonic()
        answers = dict(answer for _, answer in self._runners.fetch_ready_async_reqs(tags=CALL, timeout_seconds=seconds))
        reports: dict[int, Contribution] = self._unraised(dict(answers), CALL)
        failures = len(answers) - len(reports) + self._forget_dead(answers)
        failures += sum(bool(report.attached and report.attached.failure) for report in reports.values())
        errors = [self._take_report(index, report) for index, report in reports.items()]
        if any(report.played for report in reports.values()):
            self._fruitless = 0
        elif failures or any(errors):
            self._fruitless += 1
        if any(errors):
            self._sync.make_engines_current()
        if failures or any(errors):
            self._raise_if_hopeless(self._fruitless, errors)
        if not answers and (rest := seconds - (time.monotonic() - began)) > 0:  # with no call under way it returns
            self._ended.wait(rest)

    def _call_idle(self) -> None:
        healthy = self._runners.healthy_worker_ids()
        self._through |= {index: self._joins_behind() for index in healthy if index not in self._through}
        idle = [index for index in healthy if index not in self._since and self._through[index] < self._last]
        if not idle:
            return
        attach = self._attach_arguments()
        self._runners.foreach_env_runner_async(
            [partial(numbered, CALL)] * len(idle),
            tag=CALL,
            kwargs=[{"attach": attach, "order": self._order(index)} for index in idle],
            remote_worker_ids=idle,
        )
        self._since |= dict.fromkeys(idle, time.monotonic())

    def _joins_behind(self) -> int:
        """The iteration before the first one that a runner that is new plays for: the running one waits for it unless
        others have played for that already."""
        has_begun = any(portion.iteration <= self._iteration for _, portion in self._waiting.portions)
        return self._iteration if has_begun else self._iteration - 1

    def _order(self, index: int) -> Order:
        quota, weights = self._wanted
        return Order(
            trial=self._trial,
            generation=self._generation,
            first=self._through[index] + 1,
            last=self._last,
            oldest_version=min(self._versions.values()),
            quota=quota,
            weights=weights,
            seconds=REPORT_SECONDS,
        )

    def _forget_dead(self, answers: Mapping[int, Any]) -> int:
        """Runners that died, or are killed since they are frozen or raised; how many of them had a call under way.
        Those that answered may be called again."""
        lost = 0
        for index, since in list(self._since.items()):
            if index not in answers and time.monotonic() - since > self._timeout_seconds:
                self._end(index, CALL)
            if index in answers:
                del self._since[index]
            elif index not in self._runners.healthy_worker_ids():
                del self._since[index]
                lost += 1
        healthy = set(self._runners.healthy_worker_ids())
        self._through = {index: through for index, through in self._through.items() if index in healthy}
        return lost

    def _take_report(self, index: int, report: Contribution) -> str | None:
        """Take what a runner reports; its engine's error."""
        assert report.attached is not None, "play_ahead attaches"
        ready = self._ready({index: report.attached})
        if index not in ready:
            self._through.pop(index, None)
        elif ready[index].trial != self._trial:
            self._reconfigure([index])
        elif report.generation == self._generation:
            self._through[index] = report.through
            self._waiting.add(report)
        else:
            self._waiting.lost_steps += report.env_steps
        return report.engine_error
