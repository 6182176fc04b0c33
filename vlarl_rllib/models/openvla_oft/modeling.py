"""OpenVLA-OFT: OpenVLA with eight actions from one forward pass.

B = batch, L = padded prompt length, n = images, P = positions of their patches and of the state, K = actions of a
chunk, A = 7 K, G = A and the stop token, D = hidden size, S = image side.

A sequence is [BOS | patches of each image | state | rest of the prompt | A zero vectors | </s>], positions 0..N-1, and
every token attends to every other, pads excepted. The token of number k is read k positions behind the last prompt
token, so that the last zero vector and `</s>` are context alone. Source: OpenVLA-OFT (Kim et al. 2025), and the
published code's arithmetic.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlarl_rllib.models.family import SampledTokens
from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS
from vlarl_rllib.models.openvla.configuration import hub_options_of
from vlarl_rllib.models.openvla.modeling import (
    ActionPrediction,
    OpenVLAForActionPrediction,
    append_to_rows,
    right_padded,
)
from vlarl_rllib.models.openvla.sampling import choose_tokens, draw_noise
from vlarl_rllib.models.openvla_oft.component_files import ACTION_HEAD, PROPRIO_PROJECTOR
from vlarl_rllib.models.openvla_oft.components import L1RegressionActionHead, ProprioProjector, load_component
from vlarl_rllib.models.openvla_oft.configuration import OpenVLAOFTConfig
from vlarl_rllib.models.openvla_oft.layout import OFTLayout

COLORS = 3
"""Channels of a raw frame; a normalised one has them for each tower."""


class OpenVLAOFTOutput(NamedTuple):
    """What one pass gives. A named tuple, so that FSDP2 finds the tensors in it."""

    action_logits: Tensor
    """[B, A, 256] float32, over the action ids in id order; [B, G, all ids] for supervised learning."""
    values: Tensor | None
    """[B] float32 from the last prompt token; None without a value head."""
    vision_features: Tensor
    """[B, n patches, vision width] of the frames, which later passes may take instead of them."""
    normalized_actions: Tensor | None
    """[B, K, 7] float32 of the head that regresses them; None without one."""


class OpenVLAOFTForActionPrediction(OpenVLAForActionPrediction):
    """OpenVLA-OFT with an optional value head; see `OpenVLAForActionPrediction`."""

    config_class = OpenVLAOFTConfig
    _supports_flash_attn = False

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        """Raises ValueError for another attention than SDPA: the mask would be misread, or the model be causal."""
        super().__init__(config)
        if (chosen := self.language_model.config._attn_implementation) != "sdpa":
            raise ValueError(f"attn_implementation is {chosen!r}, must be 'sdpa': no other one is bidirectional here")
        self.layout: OFTLayout = config.layout
        width = config.text_config.hidden_size
        self.proprio_projector = ProprioProjector(width) if self.layout.proprio else None
        self.action_head = L1RegressionActionHead(width) if self.layout.l1_head else None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a published or own checkpoint, as `OpenVLAForActionPrediction.from_pretrained` does.

        Args:
            kwargs: those of that, and `OFTLayout`'s fields, which win over the checkpoint's config.

        Raises:
            FileNotFoundError: the state's projector or the regressing head is neither among the weights nor in a file
                of its own.
            ValueError: as there, or such a file is damaged.
        """
        layout = {name: kwargs.pop(name) for name in OFTLayout().to_dict() if name in kwargs}
        config = kwargs.pop("config", None)
        if config is None:
            towers = {"vision_towers": kwargs.pop("vision_towers")} if "vision_towers" in kwargs else {}
            config = OpenVLAOFTConfig.from_pretrained(pretrained_model_name_or_path, **towers, **hub_options_of(kwargs))
        config.oft = config.layout.with_options(layout).to_dict()
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    def _with_own_files(self, info: dict[str, Any], checkpoint: str, **hub_options: Any) -> dict[str, Any]:
        missing = set(info["missing_keys"])
        for name in (PROPRIO_PROJECTOR, ACTION_HEAD):
            if (part := getattr(self, name)) is None:
                continue
            tensors = {f"{name}.{key}" for key in part.state_dict()}
            if tensors <= missing:
                load_component(part, name, checkpoint, **hub_options)
                missing -= tensors
        return info | {"missing_keys": missing}

    @property
    def num_image_tokens(self) -> int:
        """P"""
        return self.config.num_patches * self.layout.num_images + self.layout.proprio

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        action_tokens: Tensor | None = None,
        vision_features: Tensor | None = None,
        full_vocabulary: bool = False,
        proprio: Tensor | None = None,
    ) -> OpenVLAOFTOutput:
        """One pass, with the gradient.

        Args:
            input_ids: [B, L] int64 prompts, beginning with BOS, padded on either side.
            attention_mask: [B, L], 1 at prompt tokens and 0 at pads.
            pixel_values: [B, 6 n, S, S] normalised, or raw uint8 [B, 3 n, S, S]; the wrist camera's frame comes last.
            action_tokens: not looked at: no token depends on another.
            vision_features: [B, n patches, vision width] of an earlier pass, instead of `pixel_values`.
            full_vocabulary: logits of all ids, for the tokens and the stop token.
            proprio: [B, 8] normalised states (`normalize_proprio`), where the layout has them.
        """
        features = self._vision_features(pixel_values, vision_features)
        num_rows = self.layout.num_targets if full_vocabulary else self.layout.num_tokens
        hidden = self._hidden_rows(input_ids, attention_mask, features, proprio, num_rows)
        values = None if self.value_head is None else self.value_head(hidden[:, 0])
        logits = self._logits(hidden, slice(None)) if full_vocabulary else self._action_rows(hidden)
        regressed = None if self.action_head is None else self.action_head(hidden[:, : self.layout.num_tokens])
        return OpenVLAOFTOutput(logits, values, features, regressed)

    def action_logits(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        action_tokens: Tensor | None = None,
        vision_features: Tensor | None = None,
        proprio: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, A, 256] float32 over the action ids in id order; arguments as in `forward`."""
        inputs = (input_ids, attention_mask, pixel_values, action_tokens, vision_features)
        return self(*inputs, proprio=proprio).action_logits

    def action_hidden_states(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        action_tokens: Tensor | None = None,
        vision_features: Tensor | None = None,
        proprio: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states (after the last norm) [B, A, D] where the tokens are read, and [B, D] at the last prompt
        token, which is the first of them; arguments as in `forward`."""
        features = self._vision_features(pixel_values, vision_features)
        hidden = self._hidden_rows(input_ids, attention_mask, features, proprio, self.layout.num_tokens)
        return hidden, hidden[:, 0]

    @torch.no_grad()
    def sample_action_tokens(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        temperatures: Tensor,
        seeds: Tensor | list[int] | None = None,
        proprio: Tensor | None = None,
    ) -> SampledTokens:
        """Sample one chunk for each row, all tokens from one pass.

        Args:
            input_ids, attention_mask, pixel_values, proprio: as in `forward`.
            temperatures: [B] float; 0 takes the best tokens and reports log-probs at temperature 1.
            seeds: [B] integers; a row's tokens depend on its own seed and inputs, not on the batch. None draws seeds
                from torch's global generator.

        Returns:
            tokens [B, A] int64, their log-probs [B, A] float32 over the 256 action ids at the row's temperature, and
            values [B] where there is a value head.
        """
        temperatures = temperatures.to(self.device, torch.float32)
        greedy = temperatures == 0
        output = self(input_ids, attention_mask, pixel_values, proprio=proprio)
        tokens, log_probs = self._choose(output.action_logits, torch.where(greedy, 1.0, temperatures), greedy, seeds)
        return SampledTokens(tokens, log_probs, output.values)

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        unnorm_key: str | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        seeds: Tensor | list[int] | None = None,
        proprio: Tensor | None = None,
    ) -> ActionPrediction:
        """Chunks for a batch of frames, in the units of data set `unnorm_key`: actions [B, K, 7] float64, tokens [B, A]
        and their log-probs. Arguments and errors as in `OpenVLAForActionPrediction.predict_action`."""
        stats = self.config.action_statistics(unnorm_key)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0; use do_sample=False for greedy actions")
        logits = self(input_ids, attention_mask, pixel_values, proprio=proprio).action_logits
        temperatures = torch.full((len(logits),), temperature, device=logits.device)
        greedy = torch.full((len(logits),), not do_sample, device=logits.device)
        tokens, log_probs = self._choose(logits, temperatures, greedy, seeds)
        normalized = self.action_tokenizer.decode(tokens.cpu().numpy()).reshape(len(tokens), -1, NUM_ACTION_TOKENS)
        return ActionPrediction(self.action_tokenizer.unnormalize(normalized, stats), tokens, log_probs)

    @torch.no_grad()
    def regress_action(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        unnorm_key: str | None = None,
        proprio: Tensor | None = None,
    ) -> NDArray[np.float64]:
        """Chunks [B, K, 7] of the regressing head, in the units of data set `unnorm_key`.

        Raises ValueError: unknown `unnorm_key`, or a model without that head.
        """
        stats = self.config.action_statistics(unnorm_key)
        normalized = self(input_ids, attention_mask, pixel_values, proprio=proprio).normalized_actions
        if normalized is None:
            raise ValueError("this model has no head that regresses actions; load it with l1_head=True")
        return self.action_tokenizer.unnormalize(normalized.cpu().numpy(), stats)

    def _choose(
        self, logits: Tensor, temperatures: Tensor, greedy: Tensor, seeds: Tensor | list[int] | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens of all positions [B, A, 256] at once."""
        batch, num_tokens, num_ids = logits.shape
        noise = draw_noise(seeds, batch, num_tokens, num_ids).to(logits.device)
        index, log_probs = choose_tokens(
            logits.flatten(0, 1),
            temperatures.repeat_interleave(num_tokens),
            greedy.repeat_interleave(num_tokens),
            noise.flatten(0, 1),
        )
        tokens = index + self.action_token_ids.start
        return tokens.view(batch, num_tokens), log_probs.view(batch, num_tokens)

    def _vision_features(self, pixel_values: Tensor | None, vision_features: Tensor | None) -> Tensor:
        """[B, n patches, vision width], image by image."""
        if vision_features is not None or pixel_values is None:
            return super()._vision_features(pixel_values, vision_features)
        images, channels = self.layout.num_images, COLORS if pixel_values.dtype == torch.uint8 else 2 * COLORS
        if pixel_values.shape[1] != images * channels:
            raise ValueError(
                f"pixel_values has {pixel_values.shape[1]} channels, {images} image(s) have {images * channels}; give "
                "as many images as the model's num_images"
            )
        features = self.vision_backbone(pixel_values.unflatten(1, (images, channels)).flatten(0, 1))
        return features.unflatten(0, (-1, images)).flatten(1, 2)

    def _hidden_rows(
        self, input_ids: Tensor, attention_mask: Tensor, features: Tensor, proprio: Tensor | None, num_rows: int
    ) -> Tensor:
        """Final hidden states [B, rows, D] from the last prompt token on."""
        text, lengths = right_padded(input_ids, attention_mask)
        words, num_words = self._words(text, lengths)
        seen = self._seen(features, proprio).to(words.dtype)
        embeddings = torch.cat([words[:, :1], seen, words[:, 1:]], dim=1)
        visible = self._visible(num_words + seen.shape[1], embeddings.shape[1])
        first = self._last_prompt_position(lengths)
        positions = first[:, None] + torch.arange(num_rows, device=first.device)
        return self._read_states(embeddings, positions, visible)

    def _words(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L + G, D] of each row's prompt, zero vectors and stop token, and their number [B]."""
        placeholders = text.new_zeros(len(text), self.layout.num_tokens)
        stop = text.new_full((len(text), int(self.layout.stop_token)), self.config.text_config.eos_token_id)
        ids = append_to_rows(text, lengths, torch.cat([placeholders, stop], dim=1))
        words = self.language_model.model.embed_tokens(ids)
        column = torch.arange(ids.shape[1], device=ids.device)
        behind = column - lengths[:, None]
        is_placeholder = (behind >= 0) & (behind < self.layout.num_tokens)
        return words.masked_fill(is_placeholder[..., None], 0.0), lengths + self.layout.num_targets

    def _seen(self, features: Tensor, proprio: Tensor | None) -> Tensor:
        """[B, P, D]: patches of each image, then the state's token."""
        patches = self.projector(features)
        if (proprio is None) != (self.proprio_projector is None):
            raise ValueError(
                f"proprio is {'missing' if proprio is None else 'given'}, and the model's layout says proprio="
                f"{self.layout.proprio}; give one normalised state of each row where it is true, else none"
            )
        if self.proprio_projector is None:
            return patches
        return torch.cat([patches, self.proprio_projector(proprio)[:, None].to(patches.dtype)], dim=1)

    def _visible(self, lengths: Tensor, padded: int) -> Tensor:
        """[B, 1, 1, N] bool: all tokens but pads, for each of the row."""
        return (torch.arange(padded, device=lengths.device) < lengths[:, None])[:, None, None]
