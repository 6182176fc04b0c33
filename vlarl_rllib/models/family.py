"""What the rest of the package knows of a kind of policy. Importing this loads no torch.

A family is a class with the facts of its checkpoints and the ways to load, shard, sample and write one. It is found by
`model.family`, else by the `model_type` of a checkpoint's config.json. The package's own lie in
`models/<name>/family.py`; an installed package adds one through an entry point, which `model.family` then takes by
name:

    [project.entry-points."vlarl_rllib.families"]
    pointer = "my_policies.pointer:PointerFamily"

Letters: K = actions of a decision, D = tokens of an action, A = K D = tokens of a decision, V = action ids, B = batch,
S = image side in pixels.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol
from urllib.parse import parse_qsl

import numpy as np

from vlarl_rllib.models.files import read_config, refuse_foreign_code
from vlarl_rllib.models.flops import PolicyFlops
from vlarl_rllib.models.interfaces import ActionCodec, PolicyOutput, PolicyProcessor
from vlarl_rllib.models.statistics import action_statistics
from vlarl_rllib.process.plugins import added_by_packages, load_class

if TYPE_CHECKING:
    from torch import Tensor, nn

GROUP = "vlarl_rllib.families"
"""Entry points of other packages."""


@dataclass(frozen=True, slots=True)
class ActionFormat:
    """How a policy writes a decision: K actions of D tokens each, action by action."""

    num_actions: int
    """K"""
    tokens_per_action: int
    """D"""
    token_ids: range
    """The V ids that a decision is made of, ascending."""
    parallel: bool = False
    """Whether one pass gives all A distributions; else each token is sampled after, and given, those before it."""
    stop_token: bool = False
    """Where they are parallel: whether supervised learning has the end of sequence behind them, as it always has where
    they are not."""

    @property
    def num_tokens(self) -> int:
        """A"""
        return self.num_actions * self.tokens_per_action

    @property
    def num_targets(self) -> int:
        """Of supervised learning: A, and the end of sequence where it is one."""
        return self.num_tokens + (self.stop_token or not self.parallel)

    def executed_tokens(self, durations: np.ndarray) -> np.ndarray:
        """[N, A] bool: the tokens of actions that were played.

        Args:
            durations: [N] actions that were played of each decision, from its first one on.
        """
        action = np.arange(self.num_tokens) // self.tokens_per_action
        return np.asarray(action[None, :] < np.asarray(durations)[:, None])


@dataclass(frozen=True)
class PolicyFacts:
    """What can be said of a checkpoint from its JSON files."""

    image_size: int
    """S"""
    actions: ActionFormat
    norm_stats: dict[str, Any]
    """Statistics by data set."""
    origins: dict[str, str]
    """By key of `norm_stats`, the file that it is from."""
    cameras: tuple[str, ...] = ("main",)
    """Whose frames it sees, side by side in the channels of what a processor takes: `main`, `wrist`."""
    state_size: int = 0
    """Numbers of the robot's own state that it is given beside the frames."""
    regresses: bool = False
    """Whether its actions have no tokens that could be sampled, and so no probability."""

    def action_statistics(self, unnorm_key: str) -> dict[str, Any]:
        """`q01`, `q99`, `mask` of a data set, checked.

        Raises ValueError: an unknown key, naming the choices, or numbers that scale no action.
        """
        for key in (unnorm_key, f"{unnorm_key}_no_noops"):
            if key in self.norm_stats:
                return action_statistics(self.norm_stats[key], f"{self.origins[key]}: {key}")
        raise ValueError(
            f"{unnorm_key!r} is not in this checkpoint's norm_stats; choose from {', '.join(sorted(self.norm_stats))}"
        )


class SampledTokens(NamedTuple):
    """What a policy samples."""

    tokens: Tensor
    """[B, A] int64 token ids."""
    log_probs: Tensor
    """[B, A] float32 over the V action ids, at the row's temperature; at 1 where that is 0."""
    values: Tensor | None = None
    """[B] float32, as a forward pass has them; None without a value head."""


class Policy(Protocol):
    """What the package asks of a policy, a torch module; its tensors have their published names."""

    @property
    def num_image_tokens(self) -> int:
        """Of a sequence: where they are few, a CPU does without fused attention."""
        ...

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        action_tokens: Tensor | None = None,
        full_vocabulary: bool = False,
    ) -> PolicyOutput:
        """One pass with the gradient.

        Args:
            input_ids, attention_mask: [B, L] int64, right-padded prompts and 1 at their tokens.
            pixel_values: [B, 3, S, S] uint8.
            action_tokens: [B, A], or more where supervised learning has more targets; a parallel family does not
                look at them. None where the values alone are wanted.
            full_vocabulary: logits over all ids.
        """
        ...

    def sample_action_tokens(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        temperatures: Tensor,
        seeds: Sequence[int],
    ) -> SampledTokens:
        """One decision for each row, and its value where there is a value head; a row depends on its own inputs,
        temperature [B] (0 = greedy) and seed alone. All tensors are on the model's device."""
        ...

    def add_value_head(self, seed: int) -> Any:
        """Attach `value_head`, all values 0."""
        ...


