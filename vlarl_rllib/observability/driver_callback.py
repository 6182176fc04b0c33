"""What the callbacks of a command have in common."""

from __future__ import annotations

from typing import Any

from ray.tune import Callback


class DriverCallback(Callback):
    """One that belongs to this process: its terminal, its signals, its files.

    Tune pickles its callbacks for `Tuner.restore`, where a command brings new ones.
    """

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a console cannot be pickled."""
        return {}
