"""Everything that lies beneath the public surface of Ray, RLlib and Tune, in one place: what to look at when Ray
changes (2.60).

Nothing of RLlib or Tune is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import ray
from ray.job_config import JobConfig

from vlarl_rllib.process.environment import environment_defaults, environment_without
from vlarl_rllib.process.lost_output import LOST

if TYPE_CHECKING:
    from ray.rllib.env.env_runner_group import EnvRunnerGroup

NAMESPACE = b"vlarl_rllib"
NameOptions = Callable[[str], dict[str, Any]]
"""Role of an actor -> Ray's options that name it, and say where it lies."""

# Ray


class Notes:
    """Short texts by name, seen by every process of a Ray: in its GCS, so that neither a disk nor an actor is
    needed."""

    @staticmethod
    def put(name: str, text: str) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(name, text, namespace=NAMESPACE)

    @staticmethod
    def get(name: str) -> str | None:
        from ray.experimental.internal_kv import _internal_kv_get

        found = _internal_kv_get(name, namespace=NAMESPACE)
        return None if found is None else found.decode()

    @staticmethod
    def remove(name: str) -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(name, namespace=NAMESPACE)


def ray_version_at(address: str, timeout_seconds: float) -> str:
    """The version of the Ray whose GCS answers at `host:port`; raises whatever is the matter."""
    metadata = ray._raylet.GcsClient(address=address).internal_kv_get(
        b"CLUSTER_METADATA", b"cluster", timeout=timeout_seconds
    )
    return str(json.loads(metadata)["ray_version"])


@contextmanager
def apart_from_our_signals() -> Iterator[None]:
    """Around `ray.init`, which sets a SIGTERM handler that would end this process with code 15.

    Ray's own processes get a process group of their own: whoever sends a signal to a whole group, as `timeout` and
    terminals do, means that the command is to end in order, which needs them. They end with this process.
    """
    in_a_group_of_its_own = partial(ray._private.services.ConsolePopen, process_group=0)
    with (
        patch.object(ray._private.utils, "set_sigterm_handler", lambda handler: None),
        patch.object(ray._private.services, "ConsolePopen", in_a_group_of_its_own),
    ):
        yield


def job_config(*, imports_from_here: bool) -> JobConfig:
    """Workers look for modules where this process does: Ray would add the working directory for them, unless told that
    it is a client's."""
    return JobConfig(_client_job=not imports_from_here)


@contextmanager
def _log_level(name: str, level: int) -> Iterator[None]:
    """A logger of Ray's says less."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def quiet_dashboard_client() -> Iterator[None]:
    """Around calls to the dashboard of a cluster: Ray's client tells its log of every upload, and of a token that is
    not there, and takes the address in RAY_ADDRESS for its own, whatever it is given."""
    modules = (
        "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging",
        "ray._private.authentication.http_token_authentication",
    )  # fmt: skip
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_log_level(module, logging.ERROR))
        stack.enter_context(environment_without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"))
        yield


def draining_nodes() -> dict[str, float | None]:
    """Nodes that are about to be taken away (GCS `DrainNode`), each with the Unix time when, None where nobody has said
    it."""
    return {node: at / 1000 if at else None for node, at in ray._private.state.state.get_draining_nodes().items()}


def nodes_in_use() -> set[str]:
    """The node of this process, and those of the actors that it and they have started."""
    context = ray.get_runtime_context()
    job = ray.JobID(bytes.fromhex(context.get_job_id()))
    actors = ray._private.state.state.actor_table(None, job_id=job, actor_state_name="ALIVE")
    return {context.get_node_id(), *(actor["Address"]["NodeID"] for actor in actors.values())}


# Tune


def trial_directory(trainable: Any) -> Path | None:
    """Tune's; None outside of Tune, or where its storage is not a local file system."""
    storage = trainable._storage
    return (
        Path(storage.trial_fs_path) if storage is not None and storage.storage_filesystem.type_name == "local" else None
    )


def trial_path(trial: Any) -> str:
    """The directory of a trial, as `trial_directory` names it inside of the trial."""
    return str(Path(trial.storage.trial_fs_path))


def trial_name(trainable: Any) -> str:
    """Tune's name of the trial; outside of Tune that of the directory for results."""
    return str(trainable.trial_name) if trainable._trial_info else Path(trainable.logdir).name


def result_without_checkpoint(trainable: Any) -> Any:
    """What `Trainable.save` returns to Tune where there is nothing to keep."""
    from ray.train._internal.session import _TrainingResult

    return _TrainingResult(checkpoint=None, metrics=dict(trainable._last_result or {}))


