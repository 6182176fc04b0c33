"""Entry point `vllm.general_plugins`: tells vLLM of the architecture and the weight-transfer engine.

vLLM calls `register` in every process that has to do with a model. It adds two names and changes nothing else: a
checkpoint runs on our class only where `hf_overrides={"architectures": ["VlarlOpenVLA"]}` asks for it.
"""

from __future__ import annotations

from contextlib import suppress

ARCHITECTURE = "VlarlOpenVLA"
TRANSFER_BACKEND = "vlarl"
MODEL_MODULE = "vlarl_rllib.engines.vllm.openvla"


def register(*, in_process: bool = False) -> None:
    """Register both; safe to call again.

    Args:
        in_process: register the class itself. By name, vLLM first starts a process to inspect the class, which costs
            a second import of vLLM; but then other vLLM users in this environment never import our models.
    """
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, _model_class() if in_process else f"{MODEL_MODULE}:{ARCHITECTURE}")
    with suppress(ValueError):  # a second registration; there is no public way to ask
        WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, MODEL_MODULE, "ManifestTransferEngine")


def _model_class() -> type:
    from vlarl_rllib.engines.vllm.openvla import VlarlOpenVLA

    return VlarlOpenVLA
