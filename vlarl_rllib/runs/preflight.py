"""What is checked before Ray starts: the checkpoint, the renderer, the GPUs. Every finding is one line."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from vlarl_rllib.envs.registry import ENVIRONMENTS, expert_class, experts
from vlarl_rllib.models.family import PolicyFacts, PolicyFamily, family_of, load_family, read_facts
from vlarl_rllib.models.files import check_adapter
from vlarl_rllib.models.presets import HUB_MODELS, preset_facts, presets
from vlarl_rllib.process.surroundings import (
    check_ray,
    check_wandb,
    cluster_address,
    forgo_the_hub_where_it_is_not_reached,
)
from vlarl_rllib.ray_compat import label_mistake
from vlarl_rllib.rewards.judge import check_judge
from vlarl_rllib.rewards.weighted import make_reward
from vlarl_rllib.settings import ModelSettings, Settings, SettingsError, SFTSettings, calculate_runtime_args
from vlarl_rllib.settings.published import absolute_unless_name, is_model_name
from vlarl_rllib.settings.transports import AUTO, TRANSPORTS, require_installed, transport_class

MAIN_CAMERA = ("main",)
DEMONSTRATIONS = "demonstrations"
"""Folder of a quickstart's run directory that its data go into."""


def check(settings: Settings) -> None:
    """Raise `SettingsError` for what would fail later anyway."""
    check_model(settings.model.path, settings.unnorm_key, settings.model.family_reference)
    _check_additions(settings.model)
    _check_decisions(settings)
    _check_rewards(settings)
    _check_transport(settings)
    if cluster_address() is None:  # else `check_nodes` asks the nodes that draw
        check_environment(settings.env.name)
    plan = calculate_runtime_args(settings)
    if settings.run.wandb:
        check_wandb(settings.run.wandb)
    check_ray()
    selectors = [bundle.labels for bundle in plan.bundles]
    if any(selectors) and (mistake := label_mistake(selectors)):
        raise SettingsError(f"placement: {mistake}")
    if plan.total_gpus and not cluster_address() and not count_gpus():
        raise SettingsError(
            f"engines.gpus, learners.gpus, rewards.judge_gpus: the plan needs {plan.total_gpus:g} GPU(s) but "
            "this machine shows none; "
            "set them to 0 to run on the CPU"
        )


def _check_decisions(settings: Settings) -> None:
    model, executed = settings.model, settings.rollout.execute_actions
    actions = model_facts(model.path, "model.path", model.family_reference).actions
    if executed and executed > actions.num_actions:
        raise SettingsError(
            f"rollout.execute_actions: {executed} is more than the {actions.num_actions} action(s) of a decision of "
            f"{model.path}; use at most that"
        )


def _check_transport(settings: Settings) -> None:
    name = settings.weights.transport
    if name in (AUTO, *TRANSPORTS):
        if cluster_address() is None:  # elsewhere the driver may be a machine that needs nothing of it
            require_installed(name)
        return
    try:
        transport_class(name)
    except ValueError as error:
        raise SettingsError(f"weights.transport: {name!r}: {error}") from error


def _check_rewards(settings: Settings) -> None:
    for name in settings.rewards.others:
        try:
            make_reward(name)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    if settings.rewards.judge:
        try:
            check_judge(settings.rewards.judge)
        except ValueError as error:
            raise SettingsError(f"rewards.judge: {error}") from error


def check_collect(settings: Settings, out: Path) -> None:
    """The same for collecting demonstrations: whether the environment has an expert, and whether the data set
    exists."""
    env = settings.env.name
    if env not in experts():
        raise SettingsError(f"env.name: {env!r} has no scripted expert; choose one of {', '.join(experts())}")
    if env not in ENVIRONMENTS:
        try:
            expert_class(env)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    check_tensorflow_datasets("vlarl collect")
    model_facts(settings.model.path, "model.path", settings.model.family_reference)
    if (out / env).exists():
        raise SettingsError(f"--out: {out / env} exists; give another directory, or remove it")
    check_environment(env)


