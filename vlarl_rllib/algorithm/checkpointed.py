"""The checkpoints of a VLAPPO: sharded, sealed, in the run's own directory, with Tune's pointers to them."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlarl_rllib.rllib_compat import without_tensorflow

with without_tensorflow():
    from ray.rllib.algorithms.ppo import PPO

from ray.tune.utils import flatten_dict

from vlarl_rllib.config import VLAPPOConfig
from vlarl_rllib.observability.ledger import Ledger
from vlarl_rllib.observability.metrics import LastRates, plain_state
from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.storage import Place, place_of
from vlarl_rllib.rllib_compat import result_without_checkpoint
from vlarl_rllib.rollout.collector import RolloutCollector
from vlarl_rllib.rollout.curriculum import SuccessRecord
from vlarl_rllib.runs.checkpoints import CheckpointStore
from vlarl_rllib.runs.pulse import Pulse
from vlarl_rllib.runs.rllib_files import write_rllib_files
from vlarl_rllib.runs.sealing import WEIGHTS_FOLDER, DamagedCheckpointError, note_shards, replacing
from vlarl_rllib.runs.trial_checkpoints import TrialCheckpoints
from vlarl_rllib.settings import Settings
from vlarl_rllib.weights.sync import WeightSync

logger = logging.getLogger(__name__)


class CheckpointedPPO(PPO):
    """RLlib's calls to save and to restore, for a policy that is sharded over learners."""

    config: VLAPPOConfig
    ledger: Ledger
    checkpoints: TrialCheckpoints
    collector: RolloutCollector
    weight_sync: WeightSync
    _vla: Settings
    _pulse: Pulse
    _successes: SuccessRecord
    _models: dict[str, str]
    _is_to_begin = False
    """Whether weights and counters are still those of the trial before this one."""

    def _start_over(self) -> None:
        """Begin from the newest checkpoint (`TrialCheckpoints.newest`), else from the model as it is."""
        raise NotImplementedError

    def _call_back(self, name: str, **arguments: Any) -> None:
        """Call RLlib's callbacks of this name."""
        raise NotImplementedError

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune's checkpoint: a pointer to one in the run's directory.

        A failure to write is counted and the run goes on.
        """
        directory = Path(checkpoint_dir)
        if self.checkpoints.store is None:
            self.save_to_path(directory)
            return
        self._save_in_run()
        self.checkpoints.point(directory)
        write_rllib_files(directory, type(self), {"vla": self.config.vla})
        if not self._pulse.ended.is_set():  # the runners may still be at what nobody waits for
            self.collector.leave_checkpoint()

    def _save_in_run(self) -> None:
        """Write this iteration's checkpoint; at the end of a run it may be there already."""
        if not (self._pulse.ended.is_set() and self.checkpoints.has(self.iteration)):
            self.checkpoints.save(self.iteration, self._write_checkpoint)

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Tune's call. Where Tune cannot copy the pointer, the checkpoint behind it is there all the same."""
        try:
            result = super().save(checkpoint_dir)
        except OSError as error:
            if self.checkpoints.store is None:
                raise
            logger.warning("Tune's pointer to the checkpoint of iteration %d: %s", self.iteration, error)
            LOST.count += 1
            return result_without_checkpoint(self)
        # Tune looks for a score by its whole name, which it calls vlarl/... everywhere else.
        result.metrics.update(flatten_dict({"vlarl": result.metrics.get("vlarl", {})}))
        return result

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune's restart of a trial; where what it names is not there or damaged, as at the trial's own start."""
        try:
            if not CheckpointStore.points_nowhere(Path(checkpoint_dir)):
                self.restore_from_path(self.checkpoints.behind(Path(checkpoint_dir)))
                return
        except (FileNotFoundError, DamagedCheckpointError) as error:
            self.checkpoints.pass_over(str(error))
        self._start_over()

    def save_to_path(self, path: str | Path | None = None, **kwargs: Any) -> str:  # type: ignore[override]
        """Write everything an exact continuation needs into `path`, a directory that all nodes share, or a URI; the
        running episodes end here.

        In this run too: a resumed one cannot have them. An earlier save there is replaced once this one is whole.

        Raises:
            SettingsError: `path` holds something else.
        """
        directory = place_of(path or tempfile.mkdtemp(prefix="vlarl-checkpoint-"))
        with replacing(directory) as partial:
            self._write_checkpoint(partial)
        self.collector.leave_checkpoint()
        return str(directory)

    def restore_from_path(self, path: str | Place, **kwargs: Any) -> None:  # type: ignore[override]
        """Read what `save_to_path` or `save_checkpoint` wrote, also into another number of learners, and push the
        weights.

        Raises:
            FileNotFoundError: where `path` holds no checkpoint.
            DamagedCheckpointError: where it is not as it was written.
        """
        directory = CheckpointStore.resolve(place_of(path))
        facts = CheckpointStore.read_facts(directory)
        self.learner_group.call("load_sharded", str(directory / "learners"))
        running = CheckpointStore.read_algorithm(directory)
        self.metrics.set_state(running["metrics"])
        then, now = facts["settings"]["env"], self._vla.env
        same_tasks = (then["name"], then["suite"]) == (now.name, now.suite)
        self._successes.set_state(running["successes"] if same_tasks else [])
        self.ledger.rates = LastRates(**running["rates"]) if same_tasks else LastRates()
        self._iteration, self._is_to_begin = facts["iteration"], False
        self.checkpoints.origin = directory
        self.collector.begin_new_episodes()
        self.weight_sync.push(above=facts["policy_version"])
        self._call_back("on_checkpoint_loaded")

    def _write_checkpoint(self, directory: Place) -> None:
        learners = directory / WEIGHTS_FOLDER
        learners.mkdir()
        note_shards(directory, self.learner_group.call("save_sharded", str(learners.resolve())))
        CheckpointStore.write_facts(
            directory,
            iteration=self.iteration,
            policy_version=self.weight_sync.version,
            settings=self.config.vla,
            models=self._models,
            algorithm={
                "metrics": plain_state(self.metrics),
                "successes": self._successes.state(),
                "rates": asdict(self.ledger.rates),
            },
        )
        write_rllib_files(directory, type(self), {"vla": self.config.vla})
