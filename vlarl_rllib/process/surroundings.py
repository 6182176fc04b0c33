"""What a command needs of the machine and the environment variables, checked before Ray is loaded.

Every finding is one line.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import shutil
import socket
import stat
import sys
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

from vlarl_rllib.errors import SettingsError

PROBE_SECONDS = 5.0
"""For the answer to a connection, names looked up; a cluster that can be worked with answers in milliseconds."""
MAX_SOCKET_BYTES = 107
"""Of the path of a Unix socket (`sockaddr_un`)."""
SOCKET_EXAMPLE = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.9"
"""What Ray puts behind the directory that it is given."""
MIN_FREE_BYTES = 100_000_000
"""Ray's logs, and what its start writes beside them."""
MIN_SHARED_MEMORY_BYTES = 100_000_000
"""Ray starts no object store below 75 MB, and leaves a twentieth of what is free."""
OWN_RAY = "unset RAY_ADDRESS for a Ray of vlarl's own"
HUB = "https://huggingface.co"


def user_directory() -> Path:
    """A directory for what need not outlast the machine, made where there is none: short enough for sockets, and nobody
    else's to read.

    In RAY_TMPDIR where that is set; else in TMPDIR, or in /tmp where that is too long for sockets, absent or not
    writable.

    Raises:
        SettingsError: none of them will do.
    """
    if chosen := os.environ.get("RAY_TMPDIR"):
        places = [("RAY_TMPDIR", chosen)]
    else:
        places = [("TMPDIR", place) for place in (os.environ.get("TMPDIR"), "/tmp") if place]
    reasons = []
    for name, place in places:
        directory = Path(place).absolute() / f"vlarl-{os.getuid()}"
        if (reason := _unfit(directory)) is None:
            return directory
        reasons.append(f"{name}: {place} {reason}")
    raise SettingsError(
        f"{'; '.join(dict.fromkeys(reasons))}; set RAY_TMPDIR to a short path on a disk that is yours to write"
    )


def _unfit(directory: Path) -> str | None:
    """Why this cannot be the user's directory; makes it where it can."""
    if (length := len(os.fsencode(directory)) + len(SOCKET_EXAMPLE)) > MAX_SOCKET_BYTES:
        return f"is too long: Ray's sockets would have paths of {length} bytes, and {MAX_SOCKET_BYTES} are possible"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        facts = directory.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            return f"has a {directory.name} that belongs to somebody else"
        directory.chmod(0o700)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    if free < MIN_FREE_BYTES:
        return f"has {free / 1e6:.0f} MB left, and Ray needs {MIN_FREE_BYTES / 1e6:.0f} MB"
    return None


def cache_directory() -> Path:
    """Where models and compiled code are kept: ~/.cache/vlarl, or a place that ends with the machine where there is no
    home to write to."""
    cache = Path(os.path.expanduser("~"), ".cache", "vlarl")
    if cache.is_absolute():  # without HOME and an entry in the list of users it is not
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            if os.access(cache, os.W_OK | os.X_OK):
                return cache
    return user_directory()


def keep_caches_where_they_can_be_written() -> None:
    """Without a home to write to: Numba refuses to compile where its cache cannot be kept, and Matplotlib makes a new
    directory each time."""
    folders = {"NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib"}
    missing = [name for name in folders if name not in os.environ]
    if missing and not home_is_writable():
        with suppress(SettingsError):  # there is no other place either, which a command that needs one says
            for name in missing:
                os.environ[name] = str(user_directory() / folders[name])


def home_is_writable() -> bool:
    """Whether the home directory takes files; Ray's token, and the caches of others, go there."""
    home = os.path.expanduser("~")
    return os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK)


