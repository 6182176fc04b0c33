"""Whether sampler and learner compute the same policy, judged on numbers that every iteration has anyway.

Before the first optimiser step of an iteration nothing has changed, as with a learning rate of 0: the ratio of new to
old probability must be 1, no ratio may be clipped, and the learner must find the log-probabilities that the sampler
found for the same tokens. `FLOAT32` and `BFLOAT16` say how far off rounding may be.

The first iteration is judged on weights that both sides read, the one behind the first update on weights that travelled
from one to the other. All others are judged too, and told only where something is wrong for the first time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from vlarl_rllib.errors import SelfTestError
from vlarl_rllib.models.family import ActionFormat, read_facts
from vlarl_rllib.models.presets import resolve_model
from vlarl_rllib.settings import Settings

logger = logging.getLogger(__name__)

GAP, RATIO, CLIP = "log-prob gap", "ratio", "clip fraction"
"""The checks, in the order in which one explains the next."""
HOPELESS_GAP = 1.0
"""Mean gap, in nats, at which the run ends: tokens are sampled that the learner thinks e times as likely or less, so
that the ratios of seven of them say nothing. 60 times the largest one measured with bfloat16."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far rounding may take the numbers of the first minibatch."""

    gap_mean: float
    gap_max: float
    """Nats per token, sampler against learner."""
    ratio: float
    """Largest |ratio - 1| of the learner against itself."""


FLOAT32 = Bounds(gap_mean=1e-4, gap_max=1e-3, ratio=1e-4)
"""Measured: 6e-7 mean on a GPU and on a CPU, 2e-6 max and ratio 5e-6 (docs/doctor.md). Kernels that round products to
TF32 are 1e-3 off, weights of one update earlier by what that update did."""
BFLOAT16 = Bounds(gap_mean=0.05, gap_max=1.0, ratio=0.2)
"""Measured: 7e-3 to 1.5e-2 mean and 3e-2 to 7e-2 max, with presets and with 7B weights in 16, 8 and 4 bits
(docs/adapters_and_export.md). The mean has a factor of three for trained policies, whose logits are larger; one token
may be a factor e off, since rounding moves unlikely tokens most. The learner repeats itself to the bit, or to 2e-2
where its batches differ in size; from 0.2 on a ratio is clipped by default, before anything was learned."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a run's settings let one expect of its numbers."""

    bounds: Bounds
    tokens_per_ratio: int
    """Whose log-probs are added up for one ratio."""
    recompute: bool
    """Whether the ratio's denominator is the learner's own."""
    hopeless_gap: float
    about_gap: str
    """What to do about a gap between the same weights."""
    about_ratio: str
    """What to do where the learner differs from itself."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of one iteration."""

    failed: tuple[str, ...]
    """Of `GAP`, `RATIO`, `CLIP`."""
    numbers: str
    """In words, each with its bound."""
    hopeless: bool


def expectation(settings: Settings, actions: ActionFormat) -> Expectation:
    """What to expect of a run with these settings."""
    types = {settings.model.dtype, settings.engines.dtype}
    sharper = max(1.0, 1.0 / settings.temperature)  # logits, with their rounding, are divided by it
    bounds = BFLOAT16 if "bfloat16" in types else FLOAT32
    bounds = Bounds(**{name: sharper * bound for name, bound in asdict(bounds).items()})
    tokens = {"decision": actions.num_tokens, "action": actions.tokens_per_action, "token": 1}[settings.training.ratio]
    remedies = [f"set engines.dtype to model.dtype ({settings.model.dtype})"] if len(types) > 1 else []
    if settings.engines.num:
        remedies.append("see whether it is gone with engines.num: 0, where the model itself samples")
    rounding = "set model.dtype: float32, which tells rounding from a mistake"
    return Expectation(
        bounds=bounds,
        tokens_per_ratio=tokens,
        recompute=settings.training.old_log_probs == "recompute",
        hopeless_gap=sharper * HOPELESS_GAP,
        about_gap=", or ".join([*remedies, "set weights.checksum: true to compare what is sent with what arrives"]),
        about_ratio=rounding if settings.model.dtype == "bfloat16" else "look for a layer that is random, like dropout",
    )


