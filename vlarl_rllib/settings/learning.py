"""The sections that say what is learned: updates, rewards, curriculum, fine-tuning on demonstrations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlarl_rllib.settings.fields import (
    CPUs,
    DirectoryPath,
    Fraction,
    LearningRate,
    Natural,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
    Weight,
)


class TrainingSettings(Section):
    lr: LearningRate = Field(1e-5, description="AdamW learning rate of the policy.")
    value_lr: LearningRate = Field(1e-4, description="AdamW learning rate of the value head.")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.0, description="AdamW weight decay of the policy.")
    gamma: Fraction = Field(0.99, description="Discount factor; grpo and rloo sum up without one.")
    gae_lambda: Fraction = Field(0.95, description="Lambda of generalised advantage estimation (arXiv 1506.02438).")
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="The ratio is clipped below at 1 - clip_low."
    )
    clip_high: PositiveFloat = Field(
        0.28, description="The ratio is clipped above at 1 + clip_high (clip-higher: DAPO, arXiv 2503.14476)."
    )
    vf_clip: PositiveFloat | None = Field(
        0.2, description="Values move at most this far from the old ones in one update; null = no clipping."
    )
    vf_coeff: Weight = Field(0.5, description="Weight of the value loss.")
    entropy_coeff: Weight = Field(0.0, description="Weight of the entropy bonus.")
    kl_coeff: Weight = Field(0.0, description="Weight of the k3 estimate of KL(old, new).")
    grad_clip: PositiveFloat = Field(1.0, description="Largest global gradient norm.")
    minibatch_size: PositiveInt = Field(64, description="Decisions per optimiser step, over all learners.")
    num_epochs: Annotated[int, Field(ge=1, le=1000)] = Field(1, description="Passes over an iteration's steps.")
    ratio: Literal["decision", "action", "token"] = Field(
        "action",
        description="Importance ratio per action (product over its tokens), per token, or per decision (over all "
        "that were played: where a decision is one action, the same as action).",
    )
    old_log_probs: Literal["behaviour", "recompute"] = Field(
        "behaviour",
        description="behaviour = the sampler's; recompute = the learner's before its first step, with truncated "
        "importance "
        "weights for the gap.",
    )
    importance_cap: PositiveFloat = Field(
        2.0, description="Cap of the importance weight learner/sampler under old_log_probs: recompute."
    )
    values: Literal["learner", "engine"] = Field(
        "learner",
        description="Of gae: learner = from a pass over all frames before the update; engine = from the engines, which "
        "then evaluate the value head while they sample.",
    )
    advantages: Literal["gae", "grpo", "rloo"] = Field(
        "gae",
        description="gae = from the critic; grpo, rloo = of whole episodes against their group (arXiv 2402.03300, "
        "2402.14740), without a critic.",
    )
    normalize_advantages: bool = Field(
        True,
        description="Of gae: zero mean and unit variance over the iteration, on all learners; grpo and rloo stay as "
        "they are.",
    )
    whiten_rewards: bool = Field(
        False,
        description="Divide rewards by their standard deviation over all valid steps of the iteration; their mean is "
        "scaled "
        "along.",
    )
    critic_warmup_iterations: Natural = Field(0, description="First iterations that train only the value head.")
    max_skipped_updates: Natural = Field(
        10, description="Optimiser steps in a row that may be skipped for a non-finite gradient before the run stops."
    )

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates by their keys."""
        return {"training.lr": self.lr, "training.value_lr": self.value_lr}

    @property
    def scores_all(self) -> bool:
        """Whether an update needs the learner's values or log-probs of every decision from before it."""
        return (self.advantages == "gae" and self.values == "learner") or self.old_log_probs == "recompute"


class RewardSettings(Section):
    success: float = Field(
        1.0, ge=-1e6, le=1e6, allow_inf_nan=False, description="Reward of the step that solves the task."
    )
    malformed: Weight = Field(0.0, description="Penalty of a reply that is not action tokens alone.")
    length: Weight = Field(0.0, description="Penalty of every environment step.")
    smoothness: Weight = Field(
        0.0, description="Penalty per mean squared change of the normalised arm action from step to step."
    )
    value_shaping: Weight = Field(
        0.0, description="Weight of gamma V(next) - V(now), the critic's own values as a potential (Ng et al. 1999)."
    )
    process: Weight = Field(
        0.0, description="Weight of what a step adds to the score that rewards.judge gives the frame, in [0, 1]."
    )
    others: dict[str, Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]] = Field(
        {}, description="Weights of further rewards, by the name that an installed package gives one, or module:Class."
    )
    judge: DirectoryPath | None = Field(
        None,
        description="Directory that vlarl reward-model wrote, or of a Hugging Face vision-language model; null = none.",
    )
    judge_gpus: NonNegativeFloat = Field(
        0.0, le=1.0, description="GPUs of the judge's worker; a fraction shares a GPU, 0 = CPU."
    )
    judge_cpus: CPUs = Field(1.0, gt=0, description="CPUs that Ray reserves for the judge's worker.")
    judge_cpu_copy: bool | None = Field(
        None,
        description="Each runner judges by itself, on the CPU, while the worker fails; null = a classifier yes, a "
        "vision-language model no.",
    )
    timeout_seconds: Seconds = Field(
        10.0, description="A reward that takes longer for a fragment of an episode counts as failed: zero."
    )


class CurriculumSettings(Section):
    kind: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="fixed = each slot keeps its task and draws starts uniformly; adaptive = (task, start) by how "
        "often it "
        "succeeds.",
    )
    rule: Literal["logistic", "power"] = Field(
        "logistic",
        description="Weight of a start with success rate s: exp((0.5 - s) / temperature), or (1 - s)^(1 / "
        "temperature).",
    )
    temperature: PositiveFloat = Field(0.5, ge=0.01, description="Of the rule; smaller = more of the hard starts.")
    starts_per_task: PositiveInt | None = Field(
        None, description="Train on so many of each task's training starts, the first; null = all."
    )


class SFTSettings(Section):
    data: DirectoryPath | None = Field(None, description="Directory of an RLDS data set for `vlarl sft`.")
    split: str = Field("train", min_length=1, description="TFDS split of it, also a part such as train[:95%].")
    steps: PositiveInt = Field(1000, description="Optimiser steps.")
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = Field(
        32, description="Demonstrated steps per optimiser step, over all learners."
    )
    lr: LearningRate = Field(
        5e-4, description="AdamW learning rate; OpenVLA's for LoRA on LIBERO, 2e-5 for all weights."
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="Of the learning rate: as OpenVLA's, or falling to 0 over sft.steps."
    )
    warmup_steps: Natural = Field(0, description="First steps, over which the learning rate rises from 0.")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.0, description="AdamW weight decay.")
    augment: bool = Field(
        True, description="OpenVLA's image augmentation: crops, brightness, contrast, saturation, hue."
    )
    frames_gb: Annotated[float, Field(ge=0, le=1e4, allow_inf_nan=False)] | None = Field(
        None,
        description="Memory for frames that were decoded and resized, beside each learner's policy: where all of its "
        "share fit, none is decoded twice. null = a tenth of its GPU, or 1 without one; 0 = keep none.",
    )
    report_every: PositiveInt = Field(50, description="Optimiser steps between two lines of progress.")
    checkpoint_every: PositiveInt | None = Field(
        1000,
        description="Optimiser steps between checkpoints, to resume from: what is trained and AdamW's state, in "
        "float32; "
        "there is one at the end "
        "too, and the newest run.keep_checkpoints are kept. null = none.",
    )