def successive_halving(column: str, **options: Any) -> Any:
    """Tune's ASHA, which `Tuner.restore` makes anew: what the trials have reached is told it again.

    Args:
        column: the metric, by its name in `metrics.jsonl`.
        options: of `AsyncHyperBandScheduler`.
    """
    from ray.tune.schedulers import AsyncHyperBandScheduler

    class Remembering(AsyncHyperBandScheduler):
        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, trial)
            if not (done := (trial.last_result or {}).get(self._time_attr, 0)):
                return  # it has no directory yet
            file = Path(trial_path(trial)) / "metrics.jsonl"
            for line in file.read_text().splitlines() if file.is_file() else ():
                row = json.loads(line)
                if row["iteration"] <= done and row[column] is not None:
                    self._trial_info[trial.trial_id].on_result(trial, row["iteration"], row[column])

    return Remembering(**options)


def population_based_training(**options: Any) -> Any:
    """Tune's scheduler in lock-step, which `Tuner.restore` makes anew: it would look at the population too early, and
    then find nobody who may go on.

    It is in lock-step because a trial that does not run alone may otherwise overtake itself again and again while the
    others wait.

    Args:
        options: of `PopulationBasedTraining`.
    """
    from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

    class InLockStep(PopulationBasedTraining):
        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, trial)
            done = (trial.last_result or {}).get(self._time_attr, 0)
            last = done - done % self._perturbation_interval
            self._trial_state[trial].last_perturbation_time = last
            next_look: int = self._next_perturbation_sync  # type: ignore[has-type]
            self._next_perturbation_sync = max(next_look, last + self._perturbation_interval)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision: str = super().on_trial_result(tune_controller, trial, result)
            times = [self._trial_state[other].last_train_time for other in tune_controller.get_live_trials()]
            if decision != TrialScheduler.CONTINUE and times and min(times) >= self._next_perturbation_sync:
                self._next_perturbation_sync = max(times) + self._perturbation_interval
            return decision

    return InLockStep(synch=True, **options)


def is_placeholder(value: Any) -> bool:
    """Whether Tune has written this in place of a value of a space that is no plain one."""
    from ray.tune.impl.placeholder import _FunctionResolver, _RefResolver

    return isinstance(value, tuple) and value[:1] in ((_FunctionResolver.TOKEN,), (_RefResolver.TOKEN,))


def give_up(trial: Any) -> None:
    """What a trial has failed with would come again: Tune is not to start it anew."""
    trial.max_failures = 0


def restored_tuner(path: str, trainable: Any, space: dict[str, Any], callbacks: list[Any]) -> Any:
    """`Tuner.restore`, with callbacks that write to this process's terminal."""
    from ray import tune

    tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True, resume_errored=True, param_space=space)
    tuner._local_tuner._run_config.callbacks = callbacks
    return tuner


@contextmanager
def tolerant_tune(
    on_error: Callable[[Any, Any], None],
    interrupted: threading.Event | None = None,
    to_write: threading.Event | None = None,
) -> Iterator[None]:
    """Around `Tuner.fit` of a command: a snapshot or error file that cannot be written ends nothing, Tune adds no
    loggers, tables and signal handlers (ours ends with a checkpoint), and leaves it to the command to say what failed.

    Relative paths in a config mean what they meant at the command line. A trial reads and writes directories only, and
    on this machine it has the driver's environment variables anyway: so the keys to AWS are not among those that Tune
    hands to it as its runtime environment, which Ray writes into logs and sends to its dashboard.

    Args:
        on_error: is told a trial and what it fails with, which Tune itself only writes down and reads again.
        interrupted: where it is set, `Tuner.fit` returns, and `Tuner.restore` goes on with what has not ended.
        to_write: where it is set, Tune's state is written now, not when it is due; it is cleared then.
    """
    from ray.tune.execution import class_cache, tune_controller
    from ray.tune.execution.experiment_state import _ExperimentCheckpointManager
    from ray.tune.experiment import Trial

    class Snapshots(_ExperimentCheckpointManager):
        """Tune's state of the experiment, for `Tuner.restore`; its files come along when it is synced."""

        def sync_up_experiment_state(
            self, save_fn: Callable[[], None], force: bool = False, wait: bool = False
        ) -> None:
            def save() -> None:
                with LOST.counting("Tune's state of the experiment"):
                    save_fn()

            if now := write_now.is_set():
                write_now.clear()
            with LOST.counting("Tune's state of the experiment"):
                super().sync_up_experiment_state(save, force=force or now, wait=wait)

    event, write_now = interrupted or threading.Event(), to_write or threading.Event()
    handle_error = Trial.handle_error

    def handle(trial: Trial, exc: Any = None) -> None:
        on_error(trial, exc)
        with LOST.counting("Tune's error.txt"):
            handle_error(trial, exc)

    handed_on = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}
    with (
        patch.dict("os.environ", {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}),
        environment_defaults(
            TUNE_DISABLE_SIGINT_HANDLER="1",
            RAY_AIR_NEW_OUTPUT="0",
            RAY_CHDIR_TO_TRIAL_DIR="0",
            TUNE_GLOBAL_CHECKPOINT_S="2",  # what a kill may cost `Tuner.restore`
        ),
        _log_level("ray.tune", logging.CRITICAL),
        patch.object(class_cache, "ENV_VARS_TO_PROPAGATE", handed_on),
        patch.object(importlib.import_module("ray.tune.tune"), "_setup_signal_catching", lambda: event),
        patch.object(tune_controller, "_ExperimentCheckpointManager", Snapshots),
        patch.object(Trial, "handle_error", handle),
    ):
        yield