def check_quickstart(settings: Settings, run: Path) -> None:
    """The same for all stages of a quickstart in the directory `run`."""
    if settings.run.wandb:
        check_wandb(settings.run.wandb)
    if not settings.evaluation.episodes:
        raise SettingsError("evaluation.episodes: 0 would leave nothing to show; set it to at least 1")
    _check_rewards(settings)
    if (run / DEMONSTRATIONS).exists():
        raise SettingsError(f"--run-dir: {run} holds an earlier quickstart; give another directory, or remove it")
    check_collect(settings, run / DEMONSTRATIONS)
    if settings.unnorm_key != settings.env.name:
        raise SettingsError(
            f"model.unnorm_key: {settings.unnorm_key!r} is not what the demonstrations' statistics will be "
            f"called; set it to {settings.env.name}"
        )
    check_sft(settings, data_to_come=True)


def check_sft(settings: Settings, *, data_to_come: bool = False) -> None:
    """The same for supervised fine-tuning, also where `sft.data` is still to be collected."""
    model_facts(settings.model.path, "model.path", settings.model.family_reference)
    _check_additions(settings.model)
    if settings.sft.batch_size % max(1, settings.learners.num):
        raise SettingsError(
            f"sft.batch_size: {settings.sft.batch_size} does not divide over {settings.learners.num} learners; "
            "use a multiple of that"
        )
    if not data_to_come:
        _check_data(settings.sft, max(1, settings.learners.num))
    check_tensorflow_datasets("sft.data")
    check_ray()
    if settings.learners.gpus and not cluster_address() and not count_gpus():
        raise SettingsError(
            f"learners.gpus: {settings.learners.gpus:g} needs a GPU but this machine shows none; set it to 0 to "
            "run on the CPU"
        )


def check_tensorflow_datasets(what: str) -> None:
    """Raise `SettingsError`, beginning with `what`, where RLDS data cannot be read or written."""
    for package, name in (("tensorflow_datasets", "TensorFlow Datasets"), ("tensorflow", "TensorFlow")):
        if importlib.util.find_spec(package) is None:
            raise SettingsError(
                f"{what}: RLDS data need {name}, which is not installed; run: pip install 'vlarl-rllib[data]'"
            )


def _check_data(sft: SFTSettings, num_learners: int) -> None:
    """Whether the data set is there, is one that we read, has the split, and an episode of it for each learner."""
    from vlarl_rllib.data.rlds import check_dataset, episodes_of_split

    if sft.data is None:
        raise SettingsError(
            "sft.data: missing; give the directory of an RLDS data set, for example one that vlarl collect wrote"
        )
    try:
        splits = check_dataset(sft.data)
    except (OSError, ValueError) as error:
        raise SettingsError(f"sft.data: {error}") from None
    try:
        num_episodes = episodes_of_split(sft.split, splits)
    except ValueError as error:
        raise SettingsError(f"sft.split: {error}") from None
    if num_episodes < num_learners:
        raise SettingsError(
            f"learners.num: {num_learners} learners cannot share the {num_episodes} episode(s) of {sft.split} in "
            f"{sft.data}; use fewer, or more data"
        )


def check_model(
    path: str,
    unnorm_key: str,
    family: str | None = None,
    *,
    path_name: str = "model.path",
    key_name: str = "model.unnorm_key",
) -> None:
    """Raise `SettingsError` unless `path` is a model that can be played, with statistics under `unnorm_key`; the names
    are what the user calls the two.

    Args:
        family: `model.family_reference`.
    """
    facts = model_facts(path, path_name, family)
    if facts.regresses:
        raise SettingsError(
            f"{path_name}: {path} regresses its actions, so none has a probability, and engines would sample tokens, "
            "which it was not trained on; give a checkpoint that was trained on tokens"
        )
    if facts.cameras != MAIN_CAMERA or facts.state_size:
        state = f", and {facts.state_size} numbers of the robot's state" if facts.state_size else ""
        raise SettingsError(
            f"{path_name}: {path} is to see {' and '.join(facts.cameras)} camera{state}, whereas environments have the "
            "main camera's frames alone; give a checkpoint that needs no more"
        )
    try:
        facts.action_statistics(unnorm_key)
    except ValueError as error:
        raise SettingsError(
            f"{key_name}: {unnorm_key!r} is not in preset {path!r}; choose from {', '.join(sorted(facts.norm_stats))}"
            if path in presets()
            else f"{key_name}: {error}"
        ) from error


