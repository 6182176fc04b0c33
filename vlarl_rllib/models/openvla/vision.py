"""OpenVLA's vision backbone in plain torch: a DINOv2 and a SigLIP transformer side by side.

B = batch, S = image side in pixels, P = patches, N = prefix tokens + patches, D = width.

Parameter names are the published ones (timm's, with LayerScale's `gamma` called `scale_factor`). Features leave block
`depth - 2` without the final norm; the last block, `norm` and `attn_pool` hold published weights that no forward uses.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlarl_rllib.models.openvla.configuration import OpenVLAConfig, VisionTowerConfig

PIXEL_MEAN = (0.484375, 0.455078125, 0.40625, 0.5, 0.5, 0.5)
PIXEL_STD = (0.228515625, 0.2236328125, 0.224609375, 0.5, 0.5, 0.5)
"""ImageNet's constants for DINOv2, then SigLIP's. Published preprocessor_config.json files store the former rounded to
bfloat16, because the checkpoints were converted under that default dtype."""

LAYER_NORM_EPS = 1e-6
EMBEDDING_INIT_STD = 0.02


def normalize_pixels(pixels: Tensor, mean: Sequence[float] = PIXEL_MEAN, std: Sequence[float] = PIXEL_STD) -> Tensor:
    """Turn raw images into the backbone's input, on the device where they are.

    Args:
        pixels: [B, 3, S, S] or [B, S, S, 3] uint8, RGB.
        mean, std: six numbers each, for pixels scaled to [0, 1].

    Returns:
        [B, 6, S, S] float32: channels 0-2 for DINOv2, 3-5 for SigLIP, from the same three colours.

    Raises:
        ValueError: not uint8, or neither layout.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        raise ValueError(f"raw images must be uint8 [B, 3, S, S], got {pixels.dtype} {list(pixels.shape)}")
    if pixels.shape[1] != 3 and pixels.shape[3] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.shape[1] != 3:
        raise ValueError(f"raw images must have 3 channels, got shape {list(pixels.shape)}")
    shift, scale, white = _pixel_constants(tuple(mean), tuple(std), pixels.device)
    return (pixels.to(torch.float32) / white).repeat(1, 2, 1, 1).sub_(shift).div_(scale)


@cache
def _pixel_constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation [6, 1, 1], and 255, on the device: made in each pass, they would wait for the GPU.

    The divisor is a tensor: torch turns division by a Python number into a product on CUDA, one bit off the CPU.
    """
    with torch.inference_mode(False):
        shift, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
        return shift, scale, torch.full((), 255.0, device=device)


class PatchEmbed(nn.Module):
    """Cut the image into patches: [B, 3, S, S] -> [B, P, D]."""

    def __init__(self, tower: VisionTowerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, tower.embed_dim, kernel_size=tower.patch_size, stride=tower.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


class Attention(nn.Module):
    """Full self-attention with one fused projection whose rows are [q; k; v]."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.qkv(hidden).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, length, width))


class LayerScale(nn.Module):
    """Learned factor per channel of a residual branch."""

    def __init__(self, embed_dim: int, init_value: float) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((embed_dim,), init_value))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale_factor


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block: [B, N, D] -> [B, N, D]. Recomputes itself under gradient checkpointing."""

    def __init__(self, tower: VisionTowerConfig) -> None:
        super().__init__()
        width = tower.embed_dim
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, tower.num_heads)
        self.ls1 = nn.Identity() if tower.init_values is None else LayerScale(width, tower.init_values)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * tower.mlp_ratio))
        self.ls2 = nn.Identity() if tower.init_values is None else LayerScale(width, tower.init_values)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.ls1(self.attn(self.norm1(hidden)))
        return hidden + self.ls2(self.mlp(self.norm2(hidden)))


class AttentionPool(nn.Module):
    """Weights of SigLIP's pooling head. They are part of the published checkpoint; OpenVLA never runs them."""

    def __init__(self, tower: VisionTowerConfig) -> None:
        super().__init__()
        width = tower.embed_dim
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * tower.mlp_ratio))


class VisionTransformer(nn.Module):
    """One tower: normalised pixels [B, 3, S, S] -> patch features [B, P, D] of block `depth - 2`."""

    def __init__(self, tower: VisionTowerConfig) -> None:
        super().__init__()
        width = tower.embed_dim
        self.num_prefix_tokens = tower.num_prefix_tokens
        self.patch_embed = PatchEmbed(tower)
        self.cls_token = _embedding(int(tower.class_token), width)
        self.reg_token = _embedding(tower.reg_tokens, width)
        self.pos_embed = _embedding(tower.num_patches, width)
        self.blocks = nn.ModuleList([Block(tower) for _ in range(tower.depth)])
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn_pool = AttentionPool(tower) if tower.global_pool == "map" else None

    @property
    def live_blocks(self) -> list[nn.Module]:
        """The blocks that `forward` runs: all but the last.

        An FSDP2 unit of several blocks should leave that one out: it frees its weights once all its modules have run.
        """
        return list(self.blocks)[:-1]

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels.to(self.patch_embed.proj.weight.dtype)) + self.pos_embed
        prefix = [token.expand(len(patches), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        hidden = torch.cat([*prefix, patches], dim=1)
        for block in self.live_blocks:
            hidden = block(hidden)
        return hidden[:, self.num_prefix_tokens :]


def _embedding(count: int, width: int) -> nn.Parameter | None:
    """[1, count, width] of small random numbers; None for no token."""
    return nn.Parameter(torch.empty(1, count, width).normal_(std=EMBEDDING_INIT_STD)) if count else None


class PrismaticVisionBackbone(nn.Module):
    """Both towers on the same image. Usable alone, e.g. inside vLLM's model class.

    Attributes:
        featurizer: DINOv2 tower.
        fused_featurizer: SigLIP tower.
        embed_dim: width of the joined features.
    """

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        towers = config.vision_tower_configs()
        self.featurizer = VisionTransformer(towers["featurizer"])
        self.fused_featurizer = VisionTransformer(towers["fused_featurizer"])
        self.embed_dim = sum(tower.embed_dim for tower in towers.values())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Patch features of each image.

        Args:
            pixel_values: [B, 6, S, S] normalised (`normalize_pixels`), any float dtype; or raw uint8 [B, 3, S, S] or
                [B, S, S, 3].

        Returns:
            [B, P, embed_dim] in the weights' dtype: DINOv2's features, then SigLIP's, of each patch in row-major order.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize_pixels(pixel_values)
        dino_pixels, siglip_pixels = pixel_values.split(3, dim=1)
        return torch.cat([self.featurizer(dino_pixels), self.fused_featurizer(siglip_pixels)], dim=-1)
