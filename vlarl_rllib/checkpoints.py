"""Checkpoint directories of a run: complete or absent, the newest few kept, each one self-contained.

    checkpoints/iteration_000005/{algorithm/, learners/, facts.json}

Tune copies what a trial saves; for a 7B policy that would be tens of GB a copy. So a run's checkpoints lie in its own directory and
Tune's checkpoint is a pointer to one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FACTS_FILE = "facts.json"
POINTER_FILE = "pointer.json"
_NAME = re.compile(r"iteration_(\d{6,})$")


class CheckpointStore:
    """The `checkpoints/` directory of one run.

    Args:
        root: the directory; made when the first checkpoint is written.
        keep: how many of the newest to keep.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self._keep = root, keep

    @contextmanager
    def writing(self, iteration: int) -> Iterator[Path]:
        """A directory to write into; renamed to its final name at the end, removed where writing fails."""
        final = self.root / f"iteration_{iteration:06d}"
        partial = self.root / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self._prune()

    def _prune(self) -> None:
        for old in self.list()[: -self._keep]:
            shutil.rmtree(old)

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted((path for path in self.root.iterdir() if _NAME.match(path.name)), key=lambda path: int(path.name.split("_")[1]))

    def point_to(self, iteration: int, directory: Path) -> None:
        """Leave a pointer to the checkpoint of `iteration` in `directory`."""
        target = self.root.resolve() / f"iteration_{iteration:06d}"
        (directory / POINTER_FILE).write_text(json.dumps({"checkpoint": str(target)}))

    @staticmethod
    def resolve(directory: Path) -> Path:
        """The checkpoint behind a pointer, or `directory` itself.

        Raises:
            FileNotFoundError: where there is no complete checkpoint.
        """
        pointer = directory / POINTER_FILE
        target = Path(json.loads(pointer.read_text())["checkpoint"]) if pointer.is_file() else directory
        if not (target / FACTS_FILE).is_file():
            raise FileNotFoundError(
                f"{target}: no complete checkpoint here ({FACTS_FILE} is missing); give a directory like runs/NAME/checkpoints/iteration_000005"
            )
        return target

    @staticmethod
    def write_facts(directory: Path, *, iteration: int, policy_version: int, settings: dict[str, Any]) -> None:
        """Written last: its presence says that the checkpoint is complete."""
        facts = {"iteration": iteration, "policy_version": policy_version, "settings": settings}
        (directory / FACTS_FILE).write_text(json.dumps(facts, indent=2))

    @staticmethod
    def read_facts(directory: Path) -> dict[str, Any]:
        return json.loads((directory / FACTS_FILE).read_text())
