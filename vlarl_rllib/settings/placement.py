"""The section `placement`: on which nodes of a cluster the actors of a run lie."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlarl_rllib.settings.fields import Section

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
ResourceName = Annotated[str, Field(min_length=1)]
Amount = Annotated[float, Field(ge=0.0001, le=1e15, allow_inf_nan=False, strict=True)]
"""Ray counts in ten-thousandths; memory is in bytes."""
MEMORY = "memory"
"""Ray's name for bytes of memory, which is no custom resource."""
LabelName = Annotated[str, Field(min_length=1)]


class RolePlacement(Section):
    resources: dict[ResourceName, Amount] = Field(
        {},
        description="What each of these actors reserves on its node beside CPUs and GPUs: custom resources that nodes "
        "were started with (ray start --resources), or memory in bytes.",
    )
    labels: dict[LabelName, str] = Field(
        {},
        description="Labels that their nodes must have (ray start --labels): key to A100, !A100, or in(A100, H100).",
    )


class PlacementSettings(Section):
    strategy: Strategy = Field(
        "PACK",
        description="PACK = on as few nodes as possible; SPREAD = on as many as possible; STRICT_PACK = on one node; "
        "STRICT_SPREAD = each actor on a node of its own.",
    )
    wait_for_nodes: bool = Field(
        False,
        description="Wait for nodes that the cluster has not got yet, since an autoscaler will bring them; false = a "
        "run that its nodes cannot hold is refused.",
    )
    algorithm: RolePlacement = RolePlacement()
    runners: RolePlacement = RolePlacement()
    learners: RolePlacement = RolePlacement()
    engines: RolePlacement = RolePlacement()
    reward_worker: RolePlacement = RolePlacement()
