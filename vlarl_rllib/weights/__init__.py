"""How policy weights travel from the learners to the engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlarl_rllib.settings.transports import transport_class

if TYPE_CHECKING:
    from vlarl_rllib.weights.protocol import WeightTransport


def find_transport(name: str) -> WeightTransport:
    """The transport that `WeightManifest.transport` names. Raises ValueError, one line."""
    try:
        found: type[WeightTransport] = transport_class(name)
    except ValueError as error:
        raise ValueError(f"weights.transport is {name!r}: {error}") from error
    return found(name)
