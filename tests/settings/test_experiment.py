"""Experiment files: what they mean, and what is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.settings.experiment import Distribution, Experiment
from vlarl_rllib.settings.in_place import can_change_in_place, needs_new_processes
from vlarl_rllib.settings.overrides import with_keys

EXPERIMENTS = sorted((Path(__file__).parents[2] / "tune_experiments").glob("*.yaml"))
CONFIG: dict[str, Any] = {
    "env": {"name": "synthetic", "num_processes": 1},
    "engines": {"num": 0},
    "evaluation": {"every": 2, "episodes": 4},
    "run": {"iterations": 6},
}
LR = {"training.lr": {"loguniform": [1e-6, 1e-4]}}


def read(tmp_path: Path, *overrides: str, **values: Any) -> Experiment:
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump({"config": CONFIG, **values}))
    return Experiment.from_yaml(file, overrides)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_shipped_experiment_is_possible(file: Path) -> None:
    assert Experiment.from_yaml(file).num_trials > 1


def test_a_config_beside_the_file_with_changes(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONFIG | {"training": {"lr": 0.5}}))
    found = read(
        tmp_path,
        "training.gamma=0.5",
        config="base.yaml",
        set={"training.lr": 0.25, "run.seed": 3},
        search={"training.num_epochs": [1, 2]},
    )
    assert (found.base.training.lr, found.base.training.gamma, found.base.run.seed) == (0.25, 0.5, 3)


def test_trials_are_counted_and_every_combination_is_looked_at(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        search={**LR, "training.num_epochs": [1, 2]},
        variants=[{"env.tasks": [0], "training.gamma": 0.9}, {"env.tasks": [1], "training.gamma": 0.8}],
        seeds=[4, 5, 6],
        samples=5,
    )
    assert found.num_trials == 5 * 2 * 2 * 3
    looked_at = [(s.training.num_epochs, s.env.tasks, s.training.gamma, s.training.lr) for s in found.combinations()]
    assert looked_at == [
        (epochs, tasks, gamma, lr)
        for epochs in (1, 2)
        for tasks, gamma in (([0], 0.9), ([1], 0.8))
        for lr in (1e-6, 1e-4)
    ]
    assert [s.env.tasks for s in found.kinds()] == [[0], [1]], "epochs and rates need no other processes"
    assert found.metric == "evaluation_success_rate" and set(found.drawn) == {"training.lr"}


def test_a_written_experiment_is_the_same_one(tmp_path: Path) -> None:
    found = read(tmp_path, search=LR, samples=3, set={"training.gamma": 0.7}, scheduler={"pbt": {"perturb_every": 3}})
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(found.to_dict()))
    other = Experiment.from_yaml(again)
    assert (other.base, other.space, other.spec.scheduler) == (found.base, found.space, found.spec.scheduler)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "search: nothing to search over"),
        ({"search": {"training.lrr": [1.0]}}, "training.lrr: unknown key; did you mean training.lr?"),
        ({"search": {"training.lr": [1e-5, -1.0]}}, "search: training.lr: -1.0 is not allowed"),
        ({"search": {"training.lr": []}}, "training.lr has an empty list"),
        ({"search": {"training.lr": 0.1}}, "give a list of values, or one of uniform"),
        ({"search": {"training.lr": {"loguniform": [0.0, 1.0]}}}, "training.lr: loguniform"),
        ({"search": {"training.lr": {"uniform": [0.2, 0.1]}}}, "the first must be the smaller"),
        ({"search": {"training.lr": {"normal": [0.2, 0.1]}}}, "or one of uniform"),
        ({"search": {"training.clip_low": {"uniform": [0.1, 1.5]}}}, "training.clip_low: 1.5 is not allowed"),
        ({"search": {"run.seed": [1, 2]}}, "run.seed cannot be searched over; list them under seeds"),
        ({"search": {"run.iterations": [1, 2]}}, "run.iterations cannot be searched over"),
        ({"search": {"env.num_envs": [1, 2]}, "reuse_actors": True}, "reuse_actors: env.num_envs needs new processes"),
        ({"variants": [{"model.path": "tiny"}], "reuse_actors": True}, "reuse_actors: model.path needs new processes"),
        ({"seeds": [0, 1], "samples": 2}, "nothing is drawn"),
        ({"search": {"training.lr": [0.1]}, "sampler": "optuna"}, "optuna draws from distributions"),
        ({"search": LR, "sampler": "gridd"}, "sampler"),
        (
            {
                "search": LR,
                "metric": "evaluation_success_rate",
                "set": {"evaluation.episodes": 0, "evaluation.every": 0},
            },
            "needs evaluations",
        ),
        ({"search": LR, "scheduler": {"asha": {}}, "set": {"evaluation.every": 0}}, "evaluation.every is 0"),
        ({"search": LR, "scheduler": {"asha": {"grace_iterations": 6}}}, "is not below run.iterations"),
        ({"search": LR, "samples": 2, "scheduler": {"asha": {"grace_iterations": 2}, "pbt": {}}}, "exclude each other"),
        ({"search": {"training.lr": [0.1]}, "scheduler": {"pbt": {}}}, "pbt changes what is drawn"),
        ({"search": LR, "scheduler": {"pbt": {}}}, "needs at least 2 trials"),
        ({"search": LR, "samples": 2, "concurrent": 1, "scheduler": {"pbt": {}}}, "concurrent: 1, but all trials"),
        ({"search": LR, "set": {"training.lr": 0.1}}, "training.lr is given twice"),
        ({"search": LR, "variants": [{"training.lr": 0.1}]}, "training.lr is given twice"),
        ({"seeds": [0, 1], "set": {"run.seed": 3}}, "run.seed is given twice"),
        ({"search": {"run.checkpoint_every": [1, 2]}}, "run.checkpoint_every cannot be searched over"),
        ({"search": {"training.lr": {"quniform": [0.1, 0.25, 0.1]}}}, "must be multiples of its step"),
        ({"search": LR, "scheduler": {"asha": {"grace_iterations": 1}}}, "no trial has been evaluated yet"),
        (
            {"search": LR, "samples": 2, "seeds": [0, 1], "scheduler": {"pbt": {}}},
            "leave out lists, variants and seeds",
        ),
        ({"search": LR, "schedular": {}}, "schedular: unknown key; did you mean scheduler?"),
        ({"seeds": [0], "variants": [{"rollout.group_size": 2}]}, "rollout.group_size"),
        ({"config": "nowhere.yaml", "seeds": [0]}, "no such file"),
        ({"seeds": [True]}, "true and false are no value of this key"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_mistake_is_one_line(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as raised:
        read(tmp_path, **values)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_values_are_kept_within_their_bounds() -> None:
    assert Distribution("uniform", (0.1, 0.4)).clamp(0.5) == 0.4
    assert Distribution("quniform", (0.1, 0.4, 0.1)).clamp(0.01) == 0.1
    assert Distribution("randint", (1, 4)).clamp(4) == 3, "Tune leaves out the upper bound"
    assert Distribution("choice", (0.2, 0.4, None)).clamp(None) is None


def test_what_can_change_without_a_new_process() -> None:
    assert can_change_in_place("training.lr") and can_change_in_place("rewards.others.mine")
    other = ("env.num_envs", "rollout.num_runners", "rewards.judge", "model.lora", "training.values")
    assert not any(map(can_change_in_place, other))
    before = {"training": {"lr": 1}, "env": {"num_envs": 4, "name": "a"}, "model": {"lora": None}}
    now = {"training": {"lr": 2}, "env": {"num_envs": 4, "name": "b"}, "model": {"lora": {"rank": 4}}}
    assert needs_new_processes(before, now) == ["env.name", "model.lora.rank"]


def test_sampled_keys_are_set_one_by_one_and_as_variants() -> None:
    values = {"training": {"lr": 1.0}, "model": {"lora": None}}
    changes = {"training.lr": 2.0, "model.lora": {"rank": 4}, "variant": {"env.suite": "s", "training.gamma": 0.5}}
    assert with_keys(values, changes) == {
        "training": {"lr": 2.0, "gamma": 0.5},
        "model": {"lora": {"rank": 4}},
        "env": {"suite": "s"},
    }
    assert values == {"training": {"lr": 1.0}, "model": {"lora": None}}, "the original stays"


def test_a_section_under_set_is_its_keys(tmp_path: Path) -> None:
    assert read(tmp_path, set={"training": {"gamma": 0.5}}, seeds=[0, 1]).base.training.gamma == 0.5


def test_a_models_path_means_the_same_wherever_the_experiment_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    found = read(
        tmp_path,
        search={"model.path": ["./mine", "tiny"]},
        variants=[{"model.critic": "separate", "model.critic_path": "./mine"}],
    )
    assert found.space["model.path"].values == (str(tmp_path / "mine"), "tiny")
    assert found.spec.variants[0]["model.critic_path"] == str(tmp_path / "mine")
