"""`vlarl bench`: how fast each part is, beside a plain loop and what the machine could do. This file loads nothing.

Each benchmark is a module of its name with `measure(settings, profile) -> Result`.
"""

BENCHMARKS = {
    "rollout": "decisions a second of runner and engine, and of the engine alone",
    "update": "trained samples a second, with and without the score pass",
    "sync": "a push of the weights, by parts",
    "sft": "trained samples a second of supervised fine-tuning",
    "iteration": "whole training iterations, by phase",
    "env": "environment steps a second, by number of processes",
}
"""What each measures, by name."""
