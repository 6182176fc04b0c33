"""VLAPPO as an RLlib Algorithm under Ray Tune."""

from vlarl_rllib.algorithm.vlappo import VLAPPO

__all__ = ["VLAPPO"]
