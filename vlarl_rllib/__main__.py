"""`vlarl`, and `python -m vlarl_rllib`: takes signals before the commands are imported, which takes a second."""

import sys

from vlarl_rllib.process.console import saying_so
from vlarl_rllib.process.signals import END


def main() -> None:
    with END.listening():
        try:
            with saying_so("the command to be loaded"):
                from vlarl_rllib.cli import main as run
        except KeyboardInterrupt:
            sys.stderr.write("stopped before anything began\n")
            sys.exit(END.code)
        run()


if __name__ == "__main__":
    main()
