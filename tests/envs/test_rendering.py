"""Choice of the OpenGL backend on machines that are made up, and drawing with several contexts on this one."""

import subprocess
import sys

import pytest

from vlarl_rllib.envs import rendering
from vlarl_rllib.envs.rendering import EGLDevices, GLBackend, choose_gl_backend, configure_rendering


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def set_up(gpu: tuple[int, ...] = (), software: tuple[int, ...] = (), osmesa: bool = False) -> None:
        monkeypatch.setattr(rendering, "find_egl_devices", lambda: EGLDevices(gpu, software))
        monkeypatch.setattr(rendering, "has_osmesa", lambda: osmesa)
        monkeypatch.delitem(sys.modules, "mujoco", raising=False)

    return set_up


def test_gpu_comes_first(machine) -> None:
    machine(gpu=(0, 1), software=(2,), osmesa=True)
    assert choose_gl_backend(environ={}) == GLBackend("egl", 0)


def test_processes_spread_over_the_gpus(machine) -> None:
    machine(gpu=(1, 3), software=(0, 2))
    assert [choose_gl_backend(index, {}).egl_device for index in range(4)] == [1, 3, 1, 3]


def test_osmesa_before_software_egl(machine) -> None:
    machine(software=(0,), osmesa=True)
    assert choose_gl_backend(environ={}) == GLBackend("osmesa")
    machine(software=(0,), osmesa=False)
    assert choose_gl_backend(environ={}) == GLBackend("egl", 0)


def test_users_choice_wins(machine) -> None:
    machine(gpu=(0,), osmesa=True)
    assert choose_gl_backend(environ={"MUJOCO_GL": "osmesa"}) == GLBackend("osmesa")
    machine(software=(4,), osmesa=True)
    assert choose_gl_backend(environ={"MUJOCO_GL": "egl"}) == GLBackend("egl", 4)


def test_nothing_to_render_with_names_the_command(machine) -> None:
    machine()
    with pytest.raises(RuntimeError, match="apt-get install -y libosmesa6"):
        choose_gl_backend(environ={})


def test_environment_is_set_for_mujoco(machine) -> None:
    machine(gpu=(2,))
    hidden_gpus = {"CUDA_VISIBLE_DEVICES": ""}  # what Ray gives an actor without GPUs
    configure_rendering(0, hidden_gpus)
    assert hidden_gpus == {"CUDA_VISIBLE_DEVICES": "", "MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "2"}
    chosen = {"MUJOCO_EGL_DEVICE_ID": "7"}
    configure_rendering(0, chosen)
    assert chosen["MUJOCO_EGL_DEVICE_ID"] == "7"


def test_too_late_to_choose(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(osmesa=True)
    monkeypatch.setitem(sys.modules, "mujoco", sys)
    with pytest.raises(RuntimeError, match="before its rendering backend was chosen"):
        configure_rendering(0, {})
    configure_rendering(0, {"MUJOCO_GL": "osmesa"})


TWO_CAMERAS = """
from vlarl_rllib.envs.rendering import configure_rendering
configure_rendering()
import mujoco
from vlarl_rllib.envs.camera import OffscreenCamera

xml = '''<mujoco><asset><texture name="t" type="2d" builtin="flat" rgb1="{0}" width="8" height="8"/>
<material name="m" texture="t"/></asset><worldbody><light pos="0 0 3"/><camera name="top" pos="0 0 2"/>
<geom group="1" type="box" size=".5 .5 .1" material="m"/></worldbody></mujoco>'''
models = [mujoco.MjModel.from_xml_string(xml.format(color)) for color in ("1 0 0", "0 1 0")]
data = [mujoco.MjData(model) for model in models]
for model, state in zip(models, data):
    mujoco.mj_forward(model, state)
cameras = [OffscreenCamera(model, "top", 32, fast=True) for model in models]
for _ in range(2):
    for channel in (0, 1):
        assert cameras[channel].render(data[channel])[16, 16].argmax() == channel
cameras[0].close()
assert cameras[1].render(data[1])[16, 16].argmax() == 1
again = OffscreenCamera(models[0], "top", 32, fast=False)
assert again.render(data[0])[16, 16].argmax() == 0 and cameras[1].render(data[1])[16, 16].argmax() == 1
for camera in (again, cameras[1]):
    camera.close()
"""


def test_cameras_of_one_process_do_not_disturb_each_other() -> None:
    subprocess.run([sys.executable, "-c", TWO_CAMERAS], check=True)


def test_a_chosen_device_is_not_looked_for_again(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking terminates EGL's display of the device, on which the first model of the process is drawing by then."""
    machine(gpu=(2,))
    environ: dict[str, str] = {}
    assert configure_rendering(environ=environ) == GLBackend("egl", 2)
    monkeypatch.setattr(rendering, "find_egl_devices", lambda: pytest.fail("the display was looked at again"))
    assert configure_rendering(environ=environ) == GLBackend("egl", 2)


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"MUJOCO_GL": "nonsense"}, "MUJOCO_GL: 'nonsense' is no backend of MuJoCo; unset it, or choose from egl"),
        ({"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "cuda0"}, "MUJOCO_EGL_DEVICE_ID: 'cuda0' is no number of a GPU"),
    ],
)
def test_a_variable_that_names_nothing_is_told(environ: dict[str, str], told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        choose_gl_backend(environ=environ)
