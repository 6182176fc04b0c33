"""RLlib's setters, attributes and Tune's space reach the run through the settings, or are refused in one line."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.tune.search.variant_generator import generate_variants

from vlarl_rllib import VLAPPO, VLAPPOConfig
from vlarl_rllib.errors import SettingsError
from vlarl_rllib.settings import Settings
from vlarl_rllib.settings.rllib_fields import HONOURED, OWN, PASSED_ON, REMEDIES, fields_of, value_of

Write = Callable[[VLAPPOConfig], Any]


def make() -> VLAPPOConfig:
    """Four slots in one runner, one learner."""
    return VLAPPOConfig.from_settings(Settings.from_dict({"env": {"name": "synthetic", "num_envs": 4}}))


REACHES: dict[str, tuple[Write, dict[str, Any]]] = {
    "training(lr)": (lambda c: c.training(lr=3e-3), {"training.lr": 3e-3}),
    "training(gamma)": (lambda c: c.training(gamma=0.9), {"training.gamma": 0.9}),
    "training(lambda_)": (lambda c: c.training(lambda_=0.8), {"training.gae_lambda": 0.8}),
    "training(grad_clip)": (lambda c: c.training(grad_clip=0.5), {"training.grad_clip": 0.5}),
    "training(num_epochs)": (lambda c: c.training(num_epochs=9), {"training.num_epochs": 9}),
    "training(minibatch_size)": (lambda c: c.training(minibatch_size=32), {"training.minibatch_size": 32}),
    "training(clip_param)": (
        lambda c: c.training(clip_param=0.1),
        {"training.clip_low": 0.1, "training.clip_high": 0.1},
    ),
    "training(clip_param), one of the two": (
        lambda c: c.training(clip_param=0.28),
        {"training.clip_low": 0.28, "training.clip_high": 0.28},
    ),
    "training(vf_clip_param)": (lambda c: c.training(vf_clip_param=3.0), {"training.vf_clip": 3.0}),
    "training(vf_loss_coeff)": (lambda c: c.training(vf_loss_coeff=0.7), {"training.vf_coeff": 0.7}),
    "training(entropy_coeff)": (lambda c: c.training(entropy_coeff=0.01), {"training.entropy_coeff": 0.01}),
    "training(train_batch_size)": (lambda c: c.training(train_batch_size=128), {"rollout.steps_per_iteration": 32}),
    "training(train_batch_size_per_learner)": (
        lambda c: c.learners(num_learners=2).training(train_batch_size_per_learner=64),
        {"rollout.steps_per_iteration": 32, "learners.num": 2},
    ),
    "env_runners(num_env_runners)": (lambda c: c.env_runners(num_env_runners=3), {"rollout.num_runners": 3}),
    "env_runners(num_envs_per_env_runner)": (lambda c: c.env_runners(num_envs_per_env_runner=5), {"env.num_envs": 5}),
    "env_runners(num_cpus_per_env_runner)": (
        lambda c: c.env_runners(num_cpus_per_env_runner=2),
        {"rollout.cpus_per_runner": 2.0},
    ),
    "env_runners(rollout_fragment_length)": (
        lambda c: c.env_runners(rollout_fragment_length=24),
        {"rollout.steps_per_iteration": 24},
    ),
    "learners(num_learners)": (lambda c: c.learners(num_learners=2), {"learners.num": 2}),
    "learners(num_cpus_per_learner)": (lambda c: c.learners(num_cpus_per_learner=2), {"learners.cpus": 2.0}),
    "learners(num_gpus_per_learner)": (lambda c: c.learners(num_gpus_per_learner=1), {"learners.gpus": 1.0}),
    "resources(placement_strategy)": (
        lambda c: c.resources(placement_strategy="SPREAD"),
        {"placement.strategy": "SPREAD"},
    ),
    "env_runners(custom_resources_per_env_runner)": (
        lambda c: c.env_runners(custom_resources_per_env_runner={"farm": 0.5}),
        {"placement.runners.resources": {"farm": 0.5}},
    ),
    "learners(custom_resources_per_learner)": (
        lambda c: c.learners(custom_resources_per_learner={"farm": 1}),
        {"placement.learners.resources": {"farm": 1.0}},
    ),
    "environment(env)": (lambda c: c.environment("tabletop"), {"env.name": "tabletop"}),
    "environment(env_config)": (
        lambda c: c.environment(env_config={"tasks": [3], "max_steps": 7}),
        {"env.tasks": [3], "env.max_steps": 7},
    ),
    "evaluation(evaluation_interval)": (lambda c: c.evaluation(evaluation_interval=2), {"evaluation.every": 2}),
    "evaluation(evaluation_duration)": (lambda c: c.evaluation(evaluation_duration=7), {"evaluation.episodes": 7}),
    "debugging(seed)": (lambda c: c.debugging(seed=11), {"run.seed": 11}),
    "callbacks that are made": (lambda c: c.callbacks(functools.partial(RLlibCallback)), {}),
    "an attribute": (lambda c: setattr(c, "lr", 0.25), {"training.lr": 0.25}),
    "update_from_dict": (
        lambda c: c.update_from_dict({"lr": 0.5, "lambda": 0.7}),
        {"training.lr": 0.5, "training.gae_lambda": 0.7},
    ),
    "update_from_dict(vla)": (lambda c: c.update_from_dict({"vla": {"training": {"lr": 0.5}}}), {"training.lr": 0.5}),
}

REFUSED: dict[str, tuple[Write, str]] = {
    "another environment": (
        lambda c: c.environment("CartPole-v1"),
        "env.name: 'CartPole-v1' is not allowed: choose one of libero, tabletop",
    ),
    "a key of env_config": (
        lambda c: c.environment(env_config={"task": 1}),
        "env.task: unknown key; did you mean env.tasks",
    ),
    "a schedule": (lambda c: c.training(lr=[[0, 1e-3], [100, 0.0]]), "training.lr: .* is not allowed"),
    "no runner": (lambda c: c.env_runners(num_env_runners=0), "rollout.num_runners: 0 is not allowed"),
    "a batch of no runner": (
        lambda c: c.env_runners(num_env_runners=0).training(train_batch_size=512),
        "rollout.num_runners: 0 is not allowed",
    ),
    "RLlib's own default batch": (
        lambda c: c.training(train_batch_size=4000).env_runners(num_envs_per_env_runner=3),
        "4000 .* over 3 slots",
    ),
    "a fragment of whole episodes": (
        lambda c: c.update_from_dict({"vla": {"rollout": {"episodes_per_iteration": 4}}}).env_runners(
            rollout_fragment_length=8
        ),
        "rollout_fragment_length: rollout.episodes_per_iteration counts whole episodes",
    ),
    "metrics of the old API": (
        lambda c: c.reporting(keep_per_episode_custom_metrics=True),
        "keep_per_episode_custom_metrics: .* no effect",
    ),
    "a batch that does not divide": (
        lambda c: c.training(train_batch_size=130),
        "train_batch_size: 130 .* over 4 slots .* set rollout.steps_per_iteration",
    ),
    "two values of one key": (
        lambda c: c.training(train_batch_size=64).env_runners(rollout_fragment_length=8),
        "train_batch_size: sets rollout.steps_per_iteration to 16, but rollout_fragment_length sets it to 8; set "
        "one of them",
    ),
    "a setting and a field": (
        lambda c: c.update_from_dict({"lr": 0.5, "vla": {"training": {"lr": 0.25}}}),
        "lr: sets training.lr to 0.5, but the settings say 0.25; set one of them",
    ),
    "explore": (
        lambda c: c.env_runners(explore=False),
        "explore: False would have no effect .* evaluations are greedy",
    ),
    "batch_mode": (
        lambda c: c.env_runners(batch_mode="complete_episodes"),
        "batch_mode: .* set rollout.episodes_per_iteration",
    ),
    "sample_timeout_s": (
        lambda c: c.env_runners(sample_timeout_s=5),
        "sample_timeout_s: .* set rollout.timeout_seconds",
    ),
    "GPUs of a runner": (
        lambda c: c.env_runners(num_gpus_per_env_runner=1),
        "num_gpus_per_env_runner: .* without reserving one",
    ),
    "use_gae": (lambda c: c.training(use_gae=False), "use_gae: .* set training.advantages"),
    "use_critic": (lambda c: c.training(use_critic=False), "use_critic: .* grpo or rloo"),
    "use_kl_loss": (lambda c: c.training(use_kl_loss=True), "use_kl_loss: .* set training.kl_coeff"),
    "a network": (lambda c: c.training(model={"fcnet_hiddens": [64]}), "model: .* set the keys of model"),
    "a module's config": (lambda c: c.rl_module(model_config={"hidden": 1}), "model_config: .* set the keys of model"),
    "runners of evaluations": (
        lambda c: c.evaluation(evaluation_num_env_runners=1),
        "evaluation_num_env_runners: .* runners of training",
    ),
    "an evaluation's config": (
        lambda c: c.evaluation(evaluation_config={"explore": True}),
        "evaluation_config: .* greedy",
    ),
    "time of an evaluation": (
        lambda c: c.evaluation(evaluation_duration_unit="timesteps"),
        "evaluation_duration_unit: .* leave it at episodes",
    ),
    "num_gpus": (lambda c: c.resources(num_gpus=1), "num_gpus: .* learners.gpus and engines.gpus"),
    "TensorFlow": (lambda c: c.framework("tf2"), "framework: 'tf2' would have no effect on VLAPPO; leave it at torch"),
    "offline data": (lambda c: c.offline_data(input_=["data"]), "input_: .* would have no effect"),
    "many agents": (
        lambda c: c.multi_agent(policies_to_train=["default_policy"]),
        "policies_to_train: .* would have no effect",
    ),
    "a misspelt field": (
        lambda c: c.update_from_dict({"num_env_runnerz": 2}),
        "num_env_runnerz: RLlib has no such field; did you mean num_env_runners",
    ),
    "restarts": (
        lambda c: c.fault_tolerance(restart_failed_env_runners=False),
        "restart_failed_env_runners: .* always replaced",
    ),
    "a callback of every step": (
        lambda c: c.callbacks(StepCallback),
        "StepCallback.on_episode_step would never be called; use on_episode_end",
    ),
    "a callback of every step, made": (
        lambda c: c.callbacks(functools.partial(StepCallback)),
        "StepCallback.on_episode_step would never",
    ),
    "a function of every step": (
        lambda c: c.callbacks(on_episode_step=print),
        "callbacks_on_episode_step: .* would have no effect",
    ),
}


class StepCallback(RLlibCallback):
    def on_episode_step(self, **kwargs: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize(("write", "expected"), REACHES.values(), ids=REACHES)
def test_it_reaches_the_settings(write: Write, expected: dict[str, Any]) -> None:
    config = make()
    write(config)
    config.validate()
    assert {key: value_of(config.settings(), key) for key in expected} == expected
    assert Settings.from_dict(config.vla) == config.settings(), "what actors read"
    config.validate()  # of a trial, once more
    assert {key: value_of(config.settings(), key) for key in expected} == expected


@pytest.mark.parametrize(("write", "said"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_in_one_line(write: Write, said: str) -> None:
    config = make()
    write(config)
    with pytest.raises(SettingsError, match=said) as error:
        config.validate()
    assert "\n" not in str(error.value)


def test_fields_say_what_the_settings_do() -> None:
    config = VLAPPOConfig.from_settings(
        Settings.from_dict({"env": {"name": "synthetic"}, "training": {"lr": 0.5}, "run": {"seed": 4}})
    )
    assert (config.lr, config.seed, config.num_envs_per_env_runner) == (0.5, 4, 4)


@pytest.mark.parametrize(
    "space",
    [{"lr": 0.5}, {"vla": {"env": {"name": "synthetic"}, "training": {"lr": 0.5}}}],
    ids=["RLlib's field", "the setting"],
)
def test_what_tune_samples_reaches_the_trial(space: dict[str, Any]) -> None:
    """As Tune does it: the experiment's config as a dictionary, sampled values in it, laid over the default config."""
    base = make().to_dict()
    for key, value in space.items():
        base[key] = base[key] | value if isinstance(value, dict) else value
    trial = VLAPPO.get_default_config().update_from_dict(base)
    trial.validate()
    assert trial.settings().training.lr == trial.lr == 0.5 and trial.settings().env.name == "synthetic"


