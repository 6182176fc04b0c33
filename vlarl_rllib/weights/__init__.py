"""How policy weights travel from the learners to the engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlarl_rllib.settings import WeightSettings
    from vlarl_rllib.weights.protocol import WeightPublisher, WeightReader


def make_publisher(settings: WeightSettings, run_id: str = "run", version_bytes: int = 0) -> WeightPublisher:
    """The learner's end of the transport that the settings choose.

    Args:
        run_id: tells runs apart in a directory listing.
        version_bytes: size of one version where it is known, to find out now rather than later that there is no room.
    """
    from vlarl_rllib.weights.shared_memory import TRANSPORT, SharedMemoryPublisher

    publishers = {"auto": SharedMemoryPublisher, TRANSPORT: SharedMemoryPublisher}
    return publishers[settings.transport](
        run_id=run_id,
        bucket_bytes=settings.bucket_mb * 2**20,
        checksum=settings.checksum,
        version_bytes=version_bytes,
    )


def make_reader(transport: str) -> WeightReader:
    """The engine's end of `WeightManifest.transport`. Raises ValueError for a transport that does not exist."""
    from vlarl_rllib.weights.shared_memory import TRANSPORT, SharedMemoryReader

    if transport != TRANSPORT:
        raise ValueError(f"weights.transport={transport!r} is unknown; choose from: {TRANSPORT}")
    return SharedMemoryReader()
