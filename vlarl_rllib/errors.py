"""A mistake of the user, and what an exception that crossed a process boundary says to a person.

Importing this loads no Ray.
"""

from __future__ import annotations


class SettingsError(ValueError):
    """A mistake in the settings; the text is one line fit to be shown to the user."""


class FinalError(RuntimeError):
    """What would come again from the same checkpoint, so that nothing is started anew."""


class DivergedError(FinalError):
    """Training has left the finite numbers."""


class SelfTestError(FinalError):
    """Sampler and learner do not compute the same policy, so that nothing can be learned."""


def lower_the_rates(rates: dict[str, float]) -> str:
    """What to do where training has diverged; the learning rates by their settings' keys."""
    named = " or ".join(f"{key} ({value:g})" for key, value in rates.items())
    return f"lower {named}, or use float32, and start anew or from an earlier checkpoint with --resume-from"


def cause_of(error: BaseException) -> BaseException:
    """What was raised in another process, without Ray's exception around it."""
    from ray.exceptions import RayTaskError

    return error.cause if isinstance(error, RayTaskError) else error


def one_line(error: BaseException) -> str:
    """Type and message of what went wrong, without Ray's traceback around it."""
    from ray.exceptions import RayActorError

    cause = cause_of(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no message"]
    killed = (
        isinstance(cause, RayActorError) and "creation task" not in lines[0]
    )  # Ray explains that in the lines behind the first
    return f"{type(cause).__name__}: {lines[0 if killed else -1]}"
