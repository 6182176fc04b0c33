"""The sections and keys of the settings: types, ranges, descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.plan import chosen_tasks, impossible_combinations
from vlarl_rllib.published import absolute_path, absolute_unless_name, published_model
from vlarl_rllib.registry import ENVIRONMENTS, environments
from vlarl_rllib.settings import messages
from vlarl_rllib.settings.overrides import apply_override
from vlarl_rllib.settings.yaml_text import read_yaml
from vlarl_rllib.signals import STOP_SECONDS

NOT_YET = {
    "rollout.async_mode": False,
    "rollout.max_staleness": 1,
}
"""Keys of the documented layout that have one possible value so far: accepted at that value, refused at any other."""

PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
Natural = Annotated[int, Field(ge=0, le=1_000_000_000)]
Processes = Annotated[int, Field(ge=1, le=1024)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
"""What a float32 can be compared with."""
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
"""Of a term of the loss or the reward, which are float32."""
LearningRate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0.01, le=1e6, allow_inf_nan=False)]
"""The system's own time-outs are milliseconds in 32 bits: 24 days."""
CPUs = Annotated[float, Field(ge=0, le=4096, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DType = Literal["float32", "bfloat16"]
DirectoryPath = Annotated[str, Field(min_length=1), AfterValidator(absolute_path)]
ModelPath = Annotated[str, Field(min_length=1), AfterValidator(absolute_unless_name)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False, validate_default=True, frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, no, on and off as truth values, which pydantic would take for 1 and 0."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        items = value if isinstance(value, list) else [value]
        if bool not in (annotation, *get_args(annotation)) and any(isinstance(item, bool) for item in items):
            raise ValueError("true and false are no value of this key")
        return value


class LoraSettings(Section):
    rank: Annotated[int, Field(ge=1, le=4096)] = Field(32, description="Rank of the adapters.")
    alpha: PositiveInt | None = Field(None, description="The update is scaled by alpha / rank; null = the rank, at most 16.")
    targets: Literal["published", "frozen_vision", "language_model"] | Annotated[list[str], Field(min_length=1)] = Field(
        "published",
        description="Adapted modules: published = all that OpenVLA's fine-tuning adapts; frozen_vision = projector, language model and head; "
        "language_model = its decoder layers; or a list of module names such as [q_proj, v_proj].",
    )
    adapter: DirectoryPath | None = Field(
        None, description="Directory of a PEFT adapter to train on; rank, alpha and targets are its own then. null = new adapters."
    )


class ModelSettings(Section):
    path: ModelPath = Field(
        "tiny", description="Preset name (tiny, small, mini), checkpoint directory (as all paths: relative to the working directory), or hub id."
    )
    unnorm_key: str | None = Field(
        None,
        min_length=1,
        description="Which entry of the checkpoint's norm_stats turns tokens into actions; null = a published checkpoint's own, else env.suite; "
        "env.name where there are no suites.",
    )
    center_crop: bool | None = Field(
        None, description="Crop 90 % of the frame's area, for checkpoints trained with image augmentation; null = true, but false for openvla-7b."
    )
    dtype: DType = Field(
        "float32", description="Compute type of the learner's forward and backward pass; trained weights are kept in float32 throughout."
    )
    lora: LoraSettings | None = Field(None, description="Train LoRA adapters only; null = train all weights.")
    quantization: Literal["8bit", "4bit"] | None = Field(
        None, description="Keep the language model's frozen weights in 8 or 4 bits (bitsandbytes), under model.lora; null = in model.dtype."
    )
    critic: Literal["shared_head", "separate"] = Field(
        "shared_head", description="shared_head = a value head on the policy's last prompt token; separate = on an OpenVLA of its own."
    )
    critic_path: ModelPath | None = Field(None, description="Checkpoint, preset or hub id that a separate critic starts from; null = model.path.")


class EnvSettings(Section):
    name: str = Field(
        "libero",
        description="libero; tabletop: a light MuJoCo environment with 18 tasks; synthetic: a numpy environment for tests and timing; "
        "or one that an installed package adds.",
    )
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = Field(
        "libero_spatial", description="LIBERO task suite."
    )
    tasks: Annotated[list[Natural], Field(min_length=1)] | PositiveInt | None = Field(
        [0], description="Tasks of the suite: a list of indices, or how many of the first; null = all. Runners and slots share them out."
    )
    num_envs: Processes = Field(4, description="Slots (independent episode streams) of each runner.")
    num_processes: Processes | None = Field(None, description="Subprocesses that share a runner's slots; null = cores, at most num_envs.")
    models_per_process: PositiveInt = Field(
        1, description="MuJoCo models a subprocess may hold; slots with the same task share one. See README for the memory of each."
    )
    max_steps: PositiveInt | None = Field(None, description="Steps after which an episode is cut off; null = the suite's published horizon.")
    timeout_seconds: Seconds = Field(600.0, description="A reset or step that takes longer ends its subprocess, which is then started anew.")
    max_resets_per_process: PositiveInt | None = Field(
        1000, description="Resets after which a subprocess is replaced, at the next checkpoint or evaluation; null = never."
    )
    fast_render: bool = Field(
        False, description="LIBERO without multisampling, shadows, reflections: 2-3 times faster on a CPU, but not what checkpoints were trained on."
    )

    @field_validator("name")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if name not in ENVIRONMENTS and name not in environments():
            raise ValueError(f"choose one of {', '.join(environments())}")
        return name


class RolloutSettings(Section):
    num_runners: Processes = Field(1, description="EnvRunner actors.")
    steps_per_iteration: Annotated[int, Field(ge=1, le=100_000)] = Field(
        128, description="Environment steps that each slot contributes to an iteration."
    )
    episodes_per_iteration: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="Whole episodes that each slot contributes to an iteration, in place of steps; null = steps_per_iteration."
    )
    group_size: PositiveInt = Field(1, description="So many of a slot's whole episodes, one after the other, have the same start: a group.")
    filter_groups: bool = Field(
        False, description="Leave out groups whose episodes all succeed or all fail: they do not say what made the difference (arXiv 2503.14476)."
    )
    temperature: PositiveFloat | None = Field(
        None,
        ge=0.01,
        le=2.0,
        description="Softmax temperature over the 256 action ids (vLLM: 0.01 to 2); null = 1.5 for the published LIBERO checkpoints, else 1.",
    )
    lockstep: bool | None = Field(
        None,
        description="true = half of a runner's slots wait for each other at each step: the engine gets large batches, the run repeats to the token; "
        "false = every slot runs its own loop; null = true for CPU engines, which share the cores with the environments, false for GPU engines.",
    )
    timeout_seconds: Seconds = Field(3600.0, description="A runner that takes longer for its part of an iteration is frozen and is started anew.")
    cpus_per_runner: CPUs = Field(1.0, description="CPUs that Ray reserves for each runner and its subprocesses.")

    @property
    def quota(self) -> int:
        """What each slot contributes to an iteration: whole episodes where they are set, else steps."""
        return self.episodes_per_iteration or self.steps_per_iteration


class EngineSettings(Section):
    num: Annotated[int, Field(ge=0, le=1024)] = Field(1, description="vLLM engine actors; 0 = sample with Hugging Face inside each runner.")
    gpus: NonNegativeFloat = Field(0.0, le=8.0, description="GPUs of each engine; a fraction shares a GPU, 0 = CPU.")
    cpus: CPUs = Field(1.0, description="CPUs that Ray reserves for each engine.")
    dtype: DType = Field("float32", description="Weights and compute type of the engine.")
    max_batch: Annotated[int, Field(ge=1, le=4096)] = Field(64, description="Sequences that an engine decodes at once.")
    enforce_eager: bool = Field(False, description="Do without CUDA graphs: starts faster, samples slower. CPU engines are always eager.")
    start_timeout_seconds: Seconds = Field(600.0, description="Longest wait for an engine to start.")
    request_timeout_seconds: Seconds = Field(120.0, description="Longest wait for one action before the engine counts as dead.")


class FSDPSettings(Section):
    mesh: tuple[int, int] = Field((1, -1), description="[replicas, shards] of the device mesh; one of them may be -1 = what is left.")
    cpu_offload: bool = Field(False, description="Keep parameters and optimiser state in host memory between uses.")
    min_unit_parameters: PositiveInt = Field(
        1_000_000, description="A vision tower, projector or decoder layer with fewer parameters is gathered and reduced with the rest of the model."
    )
    checkpoint_activations: bool = Field(False, description="Recompute activations in the backward pass: less memory, about a third more time.")


class LearnerSettings(Section):
    num: Annotated[int, Field(ge=0, le=1024)] = Field(1, description="Learner actors (FSDP ranks); 0 = learn inside the Algorithm's process.")
    gpus: NonNegativeFloat = Field(0.0, le=1.0, description="GPUs of each learner; a fraction shares a GPU, 0 = CPU.")
    cpus: CPUs = Field(1.0, description="CPUs that Ray reserves for each learner.")
    micro_batch_size: PositiveInt = Field(16, description="Steps in one forward and backward pass of a learner; gradients add up over a minibatch.")
    timeout_seconds: Seconds = Field(600.0, description="A collective or call that takes longer means that a learner is dead or frozen.")
    fsdp: FSDPSettings = FSDPSettings()


class TrainingSettings(Section):
    lr: LearningRate = Field(1e-5, description="AdamW learning rate of the policy.")
    value_lr: LearningRate = Field(1e-4, description="AdamW learning rate of the value head.")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.0, description="AdamW weight decay of the policy.")
    gamma: Fraction = Field(0.99, description="Discount factor; grpo and rloo sum up without one.")
    gae_lambda: Fraction = Field(0.95, description="Lambda of generalised advantage estimation (arXiv 1506.02438).")
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: PositiveFloat = Field(0.28, description="The ratio is clipped above at 1 + clip_high (clip-higher: DAPO, arXiv 2503.14476).")
    vf_clip: PositiveFloat | None = Field(0.2, description="Values move at most this far from the old ones in one update; null = no clipping.")
    vf_coeff: Weight = Field(0.5, description="Weight of the value loss.")
    entropy_coeff: Weight = Field(0.0, description="Weight of the entropy bonus.")
    kl_coeff: Weight = Field(0.0, description="Weight of the k3 estimate of KL(old, new).")
    grad_clip: PositiveFloat = Field(1.0, description="Largest global gradient norm.")
    minibatch_size: PositiveInt = Field(64, description="Steps per optimiser step, over all learners.")
    num_epochs: Annotated[int, Field(ge=1, le=1000)] = Field(1, description="Passes over an iteration's steps.")
    ratio: Literal["action", "token"] = Field("action", description="Importance ratio per action (product over its 7 tokens) or per token.")
    old_log_probs: Literal["behaviour", "recompute"] = Field(
        "behaviour",
        description="behaviour = the sampler's; recompute = the learner's before its first step, with truncated importance weights for the gap.",
    )
    importance_cap: PositiveFloat = Field(2.0, description="Cap of the importance weight learner/sampler under old_log_probs: recompute.")
    advantages: Literal["gae", "grpo", "rloo"] = Field(
        "gae",
        description="gae = from the critic; grpo, rloo = of whole episodes against their group (arXiv 2402.03300, 2402.14740), without a critic.",
    )
    normalize_advantages: bool = Field(
        True,
        description="Of gae: zero mean and unit variance over the iteration, on all learners; grpo and rloo stay as they are.",
    )
    whiten_rewards: bool = Field(
        False, description="Divide rewards by their standard deviation over all valid steps of the iteration; their mean is scaled along."
    )
    critic_warmup_iterations: Natural = Field(0, description="First iterations that train only the value head.")
    max_skipped_updates: Natural = Field(
        10, description="Optimiser steps in a row that may be skipped for a non-finite gradient before the run stops."
    )


class WeightSettings(Section):
    transport: Literal["auto", "shared_memory"] = Field("auto", description="How weights reach the engines; auto = shared_memory.")
    bucket_mb: PositiveInt = Field(256, description="Size of a bucket of tensors: the extra memory of a sync.")
    checksum: bool = Field(False, description="Verify a SHA-256 of every bucket on arrival.")


class RewardSettings(Section):
    success: float = Field(1.0, ge=-1e6, le=1e6, allow_inf_nan=False, description="Reward of the step that solves the task.")
    malformed: Weight = Field(0.0, description="Penalty of a reply that is not seven action tokens.")
    length: Weight = Field(0.0, description="Penalty of every step.")
    smoothness: Weight = Field(0.0, description="Penalty per mean squared change of the normalised arm action from step to step.")
    value_shaping: Weight = Field(0.0, description="Weight of gamma V(next) - V(now), the critic's own values as a potential (Ng et al. 1999).")
    process: Weight = Field(0.0, description="Weight of what a step adds to the score that rewards.judge gives the frame, in [0, 1].")
    judge: DirectoryPath | None = Field(
        None, description="Directory that vlarl reward-model wrote, or of a Hugging Face vision-language model; null = none."
    )
    judge_gpus: NonNegativeFloat = Field(0.0, le=1.0, description="GPUs of the judge's worker; a fraction shares a GPU, 0 = CPU.")
    judge_cpus: CPUs = Field(1.0, gt=0, description="CPUs that Ray reserves for the judge's worker.")
    judge_cpu_copy: bool | None = Field(
        None, description="Each runner judges by itself, on the CPU, while the worker fails; null = a classifier yes, a vision-language model no."
    )
    timeout_seconds: Seconds = Field(10.0, description="A reward that takes longer for a chunk of an episode counts as failed: zero.")


class CurriculumSettings(Section):
    kind: Literal["fixed", "adaptive"] = Field(
        "fixed", description="fixed = each slot keeps its task and draws starts uniformly; adaptive = (task, start) by how often it succeeds."
    )
    rule: Literal["logistic", "power"] = Field(
        "logistic", description="Weight of a start with success rate s: exp((0.5 - s) / temperature), or (1 - s)^(1 / temperature)."
    )
    temperature: PositiveFloat = Field(0.5, ge=0.01, description="Of the rule; smaller = more of the hard starts.")
    starts_per_task: PositiveInt | None = Field(None, description="Train on so many of each task's training starts, the first; null = all.")


class EvaluationSettings(Section):
    every: Natural = Field(0, description="Iterations between greedy evaluations; 0 = before the first and after the last.")
    episodes: Natural = Field(64, description="Episodes of an evaluation on held-out starts, at most one per (task, start); 0 = none.")
    videos: Natural = Field(2, description="Films of each evaluation: of its first episodes, in RUN/videos.")


class CollectSettings(Section):
    episodes: PositiveInt = Field(100, description="Successful demonstrations that `vlarl collect` keeps, the tasks in turn.")
    noise: NonNegativeFloat = Field(
        0.0,
        le=10,
        description="Standard deviation of what pushes the arm off the expert's way, in full actions; what is recorded is the expert's answer.",
    )
    paces: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = Field(
        [1.0], description="Shares of full speed; each episode is played at one of them, drawn at random (tabletop). Twice = twice as often."
    )
    tasks: Annotated[list[Natural], Field(min_length=1)] | PositiveInt | Literal["all"] | None = Field(
        None, description="Tasks that are shown: as env.tasks, or all; null = those of env.tasks."
    )
    max_steps: PositiveInt | None = Field(None, description="Demonstrations that take longer are not kept; null = as in training.")
    image_size: Annotated[int, Field(ge=16, le=2048)] | None = Field(
        None, description="Side of the frames in pixels; null = what model.path sees, so that none is resized."
    )


class SFTSettings(Section):
    data: DirectoryPath | None = Field(None, description="Directory of an RLDS data set for `vlarl sft`.")
    split: str = Field("train", min_length=1, description="TFDS split of it, also a part such as train[:95%].")
    steps: PositiveInt = Field(1000, description="Optimiser steps.")
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = Field(32, description="Demonstrated steps per optimiser step, over all learners.")
    lr: LearningRate = Field(5e-4, description="AdamW learning rate; OpenVLA's for LoRA on LIBERO, 2e-5 for all weights.")
    schedule: Literal["constant", "cosine"] = Field("constant", description="Of the learning rate: as OpenVLA's, or falling to 0 over sft.steps.")
    warmup_steps: Natural = Field(0, description="First steps, over which the learning rate rises from 0.")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.0, description="AdamW weight decay.")
    augment: bool = Field(True, description="OpenVLA's image augmentation: crops, brightness, contrast, saturation, hue.")
    report_every: PositiveInt = Field(50, description="Optimiser steps between two lines of progress.")
    checkpoint_every: PositiveInt | None = Field(
        1000,
        description="Optimiser steps between checkpoints, to resume from: what is trained and AdamW's state, in float32; there is one at the end "
        "too, and the newest run.keep_checkpoints are kept. null = none.",
    )


