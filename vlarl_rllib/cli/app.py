"""The Typer application that every module here adds its commands to."""

from __future__ import annotations

import typer

from vlarl_rllib.process.command_line import Commands

app = typer.Typer(
    cls=Commands,
    name="vlarl",
    help="PPO fine-tuning of vision-language-action models with RLlib, vLLM and FSDP.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
