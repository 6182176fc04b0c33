"""What travels between the parts, with shapes. Nothing here imports torch, Ray or vLLM.

Letters: K = actions of a decision, A = its tokens, S = side of the policy's square input image in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ACTION_SIZE = 7
"""Numbers of an environment's action: position and rotation deltas of the arm, and its gripper."""

INSTRUCTION_KEY = "instruction"
"""Where a rollout keeps the task's instruction in `episode.custom_data`."""
LOG_PROBS_KEY = "token_log_probs"
"""Extra model output [A]: the sampler's log-probabilities of the action tokens."""
VALUE_KEY = "vf_preds"
"""Extra model output: the sampler's value of the frame, where it is asked for; RLlib's `Columns.VF_PREDS`."""
STEP_REWARDS_KEY = "step_rewards"
"""Extra model output [K] float32: the environment's reward of each action; 0 for those that were not played."""
VERSION_KEY = "policy_version"
"""Extra model output: version of the weights that made the decision."""
DURATION_KEY = "duration"
"""Extra model output: actions of the decision that were played, in environment steps."""


@dataclass(frozen=True)
class EnvSpec:
    """What a process must know to build an environment."""

    name: str
    """Short name from `envs.registry.ENVIRONMENTS`, or `module:Class`."""
    suite: str = ""
    """Task suite; environments with a single suite ignore it."""
    image_size: int = 224
    """Side of the policy's square image in pixels."""
    center_crop: bool = True
    """Keep the central 90 % of the area, for checkpoints trained with image augmentation."""
    max_steps: int | None = None
    """Policy steps after which an episode is cut off; None = the suite's published horizon."""
    fast_render: bool = False
    """No multisampling, shadows or reflections: several times faster in software, but not the pictures that checkpoints
    were trained on.
    """
    camera_size: int = 256
    """Side of the rendered image in pixels, before the observation path; OpenVLA's evaluation uses 256."""
    render_device: int = 0
    """Which of the machine's GPUs renders, modulo their number; no meaning in software rendering."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where an episode begins."""

    task_id: int
    initial_state: int
    """Index into the task's published initial states."""
    seed: int
    """Seeds what the environment draws at reset."""


def derive_seed(*parts: int) -> int:
    """A 31-bit seed that is a function of `parts` alone; distinct tuples of the same length give unrelated seeds."""
    import numpy as np

    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """A finished episode, for metrics."""

    task_id: int
    initial_state: int
    length: int
    """In environment steps."""
    success: bool
    reward: float
    video: bytes | None = None
    """MP4 of the frames that the policy saw, where it was asked for."""


INITIAL_VERSION = -1
"""`policy_version` of weights as loaded from the checkpoint."""
HALF_LOADED = -2
"""`policy_version` of an engine whose last update broke off: it holds weights of two versions, and samples from none.
"""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One frame that waits for a decision."""

    image: np.ndarray
    """[S, S, 3] uint8, already through the observation path; S is exactly the policy's image size."""
    instruction: str
    seed: int
    """Seeds this request's own generator, so that its tokens do not depend on what else is in the batch."""
    temperature: float
    """Softmax temperature over the action ids; 0 = greedy, whose log-probs are those at temperature 1."""


@dataclass(frozen=True, slots=True)
class SampleReply:
    """The decision that an engine sampled for one request."""

    tokens: np.ndarray
    """[A] int64 token ids, each one of the action ids."""
    log_probs: np.ndarray
    """[A] float32 natural log-probabilities of `tokens` in the tempered distribution over the action ids that they were
    drawn from."""
    policy_version: int
    """Push counter of the weights that produced the tokens."""
    value: float | None = None
    """Of the frame, by the same weights' value head; None = not asked for (`EngineSpec.values`)."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of the policy as it travels."""

    name: str
    """Its published name."""
    shape: tuple[int, ...]
    dtype: str
    """torch's name of its type, for example "bfloat16"."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightBucket:
    """Some tensors of a version, which can be read now.

    It travels through Ray and is never copied deeply: what a transport puts into it may be `ObjectRef`s.
    """

    index: int
    """From 0, in the order in which a version's buckets are loaded."""
    tensors: tuple[TensorSpec, ...]
    handle: Any
    """What the transport's `put` returned."""
    frozen: bool
    """Whether training changes none of them."""
    checksum: str | None = None
    """SHA-256 of the tensors in hex where `weights.checksum` is on."""


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """What a version of the policy's weights consists of; where it is kept, with all its buckets."""

    version: int
    """Push counter: never repeats, never decreases within a run."""
    transport: str
    """Known name or `module:Class` of what moves the buckets."""
    tensors: tuple[TensorSpec, ...]
    """All of the policy."""
    frozen: frozenset[str]
    """Names of those that training does not change, nor what an engine loads together with them."""
    base: str
    """Tells these frozen tensors from others, whatever they contain."""
    whole: bool
    """Whether the frozen ones were published with this version; else an engine keeps those that it has, of this base.
    """
    buckets: tuple[WeightBucket, ...] = ()
    """Where the version is kept: all that can still be read, the frozen ones too. Else none."""

    @property
    def num_bytes(self) -> int:
        """That were published."""
        return sum(spec.num_bytes for spec in self.tensors if self.whole or spec.name not in self.frozen)

    @property
    def snapshot_bytes(self) -> int:
        """That are kept."""
        return sum(spec.num_bytes for bucket in self.buckets for spec in bucket.tensors)


@dataclass(frozen=True, slots=True)
class Site:
    """Where a process is, as far as weights go."""

    node: str = ""
    """Ray's id of its node."""
    gpu: str = ""
    """Its card's UUID; empty = it computes on the CPU."""
    direct: frozenset[str] = frozenset()
    """Of Ray's transports past the object store, those that it can take part in."""
