"""`python -m vlarl_rllib` is `vlarl`."""

from vlarl_rllib.cli import main

main()
