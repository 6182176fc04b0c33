"""The whole loop inside one Ray: real vLLM, FSDP learner, environment subprocesses; and what happens when one of them
is killed."""

import contextlib
import functools
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from vlarl_rllib import VLAPPO, VLAPPOConfig
from vlarl_rllib.observability.metrics import iteration_row
from vlarl_rllib.process.calls import EndRequested
from vlarl_rllib.process.source_revision import source_revision
from vlarl_rllib.rewards.classifier import ClassifierConfig, SuccessClassifier
from vlarl_rllib.rewards.worker import RewardService
from vlarl_rllib.rllib_compat import runner_actors
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.settings import Settings
from vlarl_rllib.telemetry.table import METRICS, Kind

STEPS = 4 * 16
"""Steps of one iteration below: 4 slots of 16."""


@pytest.fixture(scope="module")
def algorithm(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLAPPO]:
    judge = tmp_path_factory.mktemp("judge")
    SuccessClassifier(ClassifierConfig(28, ("red", "green"))).save(judge)
    worker_class = faulty_worker_class()
    settings = Settings.from_dict(
        {
            "env": {"name": "synthetic", "tasks": [0, 1], "num_envs": 4, "num_processes": 2, "max_steps": 10},
            "rollout": {"steps_per_iteration": 16},
            "learners": {"num": 1, "micro_batch_size": 32},
            "training": {"minibatch_size": 32, "lr": 1e-4},
            "rewards": {"process": 0.1, "judge": str(judge), "timeout_seconds": 5},
            "evaluation": {"episodes": 6},
            "run": {"iterations": 100, "seed": 1},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "vlarl_rllib.rollout.services.RewardService", functools.partial(RewardService, worker_class=worker_class)
        )
        algorithm = VLAPPOConfig.from_settings(settings, tmp_path_factory.mktemp("run")).build_algo()
    yield algorithm
    algorithm.stop()


def faulty_worker_class() -> type:
    """A class of this function, so that Ray ships it by value: it fails as the file `fault` beside the judge says."""
    from vlarl_rllib.rewards.worker import RewardWorker

    class FaultyWorker(RewardWorker):
        def __init__(self, directory: str, *arguments: str) -> None:
            super().__init__(directory, *arguments)
            self._fault = Path(directory) / "fault"

        def judge(self, images: Any, instruction: str) -> Any:
            fault = self._fault.read_text() if self._fault.is_file() else ""
            if fault == "raise":
                raise RuntimeError("CUDA out of memory")
            if fault == "hang":
                self._fault.unlink()
                time.sleep(3600)
            scores = super().judge(images, instruction)
            return scores * float("nan") if fault == "nan" else scores

    import time
    from pathlib import Path

    return FaultyWorker


def train(algorithm: VLAPPO) -> dict[str, Any]:
    """One iteration, whole and with the weights that were pushed last."""
    row = iteration_row(algorithm.train())
    assert row["logprob_gap_max"] < 1e-4, "the engine sampled with other weights than the learner's"
    return row


def newest(algorithm: VLAPPO) -> dict[str, Any]:
    """The row of the last iteration; of a new one where there is none."""
    return iteration_row(algorithm._last_result) if algorithm.iteration else train(algorithm)


def while_sampling(algorithm: VLAPPO, action: Callable[..., Any], *arguments: Any) -> None:
    """Do it in the middle of the iteration that is to come: once the engine has answered for one in eight steps."""
    (engine,) = algorithm.engine_pool.handles
    wanted = ray.get(engine.status.remote()).num_decisions + STEPS // 8

    def wait_and_act() -> None:
        while ray.get(engine.status.remote()).num_decisions < wanted:
            time.sleep(0.01)
        action(*arguments)

    threading.Thread(target=wait_and_act, daemon=True).start()


def processes(algorithm: VLAPPO) -> dict[str, Any]:
    """What a user would find out who is who with."""
    return json.loads((algorithm.checkpoints.store.root.parent / "processes.json").read_text())


def environment_pids(algorithm: VLAPPO) -> list[int]:
    return algorithm.env_runner_group.foreach_env_runner(
        lambda runner: runner.env.processes.pids(), local_env_runner=False
    )[0]


def runner_pid(algorithm: VLAPPO) -> int:
    return processes(algorithm)["runners"]["1"]["runner"]


def engine_pid(algorithm: VLAPPO) -> int:
    return algorithm.engine_pool.statuses()[0].pid


def test_sampled_log_probs_are_the_learners_and_versions_rise(algorithm: VLAPPO) -> None:
    first, second = train(algorithm), train(algorithm)
    assert first["initial_evaluation"]["episodes"] == 6 and set(
        first["initial_evaluation"]["success_rate_by_task"]
    ) == {"0", "1"}
    assert first["evaluation"] is second["initial_evaluation"] is second["evaluation"] is None
    assert (first["env_steps"], second["env_steps"]) == (STEPS, 2 * STEPS)
    assert second["policy_version"] == first["policy_version"] + 1 == algorithm.engine_pool.statuses()[0].policy_version
    for row in (first, second):
        assert row["first_clip_fraction"] == 0.0
        assert row["first_ratio_deviation"] < 1e-4
        assert row["approx_kl"] > 0.0 and row["grad_norm"] > 0.0, (
            "nothing was learned, so the equality above would mean nothing"
        )
        assert row["episodes"] > 0 and row["sync_bytes"] > 1e6
        assert row["episode_length"] > 0 and row["return_mean"] is not None and row["git_revision"] == source_revision()
    assert 0 < second["timestamp"] - first["timestamp"] < time.time() - first["timestamp"] < 600


def run_name(algorithm: VLAPPO) -> str:
    return Path(str(algorithm.config.run_dir)).name


def test_actors_are_called_after_the_run(algorithm: VLAPPO) -> None:
    run = run_name(algorithm)
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    roles = ("engine-0", "learner-0", "reward", "runner-1")
    assert sorted(name for name in names if name.startswith(f"{run}/")) == [f"{run}/{role}" for role in roles]
    actors = [
        *algorithm.engine_pool.handles,
        *algorithm.learner_group.ranks.workers,
        algorithm.reward_service.handle,
        *runner_actors(algorithm.env_runner_group).values(),
    ]
    assert ray.get([actor.__ray_call__.remote(repr) for actor in actors]) == [f"{run}/{role}" for role in roles]
    assert repr(algorithm) == f"{run}/algorithm"


def test_rllib_has_imported_no_tensorflow_for_anybody(algorithm: VLAPPO) -> None:
    newest(algorithm)

    def loaded(*actor: Any) -> set[str]:
        import sys

        return {"ray.rllib", "tensorflow", "jax"} & sys.modules.keys()

    runners = algorithm.env_runner_group.foreach_env_runner(loaded, local_env_runner=False)
    others = [*algorithm.learner_group.ranks.workers, *algorithm.engine_pool.handles, algorithm.reward_service.handle]
    learner, engine, reward_worker = ray.get([actor.__ray_call__.remote(loaded) for actor in others])
    assert [*runners, learner, engine, reward_worker] == [{"ray.rllib"}, {"ray.rllib"}, set(), set()]


def test_a_module_without_weights_says_where_they_are(algorithm: VLAPPO) -> None:
    with pytest.raises(RuntimeError, match=r"no weights.*learners.num 0, or load what vlarl export writes$"):
        algorithm.get_module().compute_values({})


def test_a_killed_environment_process_costs_its_running_episodes_only(algorithm: VLAPPO) -> None:
    before = newest(algorithm)
    pids = environment_pids(algorithm)
    while_sampling(algorithm, os.kill, pids[0], signal.SIGKILL)
    row = train(algorithm)
    assert row["env_deaths"] >= 1, "the kill came too late to test anything"
    assert row["env_steps"] == before["env_steps"] + STEPS
    after = environment_pids(algorithm)
    assert after[0] != pids[0] and after[1] == pids[1]
    assert train(algorithm)["env_deaths"] == 0


def test_a_killed_runner_comes_back(algorithm: VLAPPO) -> None:
    before = newest(algorithm)
    pid = runner_pid(algorithm)
    children = environment_pids(algorithm)
    while_sampling(algorithm, os.kill, pid, signal.SIGKILL)
    row = train(algorithm)
    assert row["env_steps"] >= before["env_steps"] + STEPS
    deadline = time.monotonic() + 10
    while (
        any(os.path.exists(f"/proc/{child}/environ") and _alive(child) for child in children)
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert not any(_alive(child) for child in children), "the dead runner's environments live on"


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_reward_worker_costs_no_reward_and_serves_again(algorithm: VLAPPO) -> None:
    before = train(algorithm)
    assert before["reward_cpu_retries"] == before["reward_zeros"] == 0, "the worker judges"
    pid = processes(algorithm)["reward_worker"]

    def kill_it_when_fragments_are_to_be_judged(runner: Any) -> None:
        play = runner._play

        def play_then_kill(*arguments: Any) -> Any:
            del runner._play
            played = play(*arguments)
            os.kill(pid, signal.SIGKILL)
            return played

        runner._play = play_then_kill

    algorithm.env_runner_group.foreach_env_runner(kill_it_when_fragments_are_to_be_judged, local_env_runner=False)
    row = train(algorithm)
    assert row["env_steps"] == before["env_steps"] + STEPS and row["reward_zeros"] == 0 < row["reward_cpu_retries"]
    deadline = time.monotonic() + 60
    while (
        row["faults"]["reward_worker_restarts"] == before["faults"]["reward_worker_restarts"]
        or row["reward_cpu_retries"]
    ):
        assert time.monotonic() < deadline and row["reward_zeros"] == 0
        row = train(algorithm)
    assert processes(algorithm)["reward_worker"] != pid and not _alive(pid)
    errors = [
        file.read_text()
        for file in (algorithm.checkpoints.store.root.parent / "reward_errors").glob("reward_process_*.txt")
    ]
    assert errors and all("ActorUnavailableError" in error or "ActorDiedError" in error for error in errors)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raise", "CUDA out of memory"),
        ("nan", "scores lie in [0, 1], got nan"),
        ("hang", "gave no answer within 4.5 s"),
    ],
)
def test_a_reward_worker_that_raises_lies_or_hangs_costs_no_reward(
    algorithm: VLAPPO, monkeypatch: pytest.MonkeyPatch, fault: str, told: str
) -> None:
    before = train(algorithm)
    assert before["reward_cpu_retries"] == 0
    monkeypatch.setattr(algorithm.reward_service, "_patience_seconds", 2.0)
    file = Path(algorithm._vla.rewards.judge or "") / "fault"
    file.write_text(fault)
    row = train(algorithm)
    file.unlink(missing_ok=True)
    assert row["env_steps"] == before["env_steps"] + STEPS and row["reward_zeros"] == 0 < row["reward_cpu_retries"]
    assert row["faults"]["reward_cpu_retries"] == before["faults"]["reward_cpu_retries"] + row["reward_cpu_retries"]
    errors = [
        file.read_text()
        for file in (algorithm.checkpoints.store.root.parent / "reward_errors").glob("reward_process_*.txt")
    ]
    assert any(told in error for error in errors)
    deadline = time.monotonic() + 60
    while train(algorithm)["reward_cpu_retries"]:
        assert time.monotonic() < deadline, "the worker does not serve again"