class RunSettings(Section):
    iterations: PositiveInt = Field(10, description="Iterations to train.")
    checkpoint_every: PositiveInt = Field(5, description="Iterations between checkpoints; there is always one at the end.")
    max_restarts: Natural = Field(
        3, description="Restarts of a failed run from its newest checkpoint, with no new iteration in between, before it is given up."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints to keep.")
    stop_seconds: PositiveFloat = Field(
        STOP_SECONDS,
        description="How long an end may take after Ctrl-C or SIGTERM: an update that runs is finished and a checkpoint written, or the newest "
        "one has to do. 25 fits the 30 s of Kubernetes and Slurm; give a large policy as long as an update and a checkpoint take.",
    )
    seed: Natural = Field(0, description="Seeds the model's fresh parts, the environments, sampling and the minibatches.")
    wandb: str | None = Field(None, min_length=1, description="Weights & Biases project; null = not logged there.")
    dashboard: bool = Field(True, description="Start Ray's dashboard with a Ray that vlarl starts itself.")


class Settings(Section):
    """All sections. Build it with `from_yaml` or `from_dict`."""

    model: ModelSettings = ModelSettings()
    env: EnvSettings = EnvSettings()
    rollout: RolloutSettings = RolloutSettings()
    engines: EngineSettings = EngineSettings()
    learners: LearnerSettings = LearnerSettings()
    training: TrainingSettings = TrainingSettings()
    weights: WeightSettings = WeightSettings()
    rewards: RewardSettings = RewardSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    collect: CollectSettings = CollectSettings()
    sft: SFTSettings = SFTSettings()
    run: RunSettings = RunSettings()

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Settings:
        """Read a YAML file and apply `a.b=value` overrides (values are YAML). Raises `SettingsError`."""
        values = read_yaml(path)
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: holds {type(values).__name__}, must hold sections such as `model:`")
        for override in overrides:
            apply_override(values, override)
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Validate a nested mapping. Raises `SettingsError`."""
        try:
            return cls.model_validate(_without_reserved(values))
        except ValidationError as error:
            raise SettingsError(messages.one_line(error, Settings)) from None

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def replaced(self, **sections: Mapping[str, Any]) -> Settings:
        """A copy with other values for some keys of some sections. Raises `SettingsError`."""
        values = self.to_dict()
        return Settings.from_dict(values | {name: values[name] | dict(changes) for name, changes in sections.items()})

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        for problem in impossible_combinations(self):
            raise ValueError(problem)
        return self

    @property
    def task_ids(self) -> list[int]:
        """The tasks of the run, in the order given."""
        return chosen_tasks(self.env.tasks, self.env)

    @property
    def lockstep(self) -> bool:
        """`rollout.lockstep`, or what it is by default."""
        return not self.engines.gpus if self.rollout.lockstep is None else self.rollout.lockstep

    @property
    def unnorm_key(self) -> str:
        """`model.unnorm_key`, or what it is by default."""
        published = published_model(self.model.path)
        return self.model.unnorm_key or (published.unnorm_key if published else default_statistics(self.env.name, self.env.suite))

    @property
    def center_crop(self) -> bool:
        """`model.center_crop`, or what it is by default."""
        if self.model.center_crop is not None:
            return self.model.center_crop
        published = published_model(self.model.path)
        return published.center_crop if published else True

    @property
    def temperature(self) -> float:
        """`rollout.temperature`, or what it is by default."""
        published = published_model(self.model.path)
        return self.rollout.temperature or (published.temperature if published else 1.0)


def default_statistics(env: str, suite: str) -> str:
    """Name of the action statistics that fit an environment: the suite's, or its own; `synthetic` makes do with any suite's."""
    return suite if env in ("libero", "synthetic") else env


def _without_reserved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the keys of `NOT_YET` at their only value; raise at any other."""
    result = {section: dict(keys) if isinstance(keys, Mapping) else keys for section, keys in values.items()}
    for dotted, only in NOT_YET.items():
        section, key = dotted.split(".")
        keys = result.get(section)
        if isinstance(keys, dict) and key in keys and (value := keys.pop(key)) != only:
            raise SettingsError(f"{dotted}: {value!r} is not available yet; leave the key out or set it to {str(only).lower()}")
    return result


def known_keys() -> dict[str, str]:
    """Every dotted key with its description, in file order."""
    return messages.known_keys(Settings)