def cluster_address() -> str | None:
    """`host:port` of the cluster that RAY_ADDRESS names, `auto` where Ray has to look for it, None where a command
    starts a Ray of its own."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return address if address and address != "local" else None


def check_ray() -> None:
    """Raise `SettingsError` where no Ray can be joined or started; not where this process works in one already."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    check_token()
    address = cluster_address()
    if address is None:
        user_directory()
        if (free := shutil.disk_usage("/dev/shm").free) < MIN_SHARED_MEMORY_BYTES:
            raise SettingsError(
                f"/dev/shm: {free / 1e6:.0f} MB are left, and Ray's object store needs "
                f"{MIN_SHARED_MEMORY_BYTES / 1e6:.0f} MB; "
                "make room, or raise its size (docker run --shm-size=2g)"
            )
    elif address == "auto":
        _check_local_cluster()
    else:
        host, port = parse_address(address)
        if (problem := unreachable(host, port)) is not None:
            raise SettingsError(
                f"RAY_ADDRESS: nothing answers at {address} ({problem}); start that cluster, or {OWN_RAY}"
            )


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`. Raises `SettingsError` for anything else."""
    if "://" in address:
        raise SettingsError(
            f"RAY_ADDRESS: {address!r} is an address of Ray Client, which signals and progress do not pass; run "
            "vlarl on a node of the cluster, "
            "with RAY_ADDRESS=auto"
        )
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if (
        not host
        or any(letter.isspace() for letter in host)
        or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)
    ):
        raise SettingsError(
            f"RAY_ADDRESS: {address!r} is no address; give host:port of the cluster's head such as "
            "10.0.0.1:6379, auto, or nothing"
        )
    return host, int(port)


def unreachable(host: str, port: int) -> str | None:
    """Why no connection is taken there within `PROBE_SECONDS`; None where one is."""
    found: list[str | None] = [f"no answer in {PROBE_SECONDS:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
            found.append(None)
        except OSError as error:  # gaierror, too
            found.append(error.strerror or str(error))

    thread = threading.Thread(
        target=connect, daemon=True
    )  # a name server that is gone takes longer than any time-out given
    thread.start()
    thread.join(PROBE_SECONDS)
    return found[-1]


def _check_local_cluster() -> None:
    """For RAY_ADDRESS=auto: what `ray start` left in its directory, or any cluster's process."""
    import psutil

    place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    file = Path(place, "ray", "ray_current_cluster")
    remedy = f"start one with `ray start --head`, or {OWN_RAY}"
    if file.is_file():
        address = file.read_text().strip()
        if (problem := unreachable(*parse_address(address))) is not None:
            raise SettingsError(
                f"RAY_ADDRESS: auto means the cluster at {address} ({file}), but nothing answers there "
                f"({problem}); {remedy}"
            )
    elif not any(process.info["name"] == "gcs_server" for process in psutil.process_iter(["name"])):
        raise SettingsError(f"RAY_ADDRESS: auto, but no Ray cluster runs on this machine; {remedy}")


def check_token() -> None:
    """Raise `SettingsError` where RAY_AUTH_MODE or RAY_AUTH_TOKEN_PATH say what cannot be."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() not in ("token", "disabled"):
        raise SettingsError(f"RAY_AUTH_MODE: {mode!r} does not exist; choose token or disabled")
    if mode is not None and mode.lower() == "disabled":
        return
    if (
        (path := os.environ.get("RAY_AUTH_TOKEN_PATH"))
        and not os.environ.get("RAY_AUTH_TOKEN")
        and _text_of(path) is None
    ):
        raise SettingsError(
            f"RAY_AUTH_TOKEN_PATH: {path} holds no token; give the file that the cluster's token is in, or unset it"
        )
    if mode is not None and cluster_address() and not has_ray_token():
        raise SettingsError(
            "RAY_AUTH_MODE: token, but there is none; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to that of the cluster"
        )


def has_ray_token() -> bool:
    """Whether Ray would find a token, in the places where it looks."""
    return ray_token() is not None


def ray_token_file() -> Path | None:
    """The file that Ray would take its token from, where there is one."""
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    return Path(file).absolute() if _text_of(file) else None


def ray_token() -> str | None:
    """The token that Ray would find, in the places where it looks."""
    file = ray_token_file()
    return os.environ.get("RAY_AUTH_TOKEN") or (_text_of(str(file)) if file else None)


def _text_of(path: str) -> str | None:
    try:
        return Path(path).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def check_wandb(project: str) -> None:
    """Raise `SettingsError` where Weights & Biases cannot be logged to."""
    if importlib.util.find_spec("wandb") is None:
        raise SettingsError(
            f"run.wandb: {project!r} needs wandb, which is not installed; run: pip install wandb, or set "
            "run.wandb to null"
        )
    if _wandb_stays_here() or os.environ.get("WANDB_API_KEY"):
        return
    host = _wandb_url().hostname or ""
    for file in (os.environ.get("NETRC"), os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")):
        try:
            if file and netrc.netrc(file).authenticators(host):
                return
        except (OSError, netrc.NetrcParseError):
            continue
    raise SettingsError(
        f"run.wandb: {project!r} is given, but there is no login to {host}; run `wandb login`, set "
        "WANDB_API_KEY, or set WANDB_MODE to offline"
    )


def wandb_is_not_reached() -> str | None:
    """Why what is logged cannot be sent to Weights & Biases now; None where it can, or is not to be."""
    target = _wandb_url()
    if _wandb_stays_here() or getproxies().get(target.scheme) or getproxies().get("all"):
        return None
    port = target.port or (443 if target.scheme == "https" else 80)
    return unreachable(target.hostname, port) if target.hostname else "its address has no host"


def _wandb_stays_here() -> bool:
    return os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled")


def _wandb_url() -> SplitResult:
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def forgo_the_hub_where_it_is_not_reached() -> bool:
    """Tell Hugging Face's library to use its cache alone where the hub does not answer; it would try for half a minute
    at every file.

    Returns:
        Whether it is used.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    target = urlsplit(os.environ.get("HF_ENDPOINT") or HUB)
    if proxy := getproxies().get(target.scheme) or getproxies().get("all"):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if (
        target.hostname
        and unreachable(target.hostname, target.port or (443 if target.scheme == "https" else 80)) is None
    ):
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, by the actors of a local Ray too
    return False