def test_a_space_is_sampled_before_it_is_checked() -> None:
    space = make().training(lr=tune.grid_search([1e-3, 1e-4])).to_dict()
    assert space["lr"] == {"grid_search": [1e-3, 1e-4]} and space["vla"]["training"]["lr"] == 1e-5


def test_a_placeholder_in_the_settings_is_one() -> None:
    """Tune makes a trial for each value of each placeholder that it finds."""
    space = make().to_dict()
    space["vla"]["training"] |= {"lr": tune.grid_search([1e-3, 1e-4])}
    assert len(list(generate_variants(space))) == 2


def test_an_evaluation_where_there_was_none() -> None:
    config = VLAPPOConfig.from_settings(
        Settings.from_dict({"env": {"name": "synthetic"}, "evaluation": {"episodes": 0}})
    )
    config.evaluation(evaluation_duration=1)
    config.validate()
    assert config.settings().evaluation.episodes == 1


def test_a_setting_written_in_place_and_a_field_must_agree() -> None:
    config = make()
    config.vla["training"]["lr"] = 0.25
    config.training(lr=0.5)
    with pytest.raises(SettingsError, match=r"lr: sets training.lr to 0.5, but the settings say 0.25"):
        config.validate()


def test_bundles_are_those_of_the_fields() -> None:
    bundles = VLAPPO.default_resource_request(make().to_dict() | {"num_env_runners": 3}).bundles
    assert len(bundles) == 1 + 3 + 1 + 1  # the Algorithm, runners, learner, engine


def test_a_subclass_keeps_its_classes() -> None:
    """They are not derived from the settings, so validating must not undo them."""

    class Learner(make().get_default_learner_class()):  # type: ignore[misc]
        pass

    config = make()
    config.training(learner_class=Learner)
    config.validate()
    assert config.learner_class is Learner


def test_the_tables_name_fields_that_rllib_has() -> None:
    known = set(vars(VLAPPOConfig()))
    assert set(HONOURED) <= known and set(REMEDIES) <= known and known >= PASSED_ON
    assert not set(REMEDIES) & (set(HONOURED) | PASSED_ON)
    assert set(fields_of(VLAPPOConfig())).isdisjoint(PASSED_ON)


def test_the_documentation_names_every_field_that_is_honoured() -> None:
    table = (Path(__file__).parents[2] / "docs" / "rllib.md").read_text()
    assert [name for name in HONOURED if name.strip("_") not in table] == []


def test_what_our_config_has_beyond_rllibs_is_its_own() -> None:
    """A new attribute that is not listed would be taken for one that somebody has set in vain."""
    assert set(vars(VLAPPOConfig())) - set(vars(PPOConfig())) == OWN
