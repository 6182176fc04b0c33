"""The robot's own state as OpenVLA-OFT sees it: position of the hand (3), its orientation as axis and angle (3), both
fingers (2). Importing this loads no torch.

N = states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlarl_rllib.models.openvla.actions import QUANTILE_EPSILON
from vlarl_rllib.models.statistics import check_quantiles

PROPRIO_SIZE = 8


def normalize_proprio(states: ArrayLike, statistics: Mapping[str, Any]) -> NDArray[np.float64]:
    """States [..., 8] in the data set's units -> within [-1, 1] by its 1 % and 99 % quantiles.

    To be done once: what is normalised twice still lies within the bounds.
    """
    low, high = (np.asarray(statistics[name], dtype=np.float64) for name in ("q01", "q99"))
    scaled = 2.0 * (np.asarray(states, dtype=np.float64) - low) / (high - low + QUANTILE_EPSILON) - 1.0
    return np.clip(scaled, -1.0, 1.0)


def proprio_statistics(norm_stats: Mapping[str, Any], unnorm_key: str, where: str) -> dict[str, Any]:
    """`q01` and `q99` of the states of a data set, checked; also found as `<key>_no_noops`.

    Raises ValueError, beginning with `where`: an unknown key, or statistics that scale no state.
    """
    for key in (unnorm_key, f"{unnorm_key}_no_noops"):
        if key in norm_stats:
            entry = norm_stats[key]
            statistics = entry.get("proprio") if isinstance(entry, Mapping) else None
            check_quantiles(statistics, f"{where}: {key}: proprio", PROPRIO_SIZE)
            assert isinstance(statistics, dict), "it was checked"
            return statistics
    raise ValueError(f"{where}: {unnorm_key!r} has no statistics; choose from {', '.join(sorted(norm_stats))}")
