"""`vlarl doctor CHECKPOINT`: what a policy is, how it will be used, and what it should score.

Reads JSON files and the headers of weights; no weights, no code of the checkpoint, and the hub for a hub id alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from vlarl_rllib.envs import registry
from vlarl_rllib.models.family import PolicyFacts, PolicyFamily, family_of, load_family
from vlarl_rllib.models.files import ADAPTER_CONFIG_FILE, CONFIG_FILE, WeightFacts, check_adapter, weight_facts
from vlarl_rllib.models.presets import HUB_MODELS, presets
from vlarl_rllib.process.console import make_console, pasted
from vlarl_rllib.process.json_files import read_json_object
from vlarl_rllib.runs.directory import RunDirectory
from vlarl_rllib.runs.export import PROVENANCE_FILE, TrainingCheckpoint, find_training_checkpoint
from vlarl_rllib.runs.preflight import model_facts
from vlarl_rllib.settings import SettingsError
from vlarl_rllib.settings.published import (
    PUBLISHED_MODELS,
    PublishedModel,
    absolute_unless_name,
    is_model_name,
    published_model,
)

ARGUMENT = "CHECKPOINT"
LIBERO_TRIALS = 500
"""Episodes of `vlarl eval` on a suite of ten tasks."""
Rows = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Use:
    """What a policy is going to act in, and why that is thought."""

    env: str
    suite: str
    unnorm_key: str
    center_crop: bool
    why_crop: str

    @property
    def eval_options(self) -> str:
        crop = "" if self.center_crop else " --no-center-crop"
        return f"{registry.eval_options(self.env, self.suite)}{crop}"


def report_checkpoint(name: str, *, suite: str | None, env: str | None, family: str | None) -> bool:
    """Print the table; whether the policy's files and statistics are there.

    Raises SettingsError: it is no policy, or one that cannot be reached.
    """
    console = make_console()
    if env is not None and env not in registry.environments():
        raise SettingsError(f"--env: {env!r} is none of {', '.join(registry.environments())}")
    if suite is not None and suite not in (known := registry.suites(env or registry.DEFAULT_ENVIRONMENT)):
        raise SettingsError(f"--suite: {suite!r} is none of {', '.join(known) or 'this environment, which has none'}")
    table = Table("what", Column("found", overflow="fold"), title=name, title_justify="left")
    problems: list[str] = []
    for what, found in _rows(name, suite, env, family, problems):
        table.add_row(what, Text("".join(letter if letter.isprintable() else "?" for letter in found)))
    console.print(table)
    for problem in problems:
        console.print(problem, style="red")
    return not problems


def _rows(name: str, suite: str | None, env: str | None, family: str | None, problems: list[str]) -> Rows:
    directory = Path(name).expanduser()
    local = not is_model_name(name) and directory.is_dir()
    if local and (directory / ADAPTER_CONFIG_FILE).is_file() and not (directory / CONFIG_FILE).is_file():
        yield from _adapter_rows(name, directory)
        return
    training = _training_checkpoint(directory, family) if local else None
    if training:
        yield from _training_rows(directory, training)
        family = training.settings.model.family_reference
    model = training.settings.model.path if training else absolute_unless_name(name)
    published = published_model(model)
    try:
        facts = model_facts(model, "model.path of that run" if training else ARGUMENT, family)
    except SettingsError as error:
        if published is None:  # of a published one there is more to say than what is in its files
            raise
        facts = None
        problems.append(str(error))
    of = load_family(published.family) if facts is None and published else _family(model, family)
    if facts is not None:
        yield from _model_rows(model, facts, of)
    elif published:
        yield "weights", f"{published.num_parameters:,} parameters, as published; not looked at"
    use = _use(training, published, facts, model, suite, env)
    if facts is not None:
        yield "action statistics", ", ".join(sorted(facts.norm_stats))
    if use is None:
        yield "used for", "nothing that its name or statistics say; choose with --suite or --env"
    else:
        image_size = facts.image_size if facts else published.image_size if published else None
        yield from _use_rows(use, facts, image_size, of, problems)
    yield from _result_rows(name, published, use, training, local)


def _training_checkpoint(directory: Path, family: str | None) -> TrainingCheckpoint | None:
    try:
        return find_training_checkpoint(directory, family)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{ARGUMENT}: {error}") from None


def _family(model: str, family: str | None) -> PolicyFamily:
    """Of a model whose facts could be read."""
    return presets()[model] if model in presets() else family_of(HUB_MODELS.get(model, model), family)


def _adapter_rows(name: str, directory: Path) -> Rows:
    try:
        adapter = check_adapter(directory)
        weights = weight_facts(directory)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{ARGUMENT}: {error}") from None
    targets = adapter.get("target_modules")
    yield "kind", f"a PEFT adapter (LoRA) of rank {adapter.get('r')}, alpha {adapter.get('lora_alpha')}; no policy yet"
    yield "adapted modules", targets if isinstance(targets, str) else ", ".join(map(str, targets or ()))
    yield "weights", _weights_in_words(weights)
    yield "for the model", str(adapter.get("base_model_name_or_path"))
    yield "trained on with", f"model.path of that model and model.lora: {{adapter: {name}}}"


def _training_rows(directory: Path, training: TrainingCheckpoint) -> Rows:
    settings = training.settings
    lora, learn = settings.model.lora, settings.training
    trained = f"LoRA adapters of rank {lora.rank}, merged by vlarl export and eval" if lora else "all weights"
    yield "kind", f"training checkpoint: iteration {training.iteration} of {settings.run.iterations}, vlarl train"
    yield "file", os.path.relpath(training.directory)
    yield "trained from", f"{settings.model.path}; {trained}"
    yield (
        "trained with",
        f"lr {learn.lr:g}, value_lr {learn.value_lr:g}, temperature {settings.temperature:g}, advantages "
        f"{learn.advantages}, model.dtype {settings.model.dtype}, engines.dtype {settings.engines.dtype}, seed "
        f"{settings.run.seed}; all of it in config.yaml",
    )
    if played := list(_evaluations(directory)):
        yield "greedy success, held-out starts", ", ".join(played)


def _evaluations(directory: Path) -> Iterator[str]:
    """Of a run's directory; none of a checkpoint's."""
    for row in RunDirectory(directory).read_rows():
        for key, before in (("initial_evaluation", 1), ("evaluation", 0)):
            if found := row.get(key):
                try:
                    rate, episodes = 100 * float(found["success_rate"]), int(found["episodes"])
                except (KeyError, TypeError, ValueError) as error:
                    raise SettingsError(
                        f"{ARGUMENT}: {directory / 'metrics.jsonl'}: {key} of iteration {row['iteration']} cannot be "
                        f"read ({error}); remove the line"
                    ) from None
                yield f"{rate:.1f} % of {episodes} behind iteration {row['iteration'] - before}"


def _model_rows(model: str, facts: PolicyFacts, family: PolicyFamily) -> Rows:
    actions = facts.actions
    yield "family", family.name
    if model in presets():
        yield "weights", "a preset: random, made from a seed when it is first used"
        return
    if words := family.describe(HUB_MODELS.get(model, model)):
        yield "model", words
    if Path(model).is_dir():
        yield "weights", f"{_weights_in_words(weight_facts(Path(model)))}, merged (no adapter beside them)"
    else:
        yield "weights", _weights_on_the_hub(HUB_MODELS.get(model, model))
    origin = Path(model) / PROVENANCE_FILE
    if origin.is_file():
        try:
            made = read_json_object(origin, "remove it")
        except ValueError as error:
            raise SettingsError(f"{ARGUMENT}: {error}") from None
        yield "exported from", f"iteration {made.get('iteration')} of {made.get('checkpoint')}"
    yield (
        "a decision",
        f"{actions.num_actions} action(s) of {actions.tokens_per_action} tokens, each of {len(actions.token_ids)} bins "
        f"(ids {actions.token_ids.start} to {actions.token_ids.stop - 1}), "
        f"{'all from one pass' if actions.parallel else 'one after the other'}",
    )


def _weights_in_words(weights: WeightFacts) -> str:
    types = ", ".join(f"{dtype} {count:,}" for dtype, count in sorted(weights.dtypes.items()))
    return (
        f"{weights.num_parameters:,} parameters in {weights.num_tensors:,} tensors ({types}), "
        f"{weights.num_bytes / 1e9:.2f} GB"
    )


def _weights_on_the_hub(hub_id: str) -> str:
    """From the headers alone, which the hub sends by themselves."""
    from huggingface_hub import get_safetensors_metadata

    try:
        counts: dict[Any, int] = get_safetensors_metadata(hub_id).parameter_count
    except Exception as error:  # of the network, the hub, or its files: whatever it is, the rest can be said
        return f"not looked at ({' '.join(str(error).split())[:120]})"
    return f"{sum(counts.values()):,} parameters ({', '.join(map(str, counts))})"


def _use(
    training: TrainingCheckpoint | None,
    published: PublishedModel | None,
    facts: PolicyFacts | None,
    model: str,
    suite: str | None,
    env: str | None,
) -> Use | None:
    """What it is for: as the command says, else the run that trained it, its name, or its only statistics."""
    crops, why = True, "nothing in a checkpoint says; with --no-center-crop where it was trained without random crops"
    key = None
    if training:
        settings = training.settings
        env, suite = env or settings.env.name, suite or settings.env.suite
        key, crops, why = settings.unnorm_key, settings.center_crop, "as the run that trained it"
    elif published:
        key, crops = published.unnorm_key, published.center_crop
        why = f"published: trained {'with' if crops else 'without'} random crops"
        suite = suite or (published.result.suite if published.result and env is None else None)
    elif facts and not (suite or env):
        suite = _only_suite(facts)
    env = env or (registry.DEFAULT_ENVIRONMENT if suite else None)
    if env is None:
        return None
    suite = suite or registry.DEFAULT_SUITE
    if env in registry.ENVIRONMENTS and not registry.ENVIRONMENTS[env].crops:
        crops, why = True, f"{env} has no crop"
    return Use(env, suite, key or registry.default_statistics(env, suite), crops, why)


def _only_suite(facts: PolicyFacts) -> str | None:
    """The LIBERO suite, where the statistics are of exactly one."""
    known = registry.suites(registry.DEFAULT_ENVIRONMENT)
    found = {suite for suite in known if {suite, f"{suite}_no_noops"} & facts.norm_stats.keys()}
    return found.pop() if len(found) == 1 else None


def _use_rows(
    use: Use, facts: PolicyFacts | None, image_size: int | None, family: PolicyFamily, problems: list[str]
) -> Rows:
    tasks = registry.task_instructions(use.suite, name=use.env)
    where = registry.label(use.env, use.suite)
    yield "used for", f"{where}: {len(tasks)} tasks, {registry.horizon(use.suite, name=use.env)} steps an episode"
    if facts is None:
        yield "statistics used", use.unnorm_key
    else:
        try:
            statistics = facts.action_statistics(use.unnorm_key)
            yield "statistics used", f"{use.unnorm_key}: {_quantiles(statistics)}"
        except ValueError as error:
            yield "statistics used", f"{use.unnorm_key}: not there"
            problems.append(f"{ARGUMENT}: {error}; say which with --unnorm-key of vlarl eval, or model.unnorm_key")
    if (prompt := family.prompt(tasks[0])) is not None:
        yield "prompt", repr(prompt)
    crops = use.env in registry.ENVIRONMENTS and registry.ENVIRONMENTS[use.env].crops
    yield "centre crop", f"{'yes' if use.center_crop and crops else 'no'} ({use.why_crop})"
    if image_size is not None:
        yield "frames", registry.env_class(use.env).describe_frames(image_size, center_crop=use.center_crop)


def _quantiles(statistics: dict[str, Any]) -> str:
    rows = (" ".join(f"{number:.3g}" for number in statistics[name]) for name in ("q01", "q99"))
    return "q01 {}; q99 {}".format(*rows)


def _result_rows(
    name: str,
    published: PublishedModel | None,
    use: Use | None,
    training: TrainingCheckpoint | None,
    local: bool,
) -> Rows:
    by_name = PUBLISHED_MODELS.get(Path(name).name) if local and not training else None
    source = published or by_name
    shown = pasted(Path(name)) if local else name
    if training is None and source and source.result and (use is None or use.suite == source.result.suite):
        result = source.result
        caveat = "if it is the one it is called after: " if by_name else ""
        error = f" +- {result.standard_error:g}" if result.standard_error else ""
        yield (
            "should score",
            f"{caveat}{result.success:g}{error} % ({result.source}); one evaluation of {LIBERO_TRIALS} episodes within "
            f"{result.spread(LIBERO_TRIALS):.1f} points of it in 19 of 20 cases",
        )
    elif training is None and published and published.result is None:
        yield (
            "should score",
            f"nothing on {registry.DEFAULT_ENVIRONMENT}, which it was not trained on: fine-tune it first (its own "
            f"statistics are {published.unnorm_key}, and it was trained "
            f"{'with' if published.center_crop else 'without'} random crops)",
        )
    elif training is None:
        yield "should score", "nothing was published for it here"
    if use is not None:
        yield "evaluate with", f"vlarl eval {shown} {use.eval_options}"
