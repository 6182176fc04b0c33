"""What a command imports from: what is installed and what PYTHONPATH names, not the directory that it happens to be run
in.

`cd MODEL; python -m vlarl_rllib train ...` would take a numpy.py that lies in MODEL for numpy. This concerns commands
alone: a script or notebook has its own path. Nothing that a directory could stand in for is imported here, not even
`__future__`.
"""

import os
import sys


def leave_working_directory() -> None:
    """Take the working directory off the path of this process and of those that it starts, unless PYTHONPATH or an
    import of ours is there.

    Only what Python has put before its own library goes: behind that are installed projects, one of which may be worked
    on right here.
    """
    if (
        "PYTHONPATH" in os.environ
    ):  # an empty entry means the working directory, and is most often left by `$PYTHONPATH:more`
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, os.environ["PYTHONPATH"].split(os.pathsep)))
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # removed meanwhile
        return
    if here not in _wanted():
        library = os.path.dirname(os.__file__)
        first = next(
            (index for index, entry in enumerate(sys.path) if entry.endswith(".zip") or entry == library), len(sys.path)
        )
        sys.path[:first] = [entry for entry in sys.path[:first] if os.path.realpath(entry) != here]


def is_import_path(directory: str) -> bool:
    """Whether this process imports from there."""
    return any(os.path.realpath(entry) == os.path.realpath(directory) for entry in sys.path)


def is_our_command() -> bool:
    """Whether this process is `vlarl`, `python -m vlarl_rllib`, or one of the environments' (`python -m
    vlarl_rllib.envs.worker`)."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name == "vlarl" or (
        name == "-m"
        and any(argument.removeprefix("-m").partition(".")[0] == "vlarl_rllib" for argument in sys.orig_argv[1:])
    )


def _wanted() -> set[str]:
    """Directories that are on the path by intent: the one that this package lies in, and those of PYTHONPATH."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    return {
        package,
        *(os.path.realpath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry),
    }
