"""LIBERO's standard suites as a gymnasium environment, with the frames and protocol of OpenVLA's evaluation.

Protocol (openvla/openvla, `experiments/robot/libero/run_libero_eval.py`): reset, set the initial state, ten steps in
which objects fall to rest, then at most `horizon` policy steps; success is LIBERO's own goal check. robosuite samples
the camera at the 24th of a control step's 25 physics steps, and so does this class, because the frame is an observable
in robosuite's own loop.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from vlarl_rllib.envs import libero_tasks
from vlarl_rllib.envs.base import VLAEnv
from vlarl_rllib.envs.image import describe_path, observation_image
from vlarl_rllib.types import ACTION_SIZE, EnvSpec

CAMERA = "agentview"
"""The only camera that OpenVLA sees."""
NUM_SETTLE_STEPS = 10
"""Steps before the policy acts, while objects fall (`num_steps_wait` of OpenVLA's evaluation)."""
SETTLE_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
"""Stand still with an open gripper (`get_libero_dummy_action` of OpenVLA's evaluation)."""
CONTROL_FREQUENCY = 20
"""Control steps per second, LIBERO's default; a control step is 25 physics steps of 2 ms."""
_FRAME = "agentview_frame"


@dataclass(frozen=True)
class LiberoSnapshot:
    """State of an episode in progress. Derived quantities are left out: the next step computes them."""

    task_id: int
    initial_state: int
    num_steps: int
    physics: np.ndarray
    """mjSTATE_INTEGRATION: time, positions, velocities, controls and the solver's warm start, bit for bit."""
    body_pos: np.ndarray
    body_quat: np.ndarray
    """[bodies, 3] and [bodies, 4]: fixtures are placed by editing the model at reset."""
    site_rgba: np.ndarray
    """[sites, 4]: a burner glows while its stove is on."""
    controller: dict[str, Any]
    torques: np.ndarray
    gripper_action: np.ndarray
    time_step: int
    current_time: float
    frame: dict[str, Any]
    """Sampling clock and last value of the camera observable."""
    random: Mapping[str, Any]


class LiberoEnv(VLAEnv):
    """One LIBERO suite; the MuJoCo model of one task is loaded at a time, at the first reset to that task.

    A further reset of the same task keeps the model: robosuite's soft reset, then the initial state. The pose of
    fixtures (cabinet, stove) is drawn anew at every reset, from the reset's seed.

    Args:
        spec: `suite` is one of libero_spatial, libero_object, libero_goal, libero_10, libero_90.

    Raises:
        ValueError: no such suite.
        RuntimeError: nothing can render on this machine.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_FREQUENCY}  # noqa: RUF012 (gymnasium declares it so)

    def __init__(self, spec: EnvSpec) -> None:
        from vlarl_rllib.envs.rendering import configure_rendering

        libero_tasks.check_suite(spec.suite)
        configure_rendering(spec.render_device)
        self.env_spec = spec
        self.render_mode = "rgb_array"
        side = spec.image_size
        self.observation_space = gymnasium.spaces.Dict(
            {"image": gymnasium.spaces.Box(0, 255, (side, side, 3), np.uint8)}
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float64)
        self.max_steps = spec.max_steps or libero_tasks.HORIZONS[spec.suite]
        self._instructions = self.task_instructions(spec.suite)
        self._simulation: Any = None
        self._task_id = -1
        self._initial_state = 0
        self._num_steps = 0
        self._camera_on = False
        self._undrawn = np.zeros((side, side, 3), np.uint8)

    @property
    def steps_left(self) -> int:
        return self.max_steps - self._num_steps

    @staticmethod
    def task_instructions(suite: str) -> list[str]:
        return [libero_tasks.instruction(name) for name in libero_tasks.task_names(suite)]

    @staticmethod
    def num_initial_states(suite: str, task_id: int) -> int:
        return len(libero_tasks.initial_states(suite, task_id))

    @staticmethod
    def horizon(suite: str) -> int:
        libero_tasks.check_suite(suite)
        return libero_tasks.HORIZONS[suite]

    @staticmethod
    def describe_frames(image_size: int, *, center_crop: bool) -> str:
        drawn = EnvSpec("libero").camera_size
        return f"{CAMERA} drawn at {drawn} x {drawn}, {describe_path(image_size, center_crop=center_crop)}"

    @property
    def simulation(self) -> Any:
        """The robosuite environment of the loaded task, for scripted experts and tests."""
        return self._simulation

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; see `VLAEnv`. Without a seed, one is drawn from the environment's own generator.

        Raises:
            ValueError: no such task or initial state.
        """
        from vlarl_rllib.envs.libero_simulation import soft_reset

        super().reset(seed=seed)
        options = options or {}
        task_id, index = int(options.get("task_id", 0)), int(options.get("initial_state", 0))
        states = libero_tasks.initial_states(self.env_spec.suite, task_id)
        if not 0 <= index < len(states):
            raise ValueError(
                f"initial state {index} is not in task {task_id} of {self.env_spec.suite}, whose states are 0 to "
                f"{len(states) - 1}"
            )
        self.render_seconds = 0.0
        self._camera_on = False
        if task_id != self._task_id:
            self._load(task_id)
        soft_reset(self._simulation, states[index], seed if seed is not None else int(self.np_random.integers(2**32)))
        self._initial_state, self._num_steps = index, 0
        for step in range(NUM_SETTLE_STEPS):
            self._camera_on = step == NUM_SETTLE_STEPS - 1
            self._simulation.step(SETTLE_ACTION)
        info = {"instruction": self._instructions[task_id], "task_id": task_id, "initial_state": index}
        return self._observation(), info

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One control step (0.05 s) with an OSC_POSE action [7] in [-1, 1]: 5 cm and 0.5 rad at full scale, gripper -1
        open, +1 close.
        """
        self.render_seconds = 0.0
        self._camera_on = self.draws
        success = bool(self._simulation.step(np.asarray(action, dtype=np.float64))[2])
        self._num_steps += 1
        truncated = self._num_steps >= self.max_steps and not success
        return self._observation(), float(success), success, truncated, {"success": success}

    def render(self) -> np.ndarray:  # type: ignore[override]
        """[camera_size, camera_size, 3] uint8: the last frame, upright but mirrored as the policy sees it."""
        frame: np.ndarray = self._raw_frame()[::-1, ::-1]
        return frame

    def present_image(self) -> np.ndarray:
        return self._processed(self._raw_frame())

    def snapshot(self) -> LiberoSnapshot:
        import mujoco

        simulation, robot, clock = self._simulation, self._simulation.robots[0], self._frame_observable()
        model, data = simulation.sim.model._model, simulation.sim.data._data
        physics = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(model, data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        return LiberoSnapshot(
            task_id=self._task_id,
            initial_state=self._initial_state,
            num_steps=self._num_steps,
            physics=physics,
            body_pos=model.body_pos.copy(),
            body_quat=model.body_quat.copy(),
            site_rgba=model.site_rgba.copy(),
            controller=_copied({name: value for name, value in vars(robot.controller).items() if name != "sim"}),
            torques=np.array(robot.torques),
            gripper_action=np.array(robot.gripper.current_action),
            time_step=simulation.timestep,
            current_time=simulation.cur_time,
            frame=_copied({name: vars(clock)[name] for name in _CLOCK_FIELDS}),
            random=self.np_random.bit_generator.state,
        )

    def restore(self, snapshot: LiberoSnapshot) -> None:
        import mujoco

        if snapshot.task_id != self._task_id:
            raise ValueError(f"the snapshot is of task {snapshot.task_id}, but task {self._task_id} is loaded")
        simulation, robot = self._simulation, self._simulation.robots[0]
        model, data = simulation.sim.model._model, simulation.sim.data._data
        model.body_pos[:], model.body_quat[:], model.site_rgba[:] = (
            snapshot.body_pos,
            snapshot.body_quat,
            snapshot.site_rgba,
        )
        mujoco.mj_setState(model, data, snapshot.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        vars(robot.controller).update(_copied(snapshot.controller))
        robot.torques, robot.gripper.current_action = snapshot.torques.copy(), snapshot.gripper_action.copy()
        simulation.timestep, simulation.cur_time, simulation.done = snapshot.time_step, snapshot.current_time, False
        vars(self._frame_observable()).update(_copied(snapshot.frame))
        self.np_random.bit_generator.state = snapshot.random
        self._initial_state, self._num_steps = snapshot.initial_state, snapshot.num_steps

    def close(self) -> None:
        """Free the model and its rendering context. May be called again."""
        if self._simulation is not None:
            self._camera.close()
            self._simulation.close()
            self._simulation, self._task_id = None, -1
            gc.collect()  # robosuite's objects refer to each other; the model goes with them

    def _load(self, task_id: int) -> None:
        """Build the model of a task: 3 to 12 s, and up to 2 GB while it compiles."""
        from vlarl_rllib.envs.camera import OffscreenCamera
        from vlarl_rllib.envs.libero_simulation import (
            build_simulation,
            observe_only,
            release_build_memory,
            show_textures_as_they_are,
        )

        self.close()
        simulation = build_simulation(libero_tasks.bddl_file(self.env_spec.suite, task_id))
        model = simulation.sim.model._model
        show_textures_as_they_are(model)
        self._camera = OffscreenCamera(model, CAMERA, self.env_spec.camera_size, fast=self.env_spec.fast_render)
        observe_only(simulation, _FRAME, self._render_if_on, CONTROL_FREQUENCY)
        release_build_memory(model)
        self._simulation, self._task_id = simulation, task_id

    def _render_if_on(self) -> np.ndarray:
        """What the frame observable samples; black in resets and settle steps, where nobody looks."""
        size = self.env_spec.camera_size
        if not self._camera_on:
            return np.zeros((size, size, 3), dtype=np.uint8)
        start = time.perf_counter()
        frame = self._camera.render(self._simulation.sim.data._data)
        self.render_seconds += time.perf_counter() - start
        return frame

    def _frame_observable(self) -> Any:
        return self._simulation._observables[_FRAME]

    def _observation(self) -> dict[str, np.ndarray]:
        if not self._camera_on:
            return {"image": self._undrawn}
        return {"image": self._processed(self._raw_frame())}

    def _raw_frame(self) -> np.ndarray:
        """As robosuite sampled it in the last step; behind an undrawn one, of the present state."""
        if self._camera_on:
            sampled: np.ndarray = self._frame_observable().obs
            return sampled
        self._camera_on = True
        return self._render_if_on()

    def _processed(self, raw: np.ndarray) -> np.ndarray:
        return observation_image(raw, center_crop=self.env_spec.center_crop, image_size=self.env_spec.image_size)


_CLOCK_FIELDS = ("_time_since_last_sample", "_current_delay", "_current_observed_value", "_sampled")


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    """The dictionary with its arrays copied; what else it holds is immutable or never changed in place."""
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in values.items()}