class PolicyFamily(ABC):
    """One kind of policy. Methods of the first part load no torch."""

    name: ClassVar[str]
    """For messages: what `model.family` calls it."""
    has_model_type: ClassVar[bool] = True
    """Whether `name` is what the `model_type` of its checkpoints says; where not, see `claims`."""
    vllm_model: ClassVar[str | None] = None
    """`module:Class` of the model as vLLM runs it; None = engines run the model itself, in torch.

    vLLM knows it by the class's name, and needs tokens that are sampled one after the other, prompts that begin with
    BOS, behind which the frame's tokens go, and a `load_config` with `text_config`, `image_token_index` and
    `num_patches`.
    """
    published_statistics: ClassVar[bool] = False
    """Whether its policies see actions as the `dataset_statistics.json` of published data sets has them; else those
    files are neither read nor written."""
    lora_targets: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    """Modules that `model.lora.targets` stands for, by its words: names, or a pattern of whole names."""
    never_quantized: ClassVar[tuple[str, ...]] = ()
    """Modules that `model.quantization` leaves as they are."""

    def with_options(self, options: Mapping[str, str]) -> PolicyFamily:
        """The same kind with what a checkpoint leaves unsaid, see `load_family`. Raises ValueError for an option that
        the family does not have."""
        raise ValueError(f"the family {self.name} has none; leave out {', '.join(options)} (model.oft)")

    # Facts

    def claims(self, checkpoint: str, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint whose `model_type` is another family's is of this kind; asked of the package's own
        families without a `model_type`."""
        return False

    def doubt(self, checkpoint: str) -> str | None:
        """What speaks against a checkpoint being of this kind, in one line, where nothing proves it."""
        return None

    @abstractmethod
    def read_facts(self, checkpoint: str) -> PolicyFacts:
        """Read the JSON files of a directory or hub id; see that a directory's weights are whole.

        Raises:
            FileNotFoundError: no `config.json`.
            KeyError: one without the sizes.
            ValueError: a checkpoint of another kind, or one with a damaged file, in one line.
        """

    @abstractmethod
    def codec(self, facts: PolicyFacts, statistics: Mapping[str, Any]) -> ActionCodec:
        """Of one data set, whose `q01`, `q99`, `mask` the statistics are."""

    @abstractmethod
    def dataset_statistics(self, actions: np.ndarray, num_episodes: int) -> dict[str, Any]:
        """`norm_stats` entry of demonstrations: environment actions [N, 7]."""

    def prompt(self, instruction: str) -> str | None:
        """The text that asks for actions, for a person to look at; None = the family does not say."""
        return None

    def describe(self, checkpoint: str) -> str | None:
        """What a checkpoint's model is made of, in words, from its JSON files; None = the family does not say."""
        return None

    def cache_bytes(self, checkpoint: str | None, dtype: str) -> int:
        """Memory that an engine of this type keeps for each running decision, of a directory's model or, for None, a
        published one; 0 where there is no cache."""
        return 0

    def count_flops(self, checkpoint: str, prompt_tokens: int) -> PolicyFlops | None:
        """What each pass takes for a prompt of so many tokens, of a directory; None = the family does not count."""
        return None

    def preset_facts(self) -> Mapping[str, PolicyFacts]:
        """The small models that can be made from a seed, by name; only of the package's own families."""
        return {}

    def preset_digest(self, preset: str) -> str:
        """Changes with what makes the preset: a checkpoint made by other code is not taken for the current one."""
        raise KeyError(preset)

    # With torch

    def write_preset(self, preset: str, directory: Path, seed: int) -> None:
        """Write a whole checkpoint with random weights; the same seed gives the same bytes."""
        raise KeyError(preset)

    @abstractmethod
    def load_config(self, checkpoint: str) -> Any:
        """transformers' configuration of a checkpoint, for vLLM and export."""

    @abstractmethod
    def load(self, checkpoint: str, **options: Any) -> Any:
        """The `Policy` of a checkpoint, in evaluation mode; options are those of transformers' `from_pretrained`."""

    @abstractmethod
    def without_memory(self, checkpoint: str) -> nn.Module:
        """The model's shapes, on torch's meta device."""

    @abstractmethod
    def processor(self, checkpoint: str) -> PolicyProcessor:
        """Of a checkpoint."""

    @abstractmethod
    def shard_units(self, policy: nn.Module) -> Iterable[nn.Module]:
        """Modules that FSDP may gather each on its own; it gathers the rest at once."""

    def compile_units(self, policy: nn.Module) -> Iterable[nn.Module]:
        """Modules worth compiling each on its own: those that repeat, so that one compilation serves many."""
        return ()

    def frozen_inputs(self, policy: nn.Module) -> tuple[str, ...]:
        """Outputs of a forward pass that later passes may take, under these names, instead of `pixel_values`: nothing
        that is trained is in them."""
        return ()

    @abstractmethod
    def checkpoint_activations(self, policy: nn.Module) -> None:
        """Have the backward pass compute activations again."""

    @abstractmethod
    def freeze_unused(self, policy: nn.Module) -> None:
        """Freeze what no forward pass reads: it would never get a gradient."""

    @abstractmethod
    def freeze_token_head(self, critic: nn.Module) -> None:
        """Freeze what turns hidden states into tokens, which a critic does not read."""

    @abstractmethod
    def write_files(self, base: str, out: Path, dtype: str, norm_stats: dict[str, Any] | None) -> None:
        """Write what a checkpoint has beside its weights: the base's, with other action statistics where given."""


@cache
def own_families() -> dict[str, str]:
    """`module:Class` by name of what comes with the package: its folders here with a family.py."""
    import vlarl_rllib.models as models

    found = {}
    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        reference = f"{module.name}.family"
        if module.ispkg and importlib.util.find_spec(reference) is not None:
            found[module.name.rpartition(".")[2]] = f"{reference}:FAMILY"
    return found


def families() -> dict[str, str]:
    """`module:Class` by name: what installed packages add, and the package's own, which win."""
    return added_by_packages(GROUP) | own_families()


@cache
def load_family(reference: str) -> PolicyFamily:
    """The family of a name or `module:Class`, with the options behind a question mark: `openvla_oft?num_images=2`.

    Raises ValueError: there is none, it cannot be imported, or it has no such options.
    """
    name, _, options = reference.partition("?")
    family = _family(name)
    try:
        return family.with_options(dict(parse_qsl(options, keep_blank_values=True))) if options else family
    except ValueError as error:
        raise ValueError(f"model.family is {reference!r}, but {error}") from error


def _family(name: str) -> PolicyFamily:
    reference = families().get(name, name)
    if ":" not in reference:
        raise ValueError(f"model.family is {name!r}; choose one of {', '.join(families())}, or name it as module:Class")
    try:
        found = load_class(reference)
    except ValueError as error:
        raise ValueError(f"model.family is {name!r}, but {error}") from error
    try:
        family = found() if isinstance(found, type) else found
    except Exception as error:  # somebody else's class may raise anything
        raise ValueError(
            f"model.family is {name!r}, but it cannot be made ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(family, PolicyFamily):
        raise ValueError(f"model.family is {name!r}, but that is no vlarl_rllib.models.family.PolicyFamily")
    return family


def family_name(checkpoint: str, name: str | None = None) -> str:
    """What `load_family` takes for a directory or hub id.

    Args:
        name: `ModelSettings.family_reference`; None, or options alone = what the checkpoint's files say.

    Raises:
        FileNotFoundError: no `config.json`.
        ValueError: it is damaged, or no family is of its `model_type`.
    """
    if name and not name.startswith("?"):
        return name
    config, file = read_config(checkpoint)
    refuse_foreign_code(config, str(file))
    own = {each: load_family(each) for each in own_families()}
    kinds = [each for each in families() if each not in own or own[each].has_model_type]
    if not isinstance(kind := config.get("model_type"), str) or kind not in kinds:
        raise ValueError(
            f"{checkpoint}: model_type is {kind!r}, must be {' or '.join(map(repr, kinds))}; other policies are "
            "not supported, unless model.family names a class for them"
        )
    claimed = [each for each, family in own.items() if each not in kinds and family.claims(checkpoint, config)]
    return (claimed or [kind])[0] + (name or "")


def family_of(checkpoint: str, name: str | None = None) -> PolicyFamily:
    """The family of a directory or hub id; see `family_name`."""
    return load_family(family_name(checkpoint, name))


def read_facts(checkpoint: str, name: str | None = None) -> PolicyFacts:
    """`PolicyFamily.read_facts` of whatever family a checkpoint is of; raises as that and `family_name`, and ValueError
    where the family has a `vllm_model` and tokens that vLLM cannot sample."""
    family = family_of(checkpoint, name)
    facts = family.read_facts(checkpoint)
    if family.vllm_model is not None and facts.actions.parallel:
        raise ValueError(
            f"the family {family.name} has a `vllm_model`, and one pass gives all tokens of a decision, whereas vLLM "
            "samples them one after the other; leave `vllm_model` None"
        )
    return facts
