"""A mistake of the user, and what an exception that crossed a process boundary says to a person. Importing this loads no Ray."""

from __future__ import annotations


class SettingsError(ValueError):
    """A mistake in the settings; the text is one line fit to be shown to the user."""


def one_line(error: BaseException) -> str:
    """Type and message of what went wrong, without Ray's traceback around it."""
    from ray.exceptions import RayActorError, RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no message"]
    killed = isinstance(cause, RayActorError) and "creation task" not in lines[0]  # Ray explains that in the lines behind the first
    return f"{type(cause).__name__}: {lines[0 if killed else -1]}"
