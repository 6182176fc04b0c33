"""What lies beneath the public surface of Ray about the nodes of a cluster, in one place: what to look at when Ray
changes (2.60)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlarl_rllib.errors import one_line


def label_mistake(selectors: Sequence[Mapping[str, str]]) -> str | None:
    """What Ray has against these selectors of node labels, one mapping for each bundle."""
    from ray.util.placement_group import _validate_bundle_label_selector

    try:
        _validate_bundle_label_selector([dict(selector) for selector in selectors])
    except ValueError as error:
        return one_line(error)
    return None
