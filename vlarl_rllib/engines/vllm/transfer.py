"""How an engine's vLLM gets new weights."""

from __future__ import annotations

from typing import Any

from vlarl_rllib.engines.vllm.compat import LayerwiseTransferEngine, UpdateInfo
from vlarl_rllib.types import WeightManifest
from vlarl_rllib.weights import make_reader


class ManifestTransferEngine(LayerwiseTransferEngine):
    """Loads one published version, bucket by bucket, through the transport that its manifest names."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        manifest = WeightManifest(**update_info.manifest)
        model: Any = self.model
        for bucket in make_reader(manifest.transport).buckets(manifest):
            model.load_weights(iter(bucket.items()))
