"""One fixed camera of a MuJoCo model, rendered off screen with an OpenGL context of its own.

robosuite's own render context stays current only until the next one is made, and never asks for itself again; with
several models in one process it draws into, and frees from, somebody else's context. This one makes itself current
before every call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

_MAX_GEOMS = 1000
"""Room for geoms in the scene, as robosuite 1.4 allots it; LIBERO's scenes draw about 90."""


class OffscreenCamera:
    """Renders `camera_name` of a model.

    Args:
        model: a `mujoco.MjModel`; with `fast` its multisampling is switched off for good.
        camera_name: a fixed camera of the model.
        size: side of the square image in pixels.
        fast: no multisampling, shadows or reflections.

    Raises:
        ValueError: the model has no such camera, or the size exceeds its off-screen buffer.
    """

    def __init__(self, model: Any, camera_name: str, size: int, *, fast: bool) -> None:
        import mujoco
        from mujoco.gl_context import GLContext

        limit = min(model.vis.global_.offwidth, model.vis.global_.offheight)
        if size > limit:
            raise ValueError(f"camera_size is {size}; the model's off-screen buffer allows at most {limit}")
        camera_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera_name)
        if camera_id < 0:
            raise ValueError(f"the model has no camera {camera_name!r}")
        if fast:
            model.vis.quality.offsamples = 0
        self._mujoco, self._model = mujoco, model
        self._gl = GLContext(size, size)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        if fast:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = camera_id
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # robosuite puts collision shapes into group 0 and visible ones into group 1
        self._options.geomgroup[1] = 1
        self._perturbation = mujoco.MjvPerturb()
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._size = size
        self._open = True

    def render(self, data: Any, add_geoms: Callable[[Any], None] | None = None) -> np.ndarray:
        """[size, size, 3] uint8 of the state in a `mujoco.MjData`, rows from bottom to top as OpenGL has them.

        `add_geoms` may append to the `mujoco.MjvScene` what the model does not have.
        """
        mujoco = self._mujoco
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self._model, data, self._options, self._perturbation, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        if add_geoms is not None:
            add_geoms(self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        image = np.empty((self._size, self._size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, self._viewport, self._context)
        return image

    def close(self) -> None:
        """Free the context's objects from this context, not from whichever is current. Closing twice is harmless."""
        if self._open:
            self._open = False
            self._gl.make_current()
            self._context.free()
            self._gl.free()

    def __del__(self) -> None:
        """A camera that is dropped without `close` would free its objects from another camera's context, whose frames
        then are noise."""
        if getattr(self, "_open", False) and not sys.is_finalizing():
            self.close()
