"""Entry point `vllm.general_plugins`: tells vLLM of the policies that have a model for it, and of the weight-transfer
engine.

vLLM calls `register` in every process that has to do with a model. It adds names and changes nothing else: a checkpoint
runs on our class only where `hf_overrides={"architectures": [...]}` asks for it.
"""

from __future__ import annotations

from contextlib import suppress

from vlarl_rllib.models.family import load_family, own_families
from vlarl_rllib.process.plugins import load_class

TRANSFER_BACKEND = "vlarl"
TRANSFER_MODULE = "vlarl_rllib.engines.vllm.compat"


def architecture_of(reference: str) -> str:
    """Under which vLLM knows the model `module:Class`: the class's name."""
    return reference.partition(":")[2]


def register(*, in_process: str | None = None) -> None:
    """Register all; safe to call again.

    Args:
        in_process: `PolicyFamily.vllm_model` whose class itself is registered. By name, vLLM first starts a process to
            inspect the class, which costs a second import of vLLM; but then other vLLM users in this environment never
            import our models.
    """
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    models = [family.vllm_model for family in map(load_family, own_families())]
    known = ModelRegistry.get_supported_archs()
    for reference in {in_process, *models} - {None}:
        assert reference is not None
        if architecture_of(reference) in known:
            continue
        model = load_class(reference) if reference == in_process else reference
        ModelRegistry.register_model(architecture_of(reference), model)
    with suppress(ValueError):  # a second registration; there is no public way to ask
        WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, TRANSFER_MODULE, "LayerwiseTransferEngine")
