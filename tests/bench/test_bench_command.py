"""`vlarl bench` as a user meets it: every benchmark on a tiny model, its table and its JSON."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command_helpers import run_here
from vlarl_rllib.bench import BENCHMARKS, measure
from vlarl_rllib.bench.result import Row

SMALL = (
    "env.num_envs=2",
    "env.num_processes=2",
    "rollout.steps_per_iteration=4",
    "training.minibatch_size=8",
    "learners.micro_batch_size=4",
    "sft.batch_size=8",
)
ROWS = {
    "rollout": [
        ("runner and engine", "product"), ("runner and engine", "product"),
        ("engine alone, calls of 2", "product"), ("engine alone, calls of 1", "product"),
        ("model in batches of 2", "plain"), ("model in batches of 1", "plain"),
        ("products of sampling", "ceiling"), ("runner and engine, of the engine alone", "part"),
    ],
    "update": [
        (words, kind)
        for what in ("update with its score pass", "update alone")
        for words, kind in (
            (what, "product"), (f"loop with PEFT, {what}", "plain"), (f"products, {what}", "ceiling"),
        )
    ],
    "sync": [
        ("push of all weights", "product"), ("push of what training changes", "product"),
        ("state_dict to the host, and load", "plain"), ("copy of as many bytes within the device", "ceiling"),
    ],
    "sft": [
        ("fine-tuning, from RLDS", "product"), ("loop in torch, tensors in memory", "plain"),
        ("products of training", "ceiling"),
    ],
    "iteration": [
        ("iteration", "product"), ("model in batches, then the plain update", "plain"),
        ("products of sampling, score pass and training", "ceiling"), ("while sampling", "part"),
        ("while sampling", "part"), ("while updating", "part"), ("an iteration: sample", "part"),
        ("an iteration: update", "part"), ("an iteration: sync", "part"), ("neither sampling nor update", "part"),
    ],
    "env": [
        ("1 process(es), a slot each", "product"), ("2 process(es), a slot each", "product"),
        ("one environment in a loop", "plain"), ("one simulator, never drawn", "ceiling"),
        ("reset of the same task", "part"),
    ],
}  # fmt: skip
"""Of each benchmark, those that are there whatever is measured; of parts there are more."""
ADAPTERS = ("model.lora.rank=4", "model.lora.targets=language_model")
OPTIONS = {
    "update": (*ADAPTERS, "training.values=engine", "--profile"),
    "sync": ADAPTERS,
    "sft": ("--profile",),
    "env": ("env.name=synthetic",),
    "iteration": ("engines.num=0", "learners.num=0"),  # actors of both are what rollout and sync start
    "rollout": ("--profile",),
}


@pytest.fixture
def bench(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs the command in this process; its JSON, and what it printed."""
    monkeypatch.setattr(measure, "SECONDS", 0.01)  # as few calls as there may be
    monkeypatch.setenv("COLUMNS", "200")

    def run(name: str, *options: str) -> tuple[dict[str, Any], str]:
        file = tmp_path / f"{name}.json"
        words = [option if option.startswith("--") else f"--set={option}" for option in (*SMALL, *options)]
        assert run_here("bench", name, *words, "--json", file) == 0
        return json.loads(file.read_text()), capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_product_plain_loop_and_ceiling(name: str, bench: Any) -> None:
    if name == "sft" and importlib.util.find_spec("tensorflow_datasets") is None:
        pytest.skip("RLDS data need the `data` extra")
    found, printed = bench(name, *OPTIONS.get(name, ()))
    rows = [Row(**row) for row in found["rows"]]
    heads = [(row.name, row.kind) for row in rows]
    left = list(heads)
    for head in ROWS[name]:
        left.remove(head)
    assert all(kind == "part" for _, kind in left), "rows that nobody knows"

    assert all(row.value > 0 for row in rows if row.kind != "part")
    for row in rows:
        assert any(all(cell in line for cell in row.cells) for line in printed.splitlines()), row
    assert "trained samples: decisions" in " ".join(printed.split()), "the rates are defined below the table"

    if name != "env":  # where ceilings grow with the processes
        ceilings = [row.value for row in rows if row.kind == "ceiling"]
        plain = [row.value for row in rows if row.kind == "plain"]
        for row in rows:
            if row.of_ceiling is not None:
                assert any(row.of_ceiling == pytest.approx(row.value / ceiling) for ceiling in ceilings)
            if row.over_plain is not None:
                assert any(row.over_plain == pytest.approx(row.value / other) for other in plain)
    assert any(row.over_plain and row.of_ceiling for row in rows if row.kind == "product")
    if name == "sync":
        (pushed,) = filter(None, (re.search(r"all weights, ([\d.]+) GB by", row.name) for row in rows))
        assert float(pushed[1]) == pytest.approx(found["counted"]["weight bytes"] / 1e9, rel=1e-3)
    assert bool(found["profile"]) == ("--profile" in OPTIONS.get(name, ()))
    assert all(operation["name"] in printed or len(operation["name"]) > 40 for operation in found["profile"])
    assert found["machine"]["cores"] and found["settings"]["env"]["num_envs"] == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rolout"], ("NAME: 'rolout' is no benchmark (did you mean rollout?)", *BENCHMARKS)),
        (["update", "--set", "training.lrr=1"], ("training.lrr: unknown key",)),
        (["update", "absent.yaml"], ("absent.yaml: no such file",)),
        (["sync", "--set", "engines.num=0"], ("engines.num: 0", "set it to at least 1")),
        (["update", "--set", "model.critic=separate"], ("model.critic: separate", "set it to shared_head")),
        (["rollout", "--set", "model.path=./absent"], ("model.path: no such directory",)),
        (["update", "--json", "."], ("--json: . is a directory",)),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_a_bench_mistake_is_one_line(
    words: list[str],
    expected: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, (told, error) = run_here("bench", *words), capsys.readouterr()
    assert code == 2 and told == "" and len(error.splitlines()) == 1, error
    assert all(part in error for part in expected), error
