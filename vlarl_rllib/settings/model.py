"""The section `model`: the policy, its adapters, its critic."""

from __future__ import annotations

import json
from typing import Annotated, Literal
from urllib.parse import urlencode

from pydantic import Field

from vlarl_rllib.settings.fields import DirectoryPath, DType, ModelPath, PositiveInt, Section


class LoraSettings(Section):
    rank: Annotated[int, Field(ge=1, le=4096)] = Field(32, description="Rank of the adapters.")
    alpha: PositiveInt | None = Field(
        None, description="The update is scaled by alpha / rank; null = the rank, at most 16."
    )
    targets: str | Annotated[list[str], Field(min_length=1)] = Field(
        "published",
        description="Adapted modules, by a word of the policy's family: published = all that OpenVLA's fine-tuning "
        "adapts; frozen_vision = "
        "projector, "
        "language model and head; "
        "language_model = its decoder layers; or a list of module names such as [q_proj, v_proj].",
    )
    adapter: DirectoryPath | None = Field(
        None,
        description="Directory of a PEFT adapter to train on; rank, alpha and targets are its own then. null = new "
        "adapters.",
    )


class OFTSettings(Section):
    num_images: Literal[1, 2] | None = Field(
        None,
        description="1 = the main camera's; 2 = the wrist camera's too; null = as published, else what the checkpoint "
        "says, else 1.",
    )
    proprio: bool | None = Field(
        None, description="Whether it looks at the robot's own state; null = likewise, else false."
    )
    chunk: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="Actions of one pass; null = likewise, else 8."
    )
    stop_token: bool | None = Field(
        None,
        description="Whether the end of sequence stands behind the actions, as OpenVLA-OFT and SimpleVLA-RL train it "
        "(RLinf's own does not); null = likewise, else true.",
    )
    l1_head: bool | None = Field(
        None,
        description="Whether a head regresses the actions, which then cannot be sampled; null = whether there is one.",
    )


class ModelSettings(Section):
    path: ModelPath = Field(
        "tiny",
        description="Preset name (tiny, small, mini, tiny-oft, mini-oft), checkpoint directory (as all paths: relative "
        "to the working directory), or hub id.",
    )
    family: str | None = Field(
        None,
        min_length=1,
        description="Kind of policy: a name that the package or an installed one has, or module:Class; null = what the "
        "checkpoint's config.json says.",
    )
    oft: OFTSettings = OFTSettings()
    unnorm_key: str | None = Field(
        None,
        min_length=1,
        description="Which entry of the checkpoint's norm_stats turns tokens into actions; null = a published "
        "checkpoint's "
        "own, else env.suite; "
        "env.name where there are no suites.",
    )
    center_crop: bool | None = Field(
        None,
        description="Crop 90 % of the frame's area, for checkpoints trained with image augmentation; null = true, but "
        "false "
        "for openvla-7b.",
    )
    dtype: DType = Field(
        "float32",
        description="Compute type of the learner's forward and backward pass; trained weights are kept in float32 "
        "throughout.",
    )
    lora: LoraSettings | None = Field(None, description="Train LoRA adapters only; null = train all weights.")
    quantization: Literal["8bit", "4bit"] | None = Field(
        None,
        description="Keep the language model's frozen weights in 8 or 4 bits (bitsandbytes), under model.lora; "
        "null = in "
        "model.dtype.",
    )
    critic: Literal["shared_head", "separate"] = Field(
        "shared_head",
        description="shared_head = a value head on the policy's last prompt token; separate = on an OpenVLA of "
        "its own.",
    )
    critic_path: ModelPath | None = Field(
        None, description="Checkpoint, preset or hub id that a separate critic starts from; null = model.path."
    )

    @property
    def family_reference(self) -> str | None:
        """`family` and what `oft` says, as `models.family.family_name` takes it."""
        options = {name: json.dumps(value) for name, value in self.oft if value is not None}
        family = self.family or ""
        return f"{family}{'&' if '?' in family else '?'}{urlencode(options)}" if options else self.family