def test_a_frozen_environment_is_ended(algorithm: VLAPPO) -> None:
    before = newest(algorithm)
    set_on_loops(algorithm, "_env_timeout", 2.0)
    pid = environment_pids(algorithm)[1]
    os.kill(pid, signal.SIGSTOP)
    row = train(algorithm)
    set_on_loops(algorithm, "_env_timeout", 600.0)
    assert row["faults"]["env_deaths"] == before["faults"]["env_deaths"] + 2, (
        "both slots of the process lose their episode"
    )
    assert row["env_steps"] == before["env_steps"] + STEPS
    assert not _alive(pid)


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Played again from the same checkpoint."""
    for name in ("iteration", "token_checksum", "env_steps"):
        assert [row[name] for row in rows] == [row[name] for row in expected], name
    for name in ("first_policy_loss", "first_value_loss"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], abs=1e-5), name
        assert all(row[name] != 0 for row in rows)


def test_an_engine_that_freezes_while_it_samples_is_replaced_and_the_tokens_stay_the_same(
    algorithm: VLAPPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = newest(algorithm)
    algorithm.save_to_path(tmp_path)
    expected = train(algorithm)
    algorithm.restore_from_path(tmp_path)
    set_on_loops(algorithm, "_request_timeout", 2.0)
    monkeypatch.setattr(algorithm.engine_pool, "_ping_timeout_seconds", 2.0)
    pid = engine_pid(algorithm)
    while_sampling(algorithm, os.kill, pid, signal.SIGSTOP)
    row = train(algorithm)
    set_on_loops(algorithm, "_request_timeout", 120.0)
    assert row["engine_failures"] >= 1 and row["faults"]["engine_restarts"] == before["faults"]["engine_restarts"] + 1
    assert row["env_steps"] == before["env_steps"] + STEPS, "a step was lost with the engine"
    assert_same([row], [expected])
    assert not _alive(pid)


def test_an_engine_that_dies_while_it_takes_weights_gets_them_after_its_restart(algorithm: VLAPPO) -> None:
    newest(algorithm)
    pid = engine_pid(algorithm)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()  # by now it has been told to load, and has not begun
    algorithm.weight_sync.push()
    status = algorithm.engine_pool.statuses()[0]
    assert status.pid != pid and status.policy_version == algorithm.weight_sync.version
    train(algorithm)


def test_a_killed_learner_is_replaced_and_plays_the_iterations_since_its_checkpoint_again(
    algorithm: VLAPPO, tmp_path: Path
) -> None:
    algorithm.save_checkpoint(str(tmp_path))
    expected = [train(algorithm) for _ in range(2)]
    assert expected[0]["token_checksum"] != expected[1]["token_checksum"]
    faults, engines, version = expected[-1]["faults"], algorithm.engine_pool.pids, algorithm.weight_sync.version
    os.kill(algorithm.learner_group.pids[0], signal.SIGKILL)
    again = [train(algorithm) for _ in range(2)]
    assert_same(again, expected)
    assert again[0]["faults"]["learner_restarts"] == faults["learner_restarts"] + 1
    assert again[0]["faults"]["repeated_iterations"] == faults["repeated_iterations"] + 2
    assert again[0]["policy_version"] > version, "the version must not decrease"
    assert algorithm.engine_pool.pids == engines, "the engines are to stay"


def test_a_runner_that_dies_before_the_learners_have_its_steps_plays_them_again(
    algorithm: VLAPPO, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = newest(algorithm)
    receive = algorithm.learner_group.receive

    def kill_then_receive(refs: list[Any], num_steps: list[int]) -> list[int]:
        monkeypatch.undo()
        os.kill(runner_pid(algorithm), signal.SIGKILL)
        time.sleep(3.0)  # what it had can still be fetched for about a second
        wait_until_answers(algorithm.env_runner_group._worker_manager.actors()[1])  # so that RLlib never sees it dead
        return receive(refs, num_steps)

    monkeypatch.setattr(algorithm.learner_group, "receive", kill_then_receive)
    row = train(algorithm)
    assert row["faults"]["dropped_steps"] == before["faults"]["dropped_steps"] + STEPS
    assert row["faults"]["runner_restarts"] == before["faults"]["runner_restarts"] + 1
    assert row["env_steps"] == before["env_steps"] + 2 * STEPS
    assert row["optimizer_steps"] == before["optimizer_steps"]


def wait_until_answers(actor: Any) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(ray.exceptions.RayActorError):
            return ray.get(actor.ping.remote())
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_frozen_runner_is_noticed_within_its_time_out(algorithm: VLAPPO, monkeypatch: pytest.MonkeyPatch) -> None:
    before, end = newest(algorithm), algorithm.collector._end
    monkeypatch.setattr(algorithm.collector, "_timeout_seconds", 3.0)

    def end_and_be_patient(index: int, method: str) -> None:
        monkeypatch.undo()  # the new runner has a machine's start behind it
        end(index, method)

    monkeypatch.setattr(algorithm.collector, "_end", end_and_be_patient)
    pid = runner_pid(algorithm)
    os.kill(pid, signal.SIGSTOP)
    row = train(algorithm)
    assert row["faults"]["runner_restarts"] == before["faults"]["runner_restarts"] + 1
    assert not _alive(pid)


def test_a_checkpoint_that_cannot_be_written_is_counted_and_the_older_one_stays(
    algorithm: VLAPPO, tmp_path: Path
) -> None:
    algorithm.save_checkpoint(str(tmp_path))
    good, kept = algorithm.checkpoints.store.newest(), sorted(algorithm.checkpoints.store.root.iterdir())
    before = train(algorithm)
    learner = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, -1))"
    algorithm.learner_group.call(
        "apply", lambda _: exec(learner.format(1000))
    )  # a write beyond that fails, as on a full disk
    algorithm.save_checkpoint(str(tmp_path))
    algorithm.learner_group.call("apply", lambda _: exec(learner.format(-1)))
    assert CheckpointStore.resolve(tmp_path) == good == algorithm.checkpoints.store.newest()
    assert sorted(algorithm.checkpoints.store.root.iterdir()) == kept, "half a checkpoint was left"
    row = train(algorithm)
    assert row["faults"]["failed_checkpoints"] == before["faults"]["failed_checkpoints"] + 1
    algorithm.save_checkpoint(str(tmp_path))
    assert CheckpointStore.resolve(tmp_path) != good


def test_iterations_and_syncs_leave_nothing_behind(algorithm: VLAPPO) -> None:
    """The short form of test_soak.py."""
    train(algorithm)
    roles = processes(algorithm)
    pids = [
        *roles["engines"],
        *roles["learners"],
        roles["reward_worker"],
        runner_pid(algorithm),
        *environment_pids(algorithm),
    ]

    def sync_and_measure() -> tuple[list[int], list[int], float]:
        for _ in range(5):
            algorithm.weight_sync.push()
        train(algorithm)
        train(algorithm)
        time.sleep(2.0)  # Ray frees what nobody refers to, and tells of it, a moment later
        all_of_it, free = (of["object_store_memory"] for of in (ray.cluster_resources(), ray.available_resources()))
        found = [psutil.Process(pid) for pid in pids]
        return [p.num_fds() for p in found], [p.memory_info().rss for p in found], all_of_it - free

    before, after = sync_and_measure(), sync_and_measure()
    assert after[0] == before[0], "file descriptors"
    assert after[1] == pytest.approx(before[1], rel=0.02), "resident memory"
    assert after[2] <= before[2] + 2**20, "bytes in Ray's object store"


def test_an_end_while_sampling_saves_the_last_iteration_and_drops_the_running_one(
    algorithm: VLAPPO, tmp_path: Path
) -> None:
    train(algorithm)
    row = train(algorithm)
    algorithm.save_to_path(tmp_path / "before")
    iteration, version = algorithm.iteration, algorithm.weight_sync.version
    while_sampling(algorithm, algorithm._pulse.ended.set)
    began = time.monotonic()
    result = algorithm.train()
    assert "vlarl" not in result and result["done"] and algorithm.iteration == iteration == row["iteration"]
    assert time.monotonic() - began < 3.0, "`ray job stop` kills then"
    saved = algorithm.checkpoints.store.newest()
    assert saved.name == f"iteration_{iteration:06d}"
    assert CheckpointStore.read_facts(saved) == CheckpointStore.read_facts(tmp_path / "before")
    shards = "learners/shards/__0_0.distcp"
    assert (saved / shards).read_bytes() == (tmp_path / "before" / shards).read_bytes(), "the update had begun"
    written = saved.stat().st_mtime_ns
    algorithm.save_checkpoint(str(tmp_path))  # Tune's, behind it
    assert CheckpointStore.resolve(tmp_path) == saved and saved.stat().st_mtime_ns == written
    play = functools.partial(algorithm._evaluation.play, algorithm.collector)
    assert play(after=iteration) is None, "the iteration before it counts"
    with pytest.raises(EndRequested):
        play(after=0)
    algorithm._pulse.ended.clear()
    algorithm.restore_from_path(saved)
    assert algorithm.weight_sync.version > version and train(algorithm)["iteration"] == iteration + 1


def set_on_loops(algorithm: VLAPPO, name: str, value: float) -> None:
    algorithm.env_runner_group.foreach_env_runner(
        lambda runner: setattr(runner._loop, name, value), local_env_runner=False
    )


def test_a_checkpoint_ends_the_running_episodes(algorithm: VLAPPO, tmp_path: Any) -> None:
    algorithm.save_to_path(tmp_path)
    assert (tmp_path / "facts.json").is_file() and (tmp_path / "learners" / "shards" / ".metadata").is_file()
    playing = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: [p.playing for p in runner._players.values()], local_env_runner=False
    )
    assert playing == [[False] * 4]
    version = algorithm.weight_sync.version
    algorithm.restore_from_path(tmp_path)
    assert algorithm.weight_sync.version == version + 1
    train(algorithm)


def test_metrics_reach_the_port_that_prometheus_scrapes(algorithm: VLAPPO) -> None:
    """As far as this run has what they need; ten seconds are Ray's interval, which are over by the last test."""
    newest(algorithm)
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    expected = {
        metric.exported + ("_count" if metric.kind is Kind.HISTOGRAM else "")
        for metric in METRICS.values()
        if metric.needs != "a GPU"
    }
    label, deadline, found = f'run="{run_name(algorithm)}"', time.monotonic() + 40, set[str]()
    while not expected <= found and time.monotonic() < deadline:
        with urllib.request.urlopen(address) as answer:
            lines = answer.read().decode().splitlines()
        found = {line.partition("{")[0] for line in lines if label in line and 'suite="synthetic"' in line}
        time.sleep(0.5)
    assert expected - found == set()
