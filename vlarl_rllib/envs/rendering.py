"""Which OpenGL implementation MuJoCo renders with, chosen before MuJoCo is imported.

A GPU through EGL if there is one, else OSMesa, else EGL in software. MuJoCo and robosuite read the choice from
`MUJOCO_GL` when they are imported, so `configure_rendering` runs first; a value set by the user is left as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass

_EGL_EXTENSIONS = 0x3055
_EGL_PLATFORM_DEVICE_EXT = 0x313F
"""Constants of egl.h and of the extension EGL_EXT_platform_device."""
_SOFTWARE_DEVICE = "EGL_MESA_device_software"
"""Extension that Mesa lists for its software rasteriser (EGL_MESA_device_software)."""


BACKENDS = ("egl", "osmesa", "glx", "glfw")
"""What MuJoCo takes for MUJOCO_GL on Linux; the last two need a display."""


@dataclass(frozen=True)
class EGLDevices:
    """Indices, in EGL's own order (which `MUJOCO_EGL_DEVICE_ID` counts in), of the devices that can be initialised."""

    gpu: tuple[int, ...] = ()
    software: tuple[int, ...] = ()


@dataclass(frozen=True)
class GLBackend:
    """A value for `MUJOCO_GL` and, for EGL, the device index."""

    name: str
    egl_device: int | None = None


def configure_rendering(render_device: int = 0, environ: MutableMapping[str, str] = os.environ) -> GLBackend:
    """Choose the backend and write it to `environ`, unless the user or an earlier call did.

    Raises:
        RuntimeError: nothing can render here, or MuJoCo was imported before a backend was chosen.
    """
    if "MUJOCO_GL" not in environ and "mujoco" in sys.modules:
        raise RuntimeError(
            "MuJoCo was imported before its rendering backend was chosen; set MUJOCO_GL (egl or osmesa) in the "
            "environment, or build the environment before importing mujoco"
        )
    backend = choose_gl_backend(render_device, environ)
    environ["MUJOCO_GL"] = backend.name
    if backend.egl_device is not None:
        environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(backend.egl_device))
    return backend


def choose_gl_backend(render_device: int = 0, environ: MutableMapping[str, str] = os.environ) -> GLBackend:
    """The backend for this machine, without changing anything.

    Args:
        render_device: which GPU, modulo their number: processes that count up spread over all GPUs.
        environ: where `MUJOCO_GL` is looked up; a value there wins.

    Raises:
        RuntimeError: neither EGL nor OSMesa can be loaded, or a variable names what there is not.
    """
    chosen = environ.get("MUJOCO_GL", "").strip().lower()
    if chosen not in ("", *BACKENDS):
        raise RuntimeError(
            f"MUJOCO_GL: {chosen!r} is no backend of MuJoCo; unset it, or choose from {', '.join(BACKENDS)}"
        )
    if chosen not in ("", "egl"):
        return GLBackend(chosen)
    if chosen and (device := environ.get("MUJOCO_EGL_DEVICE_ID")):
        if not device.isdecimal():
            raise RuntimeError(
                f"MUJOCO_EGL_DEVICE_ID: {device!r} is no number of a GPU; unset it, or give one, counted from 0"
            )
        # Not asked again: looking at a display ends with terminating it, and MuJoCo may be drawing on that very one by
        # now.
        return GLBackend("egl", int(device))
    devices = find_egl_devices()
    if devices.gpu:
        return GLBackend("egl", devices.gpu[render_device % len(devices.gpu)])
    if chosen == "egl":
        return GLBackend("egl", devices.software[0] if devices.software else None)
    if has_osmesa():
        return GLBackend("osmesa")
    if devices.software:
        return GLBackend("egl", devices.software[0])
    raise RuntimeError(
        "nothing can render here: no EGL device answers and OSMesa is missing; run as root: apt-get install -y "
        "libosmesa6 libegl1 libgl1"
    )


def has_osmesa() -> bool:
    """Whether the library behind MuJoCo's OSMesa backend is installed."""
    return _load_library("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so") is not None


def find_egl_devices() -> EGLDevices:
    """Ask libEGL which devices it can render on. Takes milliseconds; there are none without libEGL."""
    egl = _load_library("libEGL.so.1", "libEGL.so")
    if egl is None:
        return EGLDevices()
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    query_devices = _extension(
        egl, "eglQueryDevicesEXT", ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
    )
    query_string = _extension(egl, "eglQueryDeviceStringEXT", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
    get_display = _extension(
        egl, "eglGetPlatformDisplayEXT", ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p
    )
    if query_devices is None or query_string is None or get_display is None:
        return EGLDevices()
    count = ctypes.c_int()
    if not query_devices(0, None, ctypes.byref(count)) or not count.value:
        return EGLDevices()
    handles = (ctypes.c_void_p * count.value)()
    query_devices(count.value, handles, ctypes.byref(count))
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    egl.eglTerminate.argtypes = [ctypes.c_void_p]
    gpu: list[int] = []
    software: list[int] = []
    for index, handle in enumerate(handles[: count.value]):
        display = get_display(_EGL_PLATFORM_DEVICE_EXT, handle, None)
        if not display or not egl.eglInitialize(display, None, None):
            continue
        egl.eglTerminate(display)
        extensions = (query_string(handle, _EGL_EXTENSIONS) or b"").decode()
        (software if _SOFTWARE_DEVICE in extensions else gpu).append(index)
    return EGLDevices(tuple(gpu), tuple(software))


def _load_library(*names: str) -> ctypes.CDLL | None:
    """The first of these shared libraries that loads."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _extension(egl: ctypes.CDLL, name: str, result: type, *arguments: type) -> ctypes._FuncPointer | None:
    """An EGL extension function, or None where this libEGL has none of that name."""
    address = egl.eglGetProcAddress(name.encode())
    return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None
