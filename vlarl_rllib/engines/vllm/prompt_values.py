"""The policy's values of the frames that vLLM samples for, from the states that it reads anyway.

N = sequences of a step, D = hidden size. Importing this imports vLLM.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from vllm import LLMEngine

from vlarl_rllib.engines.protocol import EngineError


class PromptValues:
    """Values at the last prompt token of each request, kept from the step that reads it until they are taken.

    The head runs only in steps that hold a prompt, and nothing waits for the device: a value is copied to the host
    behind the step that it is of, and vLLM waits for the tokens of that step, which come later in the same stream,
    before it says that the request has finished.

    Args:
        engine: in this process, idle; its model has a `value_head`.
    """

    def __init__(self, engine: LLMEngine) -> None:
        (self._runner,) = engine.collective_rpc(_runner_of)
        model = self._runner.get_model()
        self._head = model.value_head
        self._found: dict[str, tuple[Tensor, int]] = {}
        """By request, the values [N] of its step on the host, and its row."""
        # Not before: what vLLM runs while it starts, to measure memory and to capture graphs, are no requests.
        model.watcher = self._read

    def take(self, request_id: str) -> float:
        """Of a request that has finished; forgotten here. Raises EngineError where no step has read its prompt."""
        if request_id not in self._found:
            raise EngineError("vLLM returned a decision without having read its prompt")
        values, row = self._found.pop(request_id)
        return float(values[row])

    def _read(self, hidden: Tensor) -> None:
        """Keep values of the prompts among the sequences of a step [N, D]. A prompt that is read in several steps is
        there in each; the last one counts."""
        batch = self._runner.input_batch
        count = batch.num_reqs
        assert len(hidden) == count, "a step reads one state of each sequence"
        prompts = np.flatnonzero(batch.num_tokens_no_spec[:count] == batch.num_prompt_tokens[:count])
        if not len(prompts):
            return
        values = self._head(hidden).to("cpu", non_blocking=True)  # into pinned memory
        for row in prompts.tolist():
            self._found[batch.req_ids[row]] = values, row


def _runner_of(worker: Any) -> Any:
    return worker.model_runner
