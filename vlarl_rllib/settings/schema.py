"""The sections and keys of the settings: types, ranges, descriptions, and what a key that is left out means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vlarl_rllib.envs import registry
from vlarl_rllib.process.signals import STOP_SECONDS
from vlarl_rllib.settings.fields import (
    CPUs,
    DType,
    Natural,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Processes,
    Seconds,
    Section,
)
from vlarl_rllib.settings.learning import CurriculumSettings, RewardSettings, SFTSettings, TrainingSettings
from vlarl_rllib.settings.model import ModelSettings
from vlarl_rllib.settings.placement import PlacementSettings
from vlarl_rllib.settings.published import published_model
from vlarl_rllib.settings.transports import AUTO, transport_reference


class EnvSettings(Section):
    name: str = Field(
        registry.DEFAULT_ENVIRONMENT,
        description="libero; tabletop: a light MuJoCo environment with 18 tasks; synthetic: a numpy environment for "
        "tests "
        "and timing; "
        "or one that an installed package adds.",
    )
    suite: str = Field(registry.DEFAULT_SUITE, description="Task suite, for an environment that has several: LIBERO.")
    tasks: Annotated[list[Natural], Field(min_length=1)] | PositiveInt | None = Field(
        [0],
        description="Tasks of the suite: a list of indices, or how many of the first; null = all. Runners and slots "
        "share "
        "them out.",
    )
    num_envs: Processes = Field(4, description="Slots (independent episode streams) of each runner.")
    num_processes: Processes | None = Field(
        None, description="Subprocesses that share a runner's slots; null = cores, at most num_envs."
    )
    models_per_process: PositiveInt = Field(
        1,
        description="MuJoCo models a subprocess may hold; slots with the same task share one. The memory of each is in "
        "docs/measurements.md.",
    )
    max_steps: PositiveInt | None = Field(
        None, description="Environment steps after which an episode is cut off; null = the suite's published horizon."
    )
    timeout_seconds: Seconds = Field(
        600.0,
        description="A reset, or a decision's actions, that take longer end the subprocess; it is started anew.",
    )
    max_resets_per_process: PositiveInt | None = Field(
        1000,
        description="Resets after which a subprocess is replaced, at the next checkpoint or evaluation; null = never.",
    )
    fast_render: bool = Field(
        False,
        description="LIBERO without multisampling, shadows, reflections: 2-3 times faster on a CPU, but not what "
        "checkpoints "
        "were trained on.",
    )

    @property
    def label(self) -> str:
        """What to call the tasks: by their suite where there are several."""
        return registry.label(self.name, self.suite)

    @field_validator("name")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if name not in registry.environments():
            raise ValueError(f"choose one of {', '.join(registry.environments())}")
        return name


class RolloutSettings(Section):
    num_runners: Processes = Field(1, description="EnvRunner actors.")
    steps_per_iteration: Annotated[int, Field(ge=1, le=100_000)] = Field(
        128,
        description="Decisions that each slot contributes to an iteration: environment steps, where a decision is one "
        "action.",
    )
    episodes_per_iteration: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None,
        description="Whole episodes that each slot contributes to an iteration, in place of steps; null = "
        "steps_per_iteration.",
    )
    group_size: PositiveInt = Field(
        1, description="So many of a slot's whole episodes, one after the other, have the same start: a group."
    )
    filter_groups: bool = Field(
        False,
        description="Leave out groups whose episodes all succeed or all fail: they do not say what made the difference "
        "(arXiv 2503.14476).",
    )
    execute_actions: PositiveInt | None = Field(
        None,
        description="Actions of each decision that are played before the next one, from the first on; null = all.",
    )
    temperature: PositiveFloat | None = Field(
        None,
        ge=0.01,
        le=2.0,
        description="Softmax temperature over the action ids (vLLM: 0.01 to 2); null = 1.5 for the published "
        "LIBERO "
        "checkpoints, else 1.",
    )
    lockstep: bool | None = Field(
        None,
        description="true = half of a runner's slots wait for each other at each step: the engine gets large "
        "batches, the "
        "run repeats to the token; "
        "false = every slot runs its own loop; null = true for CPU engines, which share the cores with the "
        "environments, false for GPU engines.",
    )
    async_mode: bool = Field(
        False,
        description="Sample while the learners update, as far ahead as max_staleness allows. The run does not repeat "
        "then; training.old_log_probs must be recompute.",
    )
    max_staleness: Annotated[int, Field(ge=1, le=100)] = Field(
        1,
        description="Of async_mode: updates that the policy of a step may be behind the one that learns from it.",
    )
    timeout_seconds: Seconds = Field(
        3600.0, description="A runner that takes longer for its part of an iteration is frozen and is started anew."
    )
    cpus_per_runner: CPUs = Field(1.0, description="CPUs that Ray reserves for each runner and its subprocesses.")

    @property
    def quota(self) -> int:
        """What each slot contributes to an iteration: whole episodes where they are set, else steps."""
        return self.episodes_per_iteration or self.steps_per_iteration


class EngineSettings(Section):
    num: Annotated[int, Field(ge=0, le=1024)] = Field(
        1, description="vLLM engine actors; 0 = sample with Hugging Face inside each runner."
    )
    gpus: NonNegativeFloat = Field(0.0, le=8.0, description="GPUs of each engine; a fraction shares a GPU, 0 = CPU.")
    cpus: CPUs = Field(1.0, description="CPUs that Ray reserves for each engine.")
    dtype: DType = Field("float32", description="Weights and compute type of the engine.")
    quantization: Literal["fp8"] | None = Field(
        None,
        description="fp8 = the language model multiplies in 8-bit floats, scaled by tensor and token: faster on GPUs "
        "that have them, and further from the learner, which training.old_log_probs recompute corrects.",
    )
    max_batch: Annotated[int, Field(ge=1, le=4096)] = Field(
        64,
        description="Sequences that an engine decodes at once, at most: it makes room for its share of the slots.",
    )
    enforce_eager: bool = Field(
        False, description="Do without CUDA graphs: starts faster, samples slower. CPU engines are always eager."
    )
    start_timeout_seconds: Seconds = Field(600.0, description="Longest wait for an engine to start.")
    request_timeout_seconds: Seconds = Field(
        120.0, description="Longest wait for one action before the engine counts as dead."
    )


class FSDPSettings(Section):
    mesh: tuple[int, int] = Field(
        (1, -1), description="[replicas, shards] of the device mesh; one of them may be -1 = what is left."
    )
    cpu_offload: bool = Field(False, description="Keep parameters and optimiser state in host memory between uses.")
    min_unit_parameters: PositiveInt = Field(
        1_000_000,
        description="A vision tower, projector or decoder layer with fewer parameters is gathered and reduced with "
        "the rest "
        "of the model.",
    )
    checkpoint_activations: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )


class LearnerSettings(Section):
    num: Annotated[int, Field(ge=0, le=1024)] = Field(
        1, description="Learner actors (FSDP ranks); 0 = learn inside the Algorithm's process."
    )
    gpus: NonNegativeFloat = Field(0.0, le=1.0, description="GPUs of each learner; a fraction shares a GPU, 0 = CPU.")
    cpus: CPUs = Field(1.0, description="CPUs that Ray reserves for each learner.")
    micro_batch_size: PositiveInt = Field(
        16, description="Steps in one forward and backward pass of a learner; gradients add up over a minibatch."
    )
    timeout_seconds: Seconds = Field(
        600.0, description="A collective or call that takes longer means that a learner is dead or frozen."
    )
    compile: bool | None = Field(
        None,
        description="Compile the blocks of the model, for which the first passes of a run take long; null = on GPUs, "
        "unless cuda_graphs are used or model.quantization is set.",
    )
    activation_memory_budget: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1.0,
        description="Share of a compiled block's activations that is kept for the backward pass; what costs least is "
        "computed again.",
    )
    cuda_graphs: bool | None = Field(
        None,
        description="Record passes as CUDA graphs, where one learner holds the whole model on a GPU; null = there, up "
        "to 1e9 parameters.",
    )
    merge_ahead: bool | None = Field(
        None,
        description="Where one learner holds the whole model: merge adapters once for an optimiser step instead of in "
        "each pass, which takes as much memory again as the adapted weights; null = unless model.quantization is set.",
    )
    fsdp: FSDPSettings = FSDPSettings()


class WeightSettings(Section):
    transport: str = Field(AUTO, description="auto = by place; object_store, cuda_ipc, nixl, or what a package adds.")
    bucket_mb: PositiveInt = Field(256, description="Size of a bucket of tensors: two are the extra memory of a sync.")
    checksum: bool = Field(False, description="Verify a SHA-256 of every bucket on arrival.")

    @field_validator("transport")
    @classmethod
    def _is_transport(cls, name: str) -> str:
        transport_reference(name)
        return name


class EvaluationSettings(Section):
    every: Natural = Field(
        0, description="Iterations between greedy evaluations; 0 = before the first and after the last."
    )
    episodes: Natural = Field(
        64, description="Episodes of an evaluation on held-out starts, at most one per (task, start); 0 = none."
    )
    videos: Natural = Field(2, description="Films of each evaluation: of its first episodes, in RUN/videos.")


class CollectSettings(Section):
    episodes: PositiveInt = Field(
        100, description="Successful demonstrations that `vlarl collect` keeps, the tasks in turn."
    )
    noise: NonNegativeFloat = Field(
        0.0,
        le=10,
        description="Standard deviation of what pushes the arm off the expert's way, in full actions; what is "
        "recorded is "
        "the expert's answer.",
    )
    paces: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = Field(
        [1.0],
        description="Shares of full speed; each episode is played at one of them, drawn at random (tabletop). Twice = "
        "twice "
        "as often.",
    )
    tasks: Annotated[list[Natural], Field(min_length=1)] | PositiveInt | Literal["all"] | None = Field(
        None, description="Tasks that are shown: as env.tasks, or all; null = those of env.tasks."
    )
    max_steps: PositiveInt | None = Field(
        None, description="Demonstrations that take longer are not kept; null = as in training."
    )
    image_size: Annotated[int, Field(ge=16, le=2048)] | None = Field(
        None, description="Side of the frames in pixels; null = what model.path sees, so that none is resized."
    )


class RunSettings(Section):
    iterations: PositiveInt = Field(10, description="Iterations to train.")
    checkpoint_every: PositiveInt = Field(
        5, description="Iterations between checkpoints; there is always one at the end."
    )
    max_restarts: Natural = Field(
        3,
        description="Restarts of a failed run from its newest checkpoint, with no new iteration in between, before "
        "it is "
        "given up.",
    )
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints to keep.")
    stop_seconds: PositiveFloat = Field(
        STOP_SECONDS,
        description="How long an end may take after Ctrl-C or SIGTERM: an update that runs is finished and a "
        "checkpoint "
        "written, or the newest "
        "one has to do. 25 fits the 30 s of Kubernetes and Slurm; give a large policy as long as an update and a "
        "checkpoint take.",
    )
    seed: Natural = Field(
        0, description="Seeds the model's fresh parts, the environments, sampling and the minibatches."
    )
    wandb: str | None = Field(None, min_length=1, description="Weights & Biases project; null = not logged there.")
    dashboard: bool = Field(True, description="Start Ray's dashboard with a Ray that vlarl starts itself.")


class Sections(Section):
    """All sections, each key checked by itself; `load.Settings` are those that go together."""

    model: ModelSettings = ModelSettings()
    env: EnvSettings = EnvSettings()
    rollout: RolloutSettings = RolloutSettings()
    engines: EngineSettings = EngineSettings()
    learners: LearnerSettings = LearnerSettings()
    placement: PlacementSettings = PlacementSettings()
    training: TrainingSettings = TrainingSettings()
    weights: WeightSettings = WeightSettings()
    rewards: RewardSettings = RewardSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    collect: CollectSettings = CollectSettings()
    sft: SFTSettings = SFTSettings()
    run: RunSettings = RunSettings()

    @property
    def task_ids(self) -> list[int]:
        """The tasks of the run, in the order given."""
        return chosen_tasks(self.env.tasks, self.env)

    @property
    def lockstep(self) -> bool:
        """`rollout.lockstep`, or what it is by default."""
        return not self.engines.gpus if self.rollout.lockstep is None else self.rollout.lockstep

    @property
    def compiles(self) -> bool:
        """Whether learners that record no CUDA graphs compile: `learners.compile`, or what it is by default."""
        chosen = self.learners.compile
        # The compiler cannot look into what bitsandbytes makes weights of, and leaves little between two of them.
        return bool(self.learners.gpus) and self.model.quantization is None if chosen is None else chosen

    @property
    def merge_ahead(self) -> bool:
        """Whether a learner that holds the whole model keeps merged weights: `learners.merge_ahead`, or what it is by
        default."""
        if not self.model.lora or self.learners.num > 1 or self.learners.fsdp.cpu_offload:
            return False
        chosen = self.learners.merge_ahead
        return self.model.quantization is None if chosen is None else chosen

    @property
    def gamma_within_decisions(self) -> float:
        """Discount of the rewards within a decision: as between decisions, where there is one."""
        return self.training.gamma if self.training.advantages == "gae" else 1.0

    @property
    def unnorm_key(self) -> str:
        """`model.unnorm_key`, or what it is by default."""
        published = published_model(self.model.path)
        return self.model.unnorm_key or (
            published.unnorm_key if published else registry.default_statistics(self.env.name, self.env.suite)
        )

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


def chosen_tasks(tasks: Sequence[int] | int | None, env: EnvSettings) -> list[int]:
    """Task ids of a list, of a number of the first ones, or of None = all."""
    tasks = registry.num_tasks(env.suite, name=env.name) if tasks is None else tasks
    return list(range(tasks)) if isinstance(tasks, int) else list(tasks)
