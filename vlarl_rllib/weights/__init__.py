"""How policy weights travel from the learners to the engines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from vlarl_rllib.settings.transports import AUTO, DEFAULT_TRANSPORT, TRANSPORTS, transport_class

if TYPE_CHECKING:
    from vlarl_rllib.weights.protocol import WeightReader, WeightTransport

logger = logging.getLogger(__name__)


def find_transport(name: str) -> WeightTransport:
    """The transport that `weights.transport` or `WeightManifest.transport` names. Raises ValueError, one line."""
    try:
        found: type[WeightTransport] = transport_class(name)
    except ValueError as error:
        raise ValueError(f"weights.transport is {name!r}: {error}") from error
    return found(DEFAULT_TRANSPORT if name == AUTO else name)


def make_reader(transport: str) -> WeightReader:
    """The engine's end of `WeightManifest.transport`. Raises as `find_transport`."""
    return find_transport(transport).make_reader()


def sweeper(name: str) -> Callable[[], None]:
    """What removes from this machine the weights that dead processes have left: those of the transport of this name,
    and of the package's own.

    All that is imported for it is imported here, not when it is called. Raises as `find_transport`.
    """
    transports = {transport.name: transport for transport in map(find_transport, (*TRANSPORTS, name))}

    def sweep() -> None:
        for transport in transports.values():
            try:
                transport.sweep()
            except Exception:  # somebody else's transport may raise anything, and the end of a command goes on
                logger.exception("what is left of transport %s could not be swept up", transport.name)

    return sweep