def model_facts(path: str, path_name: str, family: str | None) -> PolicyFacts:
    """Of a preset, directory or hub id. Raises `SettingsError` where it is no checkpoint of a family that we know."""
    if family and "?" in family and path in presets():
        raise SettingsError(f"model.oft: preset {path} is made as it is; leave model.oft out")
    if family and not family.startswith("?"):
        try:
            loaded = load_family(family)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        if path in presets() and loaded is not presets()[path]:
            raise SettingsError(
                f"{path_name}: preset {path} is of the family {presets()[path].name}, not of model.family {family}; "
                "give a checkpoint of that"
            )
    return preset_facts(path) if path in presets() else _read_facts(path, path_name, family)


def _read_facts(path: str, path_name: str, family: str | None) -> PolicyFacts:
    path = absolute_unless_name(path)
    local = not is_model_name(path) and Path(path).is_dir()
    known = f"presets are {', '.join([*presets(), *HUB_MODELS])}"
    if not local and path.startswith("/"):
        raise SettingsError(
            f"{path_name}: no such {'run or directory' if path_name == 'CHECKPOINT' else 'directory'} {path!r}; {known}"
        )
    if not local and path not in HUB_MODELS and path.count("/") != 1:
        raise SettingsError(f"{path_name}: {path!r} is no directory, preset or hub id; {known}")
    offline = not local and not forgo_the_hub_where_it_is_not_reached()
    try:
        return read_facts(HUB_MODELS.get(path, path), family)
    except KeyError as error:
        raise SettingsError(f"{path_name}: config.json of {path} has no {error}; give a whole checkpoint") from error
    except (OSError, ValueError) as error:  # missing, not to be fetched, or another kind of model
        raise SettingsError(
            f"{path_name}: {path}: {_hub_problem(error)}" if not local and not offline else f"{path_name}: {error}"
        ) from error


def _hub_problem(error: OSError | ValueError) -> str:
    """What the hub said, in one line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "is gated; accept its terms on the hub, and log in with `hf auth login` or HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "is not on the hub, or private; check the name, or log in with `hf auth login` or HF_TOKEN"
    return str(error).strip().splitlines()[0]


def _check_additions(model: ModelSettings) -> None:
    """Adapter, quantisation and critic."""
    if model.lora and model.lora.adapter:
        try:
            check_adapter(model.lora.adapter)
        except (OSError, ValueError) as error:
            raise SettingsError(f"model.lora.adapter: {error}") from None
    if model.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError(
            f"model.quantization: {model.quantization} needs bitsandbytes, which is not installed; run: pip "
            "install bitsandbytes"
        )
    if model.critic_path:
        critic = model_facts(model.critic_path, "model.critic_path", model.family_reference).image_size
        policy = model_facts(model.path, "model.path", model.family_reference).image_size
        if critic != policy:
            raise SettingsError(
                f"model.critic_path: {model.critic_path} sees {critic} pixels, the policy {policy}, and both get the "
                "same frames; choose one of that size"
            )
    family = _family(model.path, model)
    if model.critic_path and (other := _family(model.critic_path, model)) is not family:
        raise SettingsError(
            f"model.critic_path: {model.critic_path} is of the family {other.name}, the policy of {family.name}; "
            "choose one of the same family"
        )
    lora = model.lora
    if lora and not lora.adapter and isinstance(lora.targets, str) and lora.targets not in family.lora_targets:
        raise SettingsError(
            f"model.lora.targets: {lora.targets!r} means nothing to the family {family.name}; choose one of "
            f"{', '.join(family.lora_targets) or '(none)'}, or list modules"
        )


def _family(path: str, model: ModelSettings) -> PolicyFamily:
    """Of a model that was found readable."""
    return presets()[path] if path in presets() else family_of(HUB_MODELS.get(path, path), model.family_reference)


def check_environment(name: str) -> None:
    """Raise `SettingsError` where one of our environments that draw with MuJoCo cannot."""
    from vlarl_rllib.envs.rendering import choose_gl_backend

    if name not in ENVIRONMENTS or not ENVIRONMENTS[name].needs_gl:
        return
    try:
        choose_gl_backend()
    except RuntimeError as error:
        raise SettingsError(f"env.name: {name} cannot render here: {error}") from error


def count_gpus() -> int:
    """NVIDIA GPUs that this process may see, without loading CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
