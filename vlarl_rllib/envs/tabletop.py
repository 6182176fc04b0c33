"""A light MuJoCo environment with LIBERO's interface: camera image, instruction, 7-DoF end-effector deltas, sparse
success.

A floating two-finger gripper, two of three coloured objects and two coloured zones. The tasks touch, push, pick up or
put down the object that the instruction names; the other object and the other zone are there to be left alone. Drawing
in software takes most of a step (`vlarl bench env --set env.name=tabletop --set model.path=small`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlarl_rllib.envs.single_suite import SingleSuiteEnv
from vlarl_rllib.envs.tabletop_model import (
    ARM_JOINTS,
    CAMERA,
    FINGER_JOINTS,
    FINGER_TRAVEL,
    OBJECT_HALF_HEIGHT,
    OBJECTS,
    SHADOW_CASTERS,
    WORKSPACE_HIGH,
    WORKSPACE_LOW,
    ZONE_HALF_SIDE,
    ZONES,
    tabletop_xml,
)
from vlarl_rllib.types import EnvSpec

POSITION_STEP, YAW_STEP = 0.04, 0.3
"""Metres and radians of a full action."""
SUBSTEPS = 20
"""Physics steps of a control step, which lasts 0.08 s."""
PICKED_HEIGHT = 0.04
"""Clearance below an object that counts as picked up, in metres."""
RESTING_HEIGHT = 0.005
"""Clearance below which an object counts as lying on the table."""
TOUCHING = 0.006
"""Gap between gripper and object that counts as touching, in metres."""
SUPERSAMPLING = 2
"""Frames are drawn this many times larger and averaged."""
SHADOW_COLOR = np.array([0.0, 0.0, 0.0, 0.4], dtype=np.float32)
SHADOW_HEIGHT = 0.0012
"""Of the flat shapes above the table, in metres: above the zones too."""
HORIZONS = {"touch": 7, "push": 24, "pick": 20, "put": 40}
"""By verb, in steps. At full pace the scripted expert needs 1 to 5, 8 to 17, 7 to 14 and 15 to 26 (20 starts of one
task each)."""


@dataclass(frozen=True)
class Task:
    """What the instruction asks for."""

    verb: str
    """touch, push, pick or put."""
    target: str
    """Name in `OBJECTS`."""
    zone: str | None
    """Name in `ZONES`, for push and put."""

    @property
    def instruction(self) -> str:
        return {
            "touch": f"touch the {self.target}",
            "push": f"push the {self.target} to the {self.zone}",
            "pick": f"pick up the {self.target}",
            "put": f"put the {self.target} on the {self.zone}",
        }[self.verb]


TASKS = (
    *(Task("touch", target, None) for target in OBJECTS),
    *(Task("push", target, zone) for target in OBJECTS for zone in ZONES),
    *(Task("pick", target, None) for target in OBJECTS),
    *(Task("put", target, zone) for target in OBJECTS for zone in ZONES),
)
"""By task id."""


@dataclass(frozen=True)
class TabletopFacts:
    """What a scripted expert may know and a policy may not. Positions in metres."""

    task: Task
    gripper: np.ndarray
    """[3] point between the finger tips."""
    yaw: float
    opening: float
    """Gap between the fingers."""
    target: np.ndarray
    """[3] centre of the object that is named."""
    zone: np.ndarray | None
    """[3] centre of the zone that is named."""


@dataclass(frozen=True)
class TabletopSnapshot:
    """State of an episode in progress."""

    task_id: int
    initial_state: int
    num_steps: int
    was_picked: bool
    physics: np.ndarray
    """mjSTATE_INTEGRATION: time, positions, velocities, controls, zones and the solver's warm start, bit for bit."""


