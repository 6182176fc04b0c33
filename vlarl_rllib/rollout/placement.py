"""Whether the places that a trial was given are those of its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray
from ray.tune import PlacementGroupFactory

from vlarl_rllib.ray_compat import nodes_of_bundles
from vlarl_rllib.settings import RuntimeArgs, SettingsError


def places(plan: RuntimeArgs) -> PlacementGroupFactory:
    """What Tune is to ask Ray for: the plan's bundles on nodes with their labels."""
    labels = [bundle.labels for bundle in plan.bundles]
    selectors = {"bundle_label_selector": labels} if any(labels) else {}
    return PlacementGroupFactory([bundle.resources for bundle in plan.bundles], plan.strategy, **selectors)


def check_placement(plan: RuntimeArgs) -> None:
    """Raise `SettingsError` where the current placement group, such as `tune.with_resources` asks for, has no place for
    one of the plan's actors. Without a group there is nothing to check."""
    group = ray.util.get_current_placement_group()
    if group is not None:
        check_bundles(plan, group.bundle_specs)


def check_bundles(plan: RuntimeArgs, given: Sequence[Mapping[str, float]]) -> None:
    """See `check_placement`. Bundles behind those of the plan may be anything."""
    needed = [bundle.resources for bundle in plan.bundles]
    for place, bundle in enumerate(plan.bundles):
        there = given[place] if place < len(given) else {}
        if any(there.get(kind, 0.0) < amount for kind, amount in bundle.resources.items()):
            raise SettingsError(
                f"tune.with_resources: bundle {place} is {dict(there)}, but the {bundle.role.value} there needs "
                f"{bundle.resources}; give tune.PlacementGroupFactory({needed}) or more of each, or leave it out"
            )


class NodesInUse:
    """Counts the nodes of the current placement group that die."""

    def __init__(self) -> None:
        self._known = self._now()

    def take_losses(self) -> int:
        """How many have died since the last call."""
        known, self._known = self._known, self._now()
        return len(known - self._known)

    def _now(self) -> set[str]:
        return {node for node in nodes_of_bundles().values() if node}
