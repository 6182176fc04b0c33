"""The `vlarl` command. Its commands import Ray and torch, so that `--help` and a mistake are answered at once."""

from vlarl_rllib.cli import bench, cluster, machine, policies, training, tuning  # each adds its commands
from vlarl_rllib.cli.app import app
from vlarl_rllib.process.command_line import run

__all__ = ["app", "bench", "cluster", "machine", "main", "policies", "training", "tuning"]


def main() -> None:
    """Entry point."""
    run(app)
