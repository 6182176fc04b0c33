"""The `vlarl` command, which `python -m vlarl_rllib` is too."""

from vlarl_rllib.import_path import leave_working_directory


def main() -> None:
    """Run it, importing nothing from the working directory."""
    leave_working_directory()
    from vlarl_rllib.cli import main

    main()


if __name__ == "__main__":
    main()
