"""Where the weights of OpenVLA-OFT's own parts lie beside a checkpoint. Importing this loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ACTION_HEAD, PROPRIO_PROJECTOR = "action_head", "proprio_projector"
"""Names of the parts, as modules and at the beginning of their files' names."""
PATTERN = "{name}--*checkpoint.pt"
"""The step is in the middle, or `latest`."""


def component_file(checkpoint: str, name: str, **hub_options: Any) -> Path | None:
    """The one file of a part in a directory or hub id; None where there is none. Raises ValueError: there are more."""
    folder = Path(checkpoint)
    pattern = PATTERN.format(name=name)
    if not folder.is_dir():
        folder = _fetched(checkpoint, pattern, **hub_options)
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise ValueError(f"{checkpoint} has {len(found)} files {pattern}, from {found[0].name} on; leave one of them")
    return found[0] if found else None


def _fetched(hub_id: str, pattern: str, **hub_options: Any) -> Path:
    """The snapshot with the files of a pattern, whose names contain a step that nobody knows beforehand."""
    from huggingface_hub import snapshot_download

    hub_options.pop("force_download", None)  # of the weights, which are not fetched here
    return Path(snapshot_download(hub_id, allow_patterns=pattern, **hub_options))
