"""Demonstrations: RLDS data sets in OpenVLA's LIBERO schema, read and written."""

from __future__ import annotations

from vlarl_rllib.data.rlds import RLDSDataset, read_statistics
from vlarl_rllib.data.rlds_writer import Demonstration, RLDSWriter

__all__ = ["Demonstration", "RLDSDataset", "RLDSWriter", "read_statistics"]