# RLlib


@contextmanager
def without_tensorflow() -> Iterator[None]:
    """Around the first import of RLlib in a process: it would import an installed TensorFlow and JAX (8 s and 0.4 GB in
    every actor), and end TensorFlow's eager mode for whoever else uses it in this process.

    RLlib is told so by environment variables, and announces each import that it leaves out; both are as before
    afterwards.
    """
    with (
        environment_defaults(RLLIB_TEST_NO_TF_IMPORT="1", RLLIB_TEST_NO_JAX_IMPORT="1"),
        _log_level("ray.rllib.utils.framework", logging.ERROR),
    ):
        yield


@contextmanager
def quiet_about_the_new_api_stack() -> Iterator[None]:
    """Around RLlib's `validate`, which explains its new API stack to users, who did not choose it."""

    def is_something_else(record: logging.LogRecord) -> bool:
        return "on the new API stack!" not in record.getMessage()

    its_log = logging.getLogger("ray.rllib.algorithms.algorithm_config")
    its_log.addFilter(is_something_else)
    try:
        yield
    finally:
        its_log.removeFilter(is_something_else)


def runner_actors(runners: EnvRunnerGroup) -> dict[int, Any]:
    """The runners' actors by number."""
    return dict(runners._worker_manager.actors())


def kill_runners(runners: EnvRunnerGroup) -> None:
    """For good: RLlib's `stop` would wait for the calls under way."""
    for actor in runner_actors(runners).values():
        ray.kill(actor, no_restart=True)


def call_dead(runners: EnvRunnerGroup, index: int) -> None:
    """RLlib is not to call this runner before it has answered a ping."""
    runners._worker_manager.set_actor_state(index, healthy=False)


def make_runner_group(config: Any, name: NameOptions) -> EnvRunnerGroup:
    """Runners without an Algorithm, each with its config by value: one in the object store may be gone when Ray starts
    a runner anew."""
    from ray.rllib.env.env_runner_group import EnvRunnerGroup

    class ByValue(EnvRunnerGroup):
        def _make_worker(self, *, config: Any, **kwargs: Any) -> Any:
            return super()._make_worker(config=self._remote_config, **kwargs)

    with named_runners(name):
        return ByValue(config=config, local_env_runner=False)


@contextmanager
def named_runners(name: NameOptions) -> Iterator[None]:
    """Around the making of RLlib's runners, which it gives no name.

    Ray starts a dead one anew under the name that it has.
    """
    from ray.rllib.env.env_runner_group import EnvRunnerGroup

    make_worker = EnvRunnerGroup._make_worker

    def make_named(group: EnvRunnerGroup, *, worker_index: int, **kwargs: Any) -> Any:
        with patch.object(group, "_remote_args", {**group._remote_args, **name(f"runner-{worker_index}")}):
            return make_worker(group, worker_index=worker_index, **kwargs)

    with patch.object(EnvRunnerGroup, "_make_worker", make_named):
        yield


@contextmanager
def known_spaces(spaces: Mapping[str, Any]) -> Iterator[None]:
    """Around the making of an Algorithm, whose learners else wait until a runner says what its spaces are."""
    from ray.rllib.env.env_runner_group import EnvRunnerGroup

    with patch.object(EnvRunnerGroup, "get_spaces", lambda _: dict(spaces)):
        yield
