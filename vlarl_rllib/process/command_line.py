"""How a command ends: a user's mistake and a signal are one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer
import typer.core

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.process.lost_output import tolerate_lost_readers
from vlarl_rllib.process.signals import END
from vlarl_rllib.process.surroundings import keep_caches_where_they_can_be_written


class _Stopped(Exception):
    """A KeyboardInterrupt of a command, of which Typer itself makes exit code 130, whatever the signal."""


class Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Stopped from None


FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the system says of a disk or directory that a person has to see to."""


def run(app: typer.Typer) -> None:
    """Run what the command line asks for: nothing at all is a question for help.

    A user's mistake is one line on stderr and exit code 2.
    """
    tolerate_lost_readers()
    keep_caches_where_they_can_be_written()
    with END.listening():
        _run(app)


def _run(app: typer.Typer) -> None:
    if not os.path.isdir(os.curdir):
        _fail("the working directory is not there any more; go to another one")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except SettingsError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in FULL_OR_FORBIDDEN and error.filename is None:  # not of a path that somebody gave
            raise
        _fail(f"{error.filename or 'a file'}: {error.strerror}; make room, or give another path")
    except typer.TyperException as error:  # an unknown command or option, a value of the wrong type
        _fail(error.format_message())
    except _Stopped:
        typer.echo(END.sentence("stopped"))
        sys.exit(END.code)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    typer.echo(f"vlarl: {' '.join(line.strip() for line in message.splitlines())}", err=True)
    sys.exit(2)
