"""Loading a judge of either kind."""

from __future__ import annotations

from pathlib import Path

from vlarl_rllib.rewards.judge import Judge, check_judge


def load_judge(directory: str | Path, device: str = "cpu") -> Judge:
    """The judge in `directory`, on "cpu" or "cuda".

    Raises ValueError, one line, for a directory that holds none or a damaged one.
    """
    if check_judge(directory) == "classifier":
        from vlarl_rllib.rewards.classifier import SuccessClassifier

        return SuccessClassifier.load(directory, device)
    from vlarl_rllib.rewards.vision_language import VisionLanguageJudge

    return VisionLanguageJudge(directory, device)
