"""Which weights the engines have, and who sees to it: the one that sees both ends.

sync = WeightSync(learner_group, engine_pool, version=0)
sync.push()                     # behind each update: the next version, in all engines
sync.make_engines_current()     # before sampling: dead engines replaced, the newest version in them
"""

from __future__ import annotations

from typing import Any, Protocol

from vlarl_rllib.types import INITIAL_VERSION, WeightManifest
from vlarl_rllib.weights.protocol import VersionGoneError


class Publishers(Protocol):
    """The learners, as far as weights go."""

    def publish_weights(self, version: int) -> WeightManifest:
        """Make the current weights readable as `version`."""
        ...

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call `retire_weights` on every rank."""
        ...


class Takers(Protocol):
    """The engines, as far as weights go."""

    def load_weights(self, manifest: WeightManifest) -> Any:
        """Load this version into all of them."""
        ...

    def ensure_current(self, manifest: WeightManifest | None) -> Any:
        """Replace dead ones and load this version into those that have another; None = what they loaded when they
        started."""
        ...


class EngineWeights(Protocol):
    """Which weights the engines are to have."""

    version: int
    manifest: WeightManifest | None
    """None where that is the checkpoint that the engines loaded when they started."""

    def make_engines_current(self) -> None:
        """Replace dead engines and see that all have the version."""
        ...


class LoadedWeights:
    """For engines that serve what they loaded when they started. See `EngineWeights`."""

    def __init__(self, pool: Takers | None) -> None:
        self.version = INITIAL_VERSION
        self.manifest: WeightManifest | None = None
        self._pool = pool

    def make_engines_current(self) -> None:
        if self._pool is not None:
            self._pool.ensure_current(None)


class WeightSync:
    """Pushes the learners' weights to the engines and counts the pushes.

    The counter is the policy version: it never repeats or decreases, also after a resume. The newest full version stays
    readable until the next one is committed, so that an engine restarted in between loads it without the learners.

    Args:
        version: the newest one that has been used, 0 = none yet.
    """

    def __init__(self, learners: Publishers, pool: Takers | None, version: int) -> None:
        self.version = version
        self.manifest: WeightManifest | None = None
        self._learners, self._pool = learners, pool

    def push(self, *, above: int = 0) -> WeightManifest:
        """Publish the current weights as the next version, which is also greater than `above`, and load them
        everywhere.

        A version that goes before all engines have it is published once more; where its learner has died, that call
        raises what a lost learner raises.
        """
        try:
            manifest = self._publish_and_load(above)
        except VersionGoneError:
            manifest = self._publish_and_load()
        self.manifest = manifest
        self._learners.call("retire_weights", self.version)
        return manifest

    def _publish_and_load(self, above: int = 0) -> WeightManifest:
        self.version = max(self.version, above) + 1
        manifest = self._learners.publish_weights(self.version)
        if self._pool is not None:
            self._pool.load_weights(manifest)
        return manifest

    def make_engines_current(self) -> None:
        """Replace dead engines and load the newest version into them; where that is gone, publish the weights anew."""
        assert self.manifest is not None, "push() comes first"
        if self._pool is None:
            return
        try:
            self._pool.ensure_current(self.manifest)
        except VersionGoneError:
            self.push()
