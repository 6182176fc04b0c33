"""What an evaluation leaves behind, and how it goes on after a kill.

DIR/evaluation.json   what was asked, and the versions that answered
    episodes.jsonl    one line per finished episode, on the disk before the next is waited for
    videos/           task_00_trial_000_success.mp4
    results.json, results.csv, report.md      made of the above (`report.py`)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlarl_rllib.process.lost_output import LOST
from vlarl_rllib.process.own_files import own_file, own_folder, replace_file
from vlarl_rllib.runs.directory import claimed
from vlarl_rllib.runs.versions import installed_versions
from vlarl_rllib.settings import SettingsError

if TYPE_CHECKING:
    from vlarl_rllib.types import EpisodeResult

QUESTION_FILE = "evaluation.json"
EPISODES_FILE = "episodes.jsonl"


class EvaluationDirectory:
    """One evaluation's directory; made by `open_evaluation`. Links that lead out of it are refused.

    Attributes:
        question: what was asked.
        episodes: the finished ones, in the order in which they ended.
        versions_before: of packages when the evaluation began, where they are others now.
    """

    def __init__(self, path: Path, question: dict[str, Any]) -> None:
        self.path, self.question = path, question
        self.versions_before: dict[str, str] = {}
        self._is_behind = False
        self._check_question()
        self.episodes = self._read_episodes()
        self._mend()

    @property
    def finished(self) -> set[tuple[int, int]]:
        """(task, trial) of the finished episodes."""
        return {(episode["task"], episode["trial"]) for episode in self.episodes}

    def add(self, results: Sequence[EpisodeResult]) -> None:
        """Keep finished episodes, and their videos first, so that an episode that is kept has its video.

        A full disk costs videos, and episodes wait for the next call or `write`.
        """
        lines = ""
        for result in results:
            episode = {
                "task": result.task_id,
                "trial": result.initial_state,
                "success": result.success,
                "steps": result.length,
            }
            if result.video is not None:
                self._keep_video(episode, result.video)
            self.episodes.append(episode)
            lines += json.dumps(episode) + "\n"
        with LOST.counting(EPISODES_FILE):
            if self._is_behind:
                self.write()
            elif lines:
                self._is_behind = True
                with self._episodes_file.open("a") as file:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
                self._is_behind = False

    def write(self) -> None:
        """Write what could not be written. Raises OSError where that fails again."""
        if self._is_behind:
            self._mend()
            self._is_behind = False

    def _keep_video(self, episode: dict[str, Any], video: bytes) -> None:
        videos = own_folder(self.path, "videos", "--out")
        outcome = "success" if episode["success"] else "failure"
        film = videos / f"task_{episode['task']:02d}_trial_{episode['trial']:03d}_{outcome}.mp4"
        with LOST.counting(film.name):
            videos.mkdir(exist_ok=True)
            replace_file(film, video)

    def _check_question(self) -> None:
        file, versions = own_file(self.path, QUESTION_FILE, "--out"), installed_versions()
        own_folder(self.path, "videos", "--out")
        if file is None:
            if others := sorted(path.name for path in self.path.iterdir() if not path.name.startswith(".")):
                raise SettingsError(f"--out: {self.path} holds other things ({others[0]}, ...); give a new directory")
            replace_file(
                self.path / QUESTION_FILE, json.dumps({**self.question, "versions": versions}, indent=2) + "\n"
            )
            return
        before = _read_question(file)
        for key, value in self.question.items():
            if before.get(key) != value:
                raise SettingsError(
                    f"--out: {self.path} holds another evaluation, whose {key} is {json.dumps(before.get(key))} "
                    f"and not {json.dumps(value)}; "
                    "give another directory, or ask the same again"
                )
        if before["versions"] != versions:
            self.versions_before = before["versions"]

    @property
    def _episodes_file(self) -> Path:
        return own_file(self.path, EPISODES_FILE, "--out") or self.path / EPISODES_FILE

    def _read_episodes(self) -> list[dict[str, Any]]:
        """All whole lines that are episodes of the question, of each episode the first one."""
        file = self._episodes_file
        episodes: dict[tuple[int, int], dict[str, Any]] = {}
        for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
            try:
                episode = json.loads(line)
            except (ValueError, RecursionError):
                continue  # cut by a kill
            if self._is_episode(episode):
                episodes.setdefault((episode["task"], episode["trial"]), episode)
        return list(episodes.values())

    def _is_episode(self, episode: Any) -> bool:
        kinds = {"task": int, "trial": int, "success": bool, "steps": int}
        if not isinstance(episode, dict) or any(type(episode.get(key)) is not kind for key, kind in kinds.items()):
            return False
        return (
            episode["task"] in self.question["tasks"]
            and 0 <= episode["trial"] < self.question["trials"]
            and episode["steps"] >= 0
        )

    def _mend(self) -> None:
        """Write the file anew, so that what is added does not end up on half a line."""
        replace_file(self.path / EPISODES_FILE, "".join(json.dumps(episode) + "\n" for episode in self.episodes))


def _read_question(file: Path) -> dict[str, Any]:
    """`evaluation.json`. Raises `SettingsError` where it is damaged."""
    try:
        question = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(
            f"--out: {file} cannot be read ({type(error).__name__}: {error}); give a new directory"
        ) from None
    versions = question.get("versions") if isinstance(question, dict) else None
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise SettingsError(f"--out: {file} is not what an evaluation writes; give a new directory")
    return question


@contextmanager
def open_evaluation(path: Path, question: dict[str, Any]) -> Iterator[EvaluationDirectory]:
    """Begin an evaluation in `path`, or go on with the one that is there.

    Raises:
        SettingsError: another evaluation, other files or another process are there.
    """
    with claimed(path, "--out"):
        yield EvaluationDirectory(path, question)