class TabletopEnv(SingleSuiteEnv):
    """See the module.

    An action is (dx, dy, dz, droll, dpitch, dyaw, gripper), each in [-1, 1]: up to `POSITION_STEP` towards the camera,
    to its right and upwards, up to `YAW_STEP`, and -1 = open, +1 = close. The gripper always points down: roll and
    pitch have no effect. The frame depends on task and initial state alone: nothing is drawn from the reset's seed.
    `spec.fast_render` has no meaning here.

    Raises:
        RuntimeError: nothing can render on this machine.
    """

    SUITE = "tabletop"
    INSTRUCTIONS = tuple(task.instruction for task in TASKS)
    NUM_INITIAL_STATES = 1000
    """Enough held-out ones (a fifth) that an evaluation of 128 on few tasks plays none twice."""
    HORIZON = max(HORIZONS.values())

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012 (gymnasium declares it so)

    def __init__(self, spec: EnvSpec) -> None:
        super().__init__(spec)
        from vlarl_rllib.envs.rendering import configure_rendering

        configure_rendering(spec.render_device)
        import mujoco

        from vlarl_rllib.envs.camera import OffscreenCamera

        self._mujoco = mujoco
        self._model = mujoco.MjModel.from_xml_string(tabletop_xml())
        self._data = mujoco.MjData(self._model)
        self._camera = OffscreenCamera(self._model, CAMERA, spec.image_size * SUPERSAMPLING, fast=True)
        self._shadow_casters = [self._model.geom(name).id for name in SHADOW_CASTERS]
        light = self._model.light_dir[0]
        self._onto_table = np.array(
            [[1.0, 0.0, -light[0] / light[2]], [0.0, 1.0, -light[1] / light[2]], [0.0, 0.0, 1e-3]]
        )
        """[3, 3] moves a point along the light to the table; a thousandth of its height remains, for OpenGL inverts
        this to light a face."""
        self._object_geom = {name: self._model.geom(name).id for name in OBJECTS}
        self._gripper_geoms = tuple(self._model.geom(name).id for name in (*FINGER_JOINTS, "palm"))
        self._object_qpos = {name: int(self._model.joint(name).qposadr[0]) for name in OBJECTS}
        self._zone_mocap = {name: int(self._model.body(name).mocapid[0]) for name in ZONES}
        self._gripper_qpos = np.array(
            [int(self._model.joint(name).qposadr[0]) for name in (*ARM_JOINTS, *FINGER_JOINTS)]
        )
        self._task_id, self._initial_state, self._num_steps, self._was_picked = 0, 0, 0, False
        self._frame: np.ndarray | None = None
        self._undrawn = np.zeros((spec.image_size, spec.image_size, 3), np.uint8)

    @property
    def max_steps(self) -> int:
        return self.env_spec.max_steps or HORIZONS[TASKS[self._task_id].verb]

    @property
    def steps_left(self) -> int:
        return self.max_steps - self._num_steps

    @property
    def facts(self) -> TabletopFacts:
        """The state behind the image."""
        task, qpos = TASKS[self._task_id], self._data.qpos
        x, y, z, yaw, left, right = qpos[self._gripper_qpos]
        return TabletopFacts(
            task=task,
            gripper=np.array([x, y, z]),
            yaw=float(yaw),
            opening=float(left + right),
            target=self._object_position(task.target).copy(),
            zone=None if task.zone is None else self._zone_position(task.zone).copy(),
        )

    def proprioception(self) -> np.ndarray:
        x, y, z, yaw, left, right = self._data.qpos[self._gripper_qpos]
        down = np.pi * np.array(
            [np.cos(yaw / 2.0), np.sin(yaw / 2.0), 0.0]
        )  # half a turn about a level axis, then the yaw
        return np.array([x, y, z, *down, left, -right], dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; see `VLAEnv`.

        Raises:
            ValueError: no such task or initial state.
        """
        super().reset(seed=seed)
        info = self.start_info(options)
        task_id, index = info["task_id"], info["initial_state"]
        self._task_id, self._initial_state, self._num_steps, self._was_picked = task_id, index, 0, False
        self._mujoco.mj_resetData(self._model, self._data)
        self._place(TASKS[task_id], np.random.default_rng([task_id, index]))
        return self._observation(), info

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One control step; the deltas are counted from where the gripper is, not from where it was told to go."""
        action = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        pose = self._data.qpos[self._gripper_qpos[:4]]
        control = self._data.ctrl
        control[:3] = np.clip(pose[:3] + POSITION_STEP * action[:3], WORKSPACE_LOW, WORKSPACE_HIGH)
        control[3] = pose[3] + YAW_STEP * action[5]
        control[4:] = FINGER_TRAVEL * (1.0 - action[6]) / 2.0
        self._mujoco.mj_step(self._model, self._data, SUBSTEPS)
        self._mujoco.mj_kinematics(
            self._model, self._data
        )  # positions after the last physics step, for distances and drawing
        self._num_steps += 1
        success = self._succeeded()
        truncated = self._num_steps >= self.max_steps and not success
        return self._observation(), float(success), success, truncated, {"success": success}

    def render(self) -> np.ndarray:  # type: ignore[override]
        """[S, S, 3] uint8: the last frame, as the policy sees it."""
        if self._frame is None:
            self._frame = self._draw()
        return self._frame

    def present_image(self) -> np.ndarray:
        return self.render()

    def _draw(self) -> np.ndarray:
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_camlight(self._model, self._data)
        drawn = Image.fromarray(self._camera.render(self._data, self._add_shadows))
        return np.asarray(drawn.reduce(SUPERSAMPLING))[::-1].copy()  # writable, and in an order that torch takes

    def _add_shadows(self, scene: Any) -> None:
        """Every caster once more, flat and dark."""
        for geom in self._shadow_casters:
            position = self._onto_table @ self._data.geom_xpos[geom]
            position[2] += SHADOW_HEIGHT
            shape = self._onto_table @ self._data.geom_xmat[geom].reshape(3, 3)
            shadow = scene.geoms[scene.ngeom]
            self._mujoco.mjv_initGeom(
                shadow, self._model.geom_type[geom], self._model.geom_size[geom], position, shape.ravel(), SHADOW_COLOR
            )
            shadow.specular = 0.0
            scene.ngeom += 1

    def snapshot(self) -> TabletopSnapshot:
        kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(self._mujoco.mj_stateSize(self._model, kind))
        self._mujoco.mj_getState(self._model, self._data, physics, kind)
        return TabletopSnapshot(self._task_id, self._initial_state, self._num_steps, self._was_picked, physics)

    def restore(self, snapshot: TabletopSnapshot) -> None:
        self._task_id, self._initial_state = snapshot.task_id, snapshot.initial_state
        self._num_steps, self._was_picked = snapshot.num_steps, snapshot.was_picked
        self._mujoco.mj_setState(self._model, self._data, snapshot.physics, self._mujoco.mjtState.mjSTATE_INTEGRATION)
        self._frame = None

    def close(self) -> None:
        self._camera.close()

    def _observation(self) -> dict[str, np.ndarray]:
        if not self.draws:
            self._frame, self.render_seconds = None, 0.0
            return {"image": self._undrawn}
        began = time.perf_counter()
        self._frame = self._draw()
        self.render_seconds = time.perf_counter() - began
        return {"image": self._frame}

    def _place(self, task: Task, random: np.random.Generator) -> None:
        """Objects in the middle, zones near the camera, the open gripper above the far side; the third object lies out
        of sight."""
        distractor = str(random.choice([name for name in OBJECTS if name != task.target]))
        side = random.choice([-1.0, 1.0])
        for name, sign in ((task.target, side), (distractor, -side)):
            address = self._object_qpos[name]
            x, y = random.uniform(-0.07, 0.02), sign * random.uniform(0.06, 0.11)
            half_yaw = random.uniform(-0.3, 0.3) / 2.0
            self._data.qpos[address : address + 7] = [
                x,
                y,
                OBJECT_HALF_HEIGHT,
                np.cos(half_yaw),
                0.0,
                0.0,
                np.sin(half_yaw),
            ]
        side = random.choice([-1.0, 1.0])
        for name, sign in zip(ZONES, (side, -side), strict=True):
            self._data.mocap_pos[self._zone_mocap[name]] = [
                random.uniform(0.10, 0.13),
                sign * random.uniform(0.07, 0.10),
                0.0,
            ]
        gripper = [
            random.uniform(-0.14, -0.10),
            random.uniform(-0.06, 0.06),
            random.uniform(0.09, 0.13),
            0.0,
            FINGER_TRAVEL,
            FINGER_TRAVEL,
        ]
        self._data.qpos[self._gripper_qpos] = gripper
        self._data.ctrl[:] = gripper

    def _succeeded(self) -> bool:
        task = TASKS[self._task_id]
        x, y, z = self._object_position(task.target)
        clearance = z - OBJECT_HALF_HEIGHT
        self._was_picked |= bool(clearance > PICKED_HEIGHT)
        if task.verb == "touch":
            return self._touches(task.target)
        if task.verb == "pick":
            return bool(clearance > PICKED_HEIGHT)
        assert task.zone is not None
        zone = self._zone_position(task.zone)
        inside = max(abs(x - zone[0]), abs(y - zone[1])) <= ZONE_HALF_SIDE and clearance < RESTING_HEIGHT
        if task.verb == "push":
            return bool(inside)
        return bool(inside) and self._was_picked and not self._touches(task.target)

    def _touches(self, name: str) -> bool:
        """Whether the gripper is within `TOUCHING` of the object; it may have given it a push and stopped."""
        distance, geom = self._mujoco.mj_geomDistance, self._object_geom[name]
        return any(
            distance(self._model, self._data, geom, part, TOUCHING, None) < TOUCHING for part in self._gripper_geoms
        )

    def _object_position(self, name: str) -> np.ndarray:
        address = self._object_qpos[name]
        position: np.ndarray = self._data.qpos[address : address + 3]
        return position

    def _zone_position(self, name: str) -> np.ndarray:
        position: np.ndarray = self._data.mocap_pos[self._zone_mocap[name]]
        return position
