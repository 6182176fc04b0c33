"""Evaluation of a policy under LIBERO's protocol.

    from vlarl_rllib.evaluation import EvaluationRequest, evaluate_policy

    policy = "openvla/openvla-7b-finetuned-libero-spatial"
    result = evaluate_policy(EvaluationRequest(policy, suite="libero_spatial", gpus=1.0), "runs/eval")
    print(result.standard.success_rate, result.standard.interval)

Importing this loads neither Ray nor torch.
"""

from __future__ import annotations

from vlarl_rllib.evaluation.libero_protocol import EvaluationRequest
from vlarl_rllib.evaluation.report import EvaluationResult
from vlarl_rllib.evaluation.session import evaluate_policy

__all__ = ["EvaluationRequest", "EvaluationResult", "evaluate_policy"]