def judge(row: Mapping[str, Any], expected: Expectation) -> Judgement:
    """Judge one iteration's numbers; NaN is beyond every bound.

    A ratio whose denominator is the sampler's may be off by what the gap makes of the tokens that it adds up, so that a
    gap is blamed once.

    Args:
        row: with `first_ratio_deviation`, `first_clip_fraction`, `logprob_gap_mean`, `logprob_gap_max`.
    """
    bounds, largest = expected.bounds, row["logprob_gap_max"]
    ratio_bound = bounds.ratio
    if not expected.recompute:
        ratio_bound += math.expm1(min(expected.tokens_per_ratio * largest, 700.0))
    within = {
        GAP: row["logprob_gap_mean"] <= bounds.gap_mean and largest <= bounds.gap_max,
        RATIO: row["first_ratio_deviation"] <= ratio_bound,
        CLIP: row["first_clip_fraction"] <= 0.0,
    }
    numbers = (
        f"ratio 1 +- {row['first_ratio_deviation']:.1e} (bound {ratio_bound:.1e}), "
        f"clipped {100 * row['first_clip_fraction']:.3g} % (bound 0), log-prob gap mean "
        f"{row['logprob_gap_mean']:.1e}, max {largest:.1e} (bounds {bounds.gap_mean:.1e}, {bounds.gap_max:.1e})"
    )
    failed = tuple(name for name, good in within.items() if not good)
    return Judgement(failed, numbers, hopeless=not row["logprob_gap_mean"] <= expected.hopeless_gap)


def tell(row: Mapping[str, Any], console: Console, *, of: str = "", passed: bool = True) -> None:
    """Print what the self-test of an iteration's row has to tell.

    Args:
        of: what goes before it.
        passed: also where it passed.
    """
    test = row["self_test"]
    if test and test["told"] and (passed or test["failed"]):
        console.print(f"{of}{test['told']}", style="bold red" if test["failed"] else "dim")


class SelfTest:
    """The judgements of one trial, and which of them a person is told.

    Args:
        expected: of the run.
        warm_up: first iterations that train only the critic, so that the policy's weights stay as they were.
    """

    def __init__(self, expected: Expectation, warm_up: int) -> None:
        self._expected, self._warm_up = expected, warm_up
        self._is_new, self._updated = True, False
        self._told_first = self._told_updated = False
        self._told_failures: set[str] = set()
        self._gap_was_fine = False

    @classmethod
    def of(cls, settings: Settings) -> SelfTest:
        """For a run with these settings."""
        actions = read_facts(resolve_model(settings.model.path), settings.model.family_reference).actions
        return cls(expectation(settings, actions), settings.training.critic_warmup_iterations)

    def take(self, iteration: int, numbers: Mapping[str, Any]) -> dict[str, Any] | None:
        """Judge an iteration, counted from 1, by what its learners logged.

        Returns:
            `failed`, the checks that failed now, and `told`, a line for a person; None where there is nothing to tell
            and nothing failed, or nothing to judge on.

        Raises:
            SelfTestError: the gap is so large that nothing can be learned.
        """
        if not numbers["logprob_gap_samples"]:  # every decision came from a policy that is behind
            return None
        judgement = judge(numbers, self._expected)
        when = self._occasion(iteration, numbers)
        line = f"self-test{f', iteration {iteration}' if when is None else when}: {judgement.numbers}: "
        if judgement.failed:
            line += f"FAILED ({', '.join(judgement.failed)}); {self._remedy(judgement.failed)}"
            if judgement.hopeless:
                raise SelfTestError(line)
        else:
            line += "ok"
        new = set(judgement.failed) - self._told_failures
        self._told_failures |= new
        self._gap_was_fine |= GAP not in judgement.failed
        if new:
            logger.warning("%s", line)
        if not judgement.failed and when is None:
            return None
        return {"failed": list(judgement.failed), "told": line if new or when is not None else None}

    def _occasion(self, iteration: int, numbers: Mapping[str, Any]) -> str | None:
        """Why this one is told whatever it says: the first, and the first whose weights an update has changed."""
        occasion = None
        if not self._told_first:
            self._told_first, occasion = True, ""
        elif self._updated and not self._told_updated:
            self._told_updated, occasion = True, " of updated weights"
        moved = numbers["applied_lr"] > 0 and numbers["optimizer_steps"] > numbers["skipped_updates"]
        self._updated |= bool(iteration > self._warm_up and moved)
        return occasion

    def _remedy(self, failed: tuple[str, ...]) -> str:
        if GAP in failed and self._gap_was_fine:
            return (
                "the sampler does not have the learner's newest weights: set weights.checksum: true to compare what is "
                "sent with what arrives, or another weights.transport"
            )
        if GAP in failed:
            return f"sampler and learner disagree about the same tokens: {self._expected.about_gap}"
        if RATIO in failed or self._expected.recompute:
            return f"the learner disagrees with itself about the same tokens: {self._expected.about_ratio}"
        return "set training.old_log_probs: recompute, which takes the sampler's rounding out of the ratio"
