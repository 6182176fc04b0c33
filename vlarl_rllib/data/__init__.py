"""Demonstrations: RLDS data sets in OpenVLA's LIBERO schema, read and written."""

from __future__ import annotations

from vlarl_rllib.data.rlds import Demonstration, RLDSDataset, RLDSWriter, read_statistics

__all__ = ["Demonstration", "RLDSDataset", "RLDSWriter", "read_statistics"]
