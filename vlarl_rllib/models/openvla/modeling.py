"""OpenVLA for action prediction: vision backbone, projector and Llama, under the published parameter names.

B = batch, L = padded prompt length, P = image patches, A = action tokens (7), D = hidden size, S = image side.

A sequence is [BOS | P image patches | rest of the prompt | action tokens], causal throughout, positions 0..N-1. Rows of
uneven length are exact: action tokens follow each row's own prompt and pads come last, where nothing looks at them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from vlarl_rllib.models.critic import ValueHead
from vlarl_rllib.models.family import SampledTokens
from vlarl_rllib.models.files import ADAPTER_CONFIG_FILE, CONFIG_FILE, check_weights
from vlarl_rllib.models.loading import ill_fitting, without_loading_report
from vlarl_rllib.models.openvla.actions import NUM_ACTION_TOKENS, ActionTokenizer
from vlarl_rllib.models.openvla.configuration import (
    OpenVLAConfig,
    find_checkpoint_file,
    hub_options_of,
    merge_dataset_statistics,
    require_checkpoint_file,
)
from vlarl_rllib.models.openvla.last_layer import LastDecoderLayer
from vlarl_rllib.models.openvla.sampling import choose_tokens, draw_noise
from vlarl_rllib.models.openvla.vision import PrismaticVisionBackbone

PROJECTOR_EXPANSION = 4
"""Width of the projector's first layer relative to the vision features."""


class OpenVLAOutput(NamedTuple):
    """What one teacher-forced pass gives. A named tuple, so that FSDP2 finds the tensors in it."""

    action_logits: Tensor
    """[B, A, 256] float32, over the action ids in id order (or all ids); A is 1 where no action tokens were given."""
    values: Tensor | None
    """[B] float32 from the last prompt token; None without a value head."""
    vision_features: Tensor
    """[B, P, vision width] of the frames, which later passes may take instead of them while the towers stay the same.
    """


class ActionPrediction(NamedTuple):
    """Actions for a batch of frames."""

    actions: NDArray[np.float64]
    """[B, 7] in the data set's units."""
    tokens: Tensor
    """[B, 7] int64 token ids."""
    log_probs: Tensor
    """[B, 7] float32, over the 256 action ids at the temperature that was asked for."""


class PrismaticProjector(nn.Module):
    """Three-layer MLP from vision features to the language model's width."""

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, PROJECTOR_EXPANSION * vision_dim)
        self.fc2 = nn.Linear(PROJECTOR_EXPANSION * vision_dim, text_dim)
        self.fc3 = nn.Linear(text_dim, text_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


class OpenVLAForActionPrediction(PreTrainedModel):
    """OpenVLA with an optional value head.

    `forward` does everything that training needs and calls every submodule through its own `__call__`, so that FSDP2
    units may be the towers, their blocks, the projector, the decoder layers, and the root with everything else.
    """

    config_class = OpenVLAConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        self.vision_backbone = PrismaticVisionBackbone(config)
        self.projector = PrismaticProjector(self.vision_backbone.embed_dim, config.text_config.hidden_size)
        self.language_model = LlamaForCausalLM(config.text_config)
        layers = self.language_model.model.layers
        layers[-1] = LastDecoderLayer(config.text_config, len(layers) - 1)
        self.value_head: ValueHead | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules initialise themselves when built, and loaded weights must stay untouched."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a published or own checkpoint from a directory or Hub id, in evaluation mode.

        Takes the keywords of `PreTrainedModel.from_pretrained`, e.g. `config=None, dtype=torch.float32`, and
        `vision_towers`. Raises FileNotFoundError where the checkpoint has no `config.json` and ValueError where its
        weights are no whole safetensors or its tensors not exactly the model's.
        """
        checkpoint = str(pretrained_model_name_or_path)
        hub_options = hub_options_of(kwargs)
        require_checkpoint_file(checkpoint, CONFIG_FILE, **hub_options)
        if Path(checkpoint).is_dir():
            check_weights(Path(checkpoint))
        elif (
            find_checkpoint_file(checkpoint, ADAPTER_CONFIG_FILE, **hub_options) is not None
        ):  # transformers would load it too
            raise ValueError(f"checkpoint '{checkpoint}' holds an adapter beside the model; merge it first")
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        return_info = kwargs.pop("output_loading_info", False)
        with without_loading_report():
            loaded: Any = super().from_pretrained(
                checkpoint, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, info = loaded
        if wrong := ill_fitting(model._with_own_files(info, checkpoint, **hub_options)):
            raise ValueError(
                f"the tensors of checkpoint '{checkpoint}' are not those that its config.json describes: {wrong}; "
                "pass vision_towers=... if its towers are not the published ones"
            )
        model.config.norm_stats = merge_dataset_statistics(model.config.norm_stats, checkpoint, **hub_options)
        return (model, info) if return_info else model

    def _with_own_files(self, info: dict[str, Any], checkpoint: str, **hub_options: Any) -> dict[str, Any]:
        """Load the parts that have files of their own; transformers' loading info without their tensors."""
        return info

    @property
    def action_token_ids(self) -> range:
        """The 256 ids that stand for action bins, ascending."""
        return self.config.action_token_ids

    @property
    def action_tokenizer(self) -> ActionTokenizer:
        """Ids to normalised actions and back."""
        return ActionTokenizer(self.config.action_vocab_size, self.config.n_action_bins)

    @property
    def num_image_tokens(self) -> int:
        """P"""
        return self.config.num_patches

    def add_value_head(self, seed: int = 0) -> ValueHead:
        """Attach a new float32 value head (all values 0); it stays out of `save_pretrained`."""
        self.value_head = ValueHead(self.config.text_config.hidden_size, seed).to(self.device)
        own_names = {f"value_head.{name}" for name in self.value_head.state_dict()}
        self._keys_to_ignore_on_save = own_names.union(self._keys_to_ignore_on_save or ())  # type: ignore[has-type]
        return self.value_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        action_tokens: Tensor | None = None,
        vision_features: Tensor | None = None,
        full_vocabulary: bool = False,
    ) -> OpenVLAOutput:
        """Score given action tokens in one pass, and read the value.

        Args:
            input_ids: [B, L] int64 prompts, beginning with BOS, padded on either side.
            attention_mask: [B, L], 1 at prompt tokens and 0 at pads.
            pixel_values: [B, 6, S, S] normalised, or raw uint8 [B, 3, S, S].
            action_tokens: [B, A] int64, or None to read only the first token's logits and the value.
            vision_features: [B, P, vision width] output of `vision_backbone`, instead of `pixel_values`.
            full_vocabulary: logits of all ids instead of the 256 action ids, for supervised learning of the end of
                sequence.

        Returns:
            Logits at the positions that predict the action tokens, and values where there is a value head.
        """
        features = self._vision_features(pixel_values, vision_features)
        hidden, prompt_hidden = self.action_hidden_states(
            input_ids, attention_mask, action_tokens=action_tokens, vision_features=features
        )
        values = None if self.value_head is None else self.value_head(prompt_hidden)
        logits = self._logits(hidden, slice(None)) if full_vocabulary else self._action_rows(hidden)
        return OpenVLAOutput(logits, values, features)

    def action_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        action_tokens: Tensor | None = None,
        vision_features: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced logits [B, A, 256] float32 over the action ids in id order; arguments as in `forward`."""
        return self(input_ids, attention_mask, pixel_values, action_tokens, vision_features).action_logits

    def action_hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        action_tokens: Tensor | None = None,
        vision_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states (after the last norm) that predict the action tokens; arguments as in `forward`.

        Returns:
            [B, A, D] at the positions that predict each action token (A = 1 without action tokens), and [B, D] at the
            last prompt token, which is the first of them.
        """
        text, lengths = right_padded(input_ids, attention_mask)
        if action_tokens is not None:
            text = append_to_rows(text, lengths, action_tokens[:, :-1])
        embeddings = self._sequence_embeddings(text, self._vision_features(pixel_values, vision_features))
        num_states = 1 if action_tokens is None else action_tokens.shape[1]
        positions = self._last_prompt_position(lengths)[:, None] + torch.arange(num_states, device=lengths.device)
        hidden = self._read_states(embeddings, positions)
        return hidden, hidden[:, 0]

    def _read_states(self, embeddings: Tensor, positions: Tensor, visible: Tensor | None = None) -> Tensor:
        """Llama's final hidden states [B, A, D] at `positions` [B, A] of sequences [B, N, D].

        Its own forward asks the GPU in each pass whether several sequences are packed into a row, and waits for it.

        Args:
            visible: [B, 1, 1, N] bool, tokens that all of the row attend to; None = each to all up to itself.
        """
        decoder = self.language_model.model
        mask = visible
        if visible is None:
            mask = create_causal_mask(
                config=decoder.config, inputs_embeds=embeddings, attention_mask=None, past_key_values=None
            )
        position_ids = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        rotary = decoder.rotary_emb(embeddings, position_ids=position_ids)
        hidden = embeddings
        for layer in decoder.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                past_key_values=None,
                use_cache=False,
                read_positions=positions,
                visible=visible,
            )
        return decoder.norm(hidden)

    @torch.no_grad()
    def sample_action_tokens(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        temperatures: Tensor,
        seeds: Tensor | list[int] | None = None,
    ) -> SampledTokens:
        """Sample one action for each row.

        Args:
            input_ids, attention_mask, pixel_values: as in `forward`.
            temperatures: [B] float; 0 takes the best token and reports log-probs at temperature 1.
            seeds: [B] integers; a row's tokens depend on its own seed and inputs, not on the batch. None draws seeds
                from torch's global generator.

        Returns:
            As `SampledTokens` says: A = 7 tokens, of 256 ids, and values where there is a value head.
        """
        temperatures = temperatures.to(self.device, torch.float32)
        greedy = temperatures == 0
        temperatures = torch.where(greedy, torch.ones_like(temperatures), temperatures)
        return self._decode(input_ids, attention_mask, pixel_values, temperatures, greedy, seeds)

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
    ) -> ActionPrediction:
        """Actions for a batch of frames, in the units of data set `unnorm_key`.

        Args:
            input_ids, attention_mask, pixel_values: as in `forward`.
            unnorm_key: data set whose statistics un-normalise the action.
            do_sample: sample at `temperature`, else take the best action token at each step.
            temperature: above 0; of the distribution that is sampled and whose log-probs are reported.
            seeds: [B], as in `sample_action_tokens`.

        Raises:
            ValueError: unknown `unnorm_key`, or a temperature that is not positive.
        """
        stats = self.config.action_statistics(unnorm_key)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0; use do_sample=False for greedy actions")
        batch = len(input_ids)
        temperatures = torch.full((batch,), temperature, device=self.device)
        greedy = torch.full((batch,), not do_sample, device=self.device)
        tokens, log_probs, _ = self._decode(input_ids, attention_mask, pixel_values, temperatures, greedy, seeds)
        tokenizer = self.action_tokenizer
        actions = tokenizer.unnormalize(tokenizer.decode(tokens.cpu().numpy()), stats)
        return ActionPrediction(actions, tokens, log_probs)

    def _decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        temperatures: Tensor,
        greedy: Tensor,
        seeds: Tensor | list[int] | None,
    ) -> SampledTokens:
        """Prefill, then one cached step per further token. Pads stay in the cache, hidden by a mask."""
        if self.training and self.is_gradient_checkpointing:
            raise ValueError("gradient checkpointing drops the cache in training mode; call model.eval() to sample")
        noise = draw_noise(seeds, len(input_ids), NUM_ACTION_TOKENS, len(self.action_token_ids)).to(self.device)
        text, lengths = right_padded(input_ids, attention_mask)
        embeddings = self._sequence_embeddings(text, self._vision_features(pixel_values, None))
        position = self._last_prompt_position(lengths)
        prefill = embeddings.shape[1]
        visible = torch.arange(prefill + NUM_ACTION_TOKENS, device=position.device).expand(len(text), -1)
        visible = (visible <= position[:, None]) | (visible >= prefill)
        has_pads = bool((lengths < text.shape[1]).any())

        cache = DynamicCache(config=self.config.text_config)
        decoder = self.language_model.model
        hidden = decoder(
            inputs_embeds=embeddings, past_key_values=cache, use_cache=True, read_positions=position[:, None]
        ).last_hidden_state
        values = None if self.value_head is None else self.value_head(hidden[:, 0])
        tokens, log_probs = [], []
        for step in range(NUM_ACTION_TOKENS):
            index, log_prob = choose_tokens(self._action_rows(hidden[:, 0]), temperatures, greedy, noise[:, step])
            tokens.append(index + self.action_token_ids[0])
            log_probs.append(log_prob)
            if step + 1 < NUM_ACTION_TOKENS:
                hidden = decoder(
                    inputs_embeds=decoder.embed_tokens(tokens[-1][:, None]),
                    attention_mask=visible[:, : prefill + step + 1] if has_pads else None,
                    position_ids=(position + step + 1)[:, None],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
        return SampledTokens(torch.stack(tokens, dim=1), torch.stack(log_probs, dim=1), values)

    def _vision_features(self, pixel_values: Tensor | None, vision_features: Tensor | None) -> Tensor:
        """[B, P, vision width], computed unless they are given."""
        if vision_features is not None:
            return vision_features
        if pixel_values is None:
            raise ValueError("pass pixel_values, or vision_features that were computed before")
        return self.vision_backbone(pixel_values)

    def _sequence_embeddings(self, text: Tensor, vision_features: Tensor) -> Tensor:
        """Embeddings [B, P + text length, D] of [BOS | patches | rest of the text]."""
        patches = self.projector(vision_features)
        words = self.language_model.model.embed_tokens(text)
        return torch.cat([words[:, :1], patches.to(words.dtype), words[:, 1:]], dim=1)

    def _last_prompt_position(self, lengths: Tensor) -> Tensor:
        """[B] index of each row's last prompt token in the sequence, where the patches precede it."""
        return lengths - 1 + self.num_image_tokens

    def _action_rows(self, hidden: Tensor) -> Tensor:
        """Logits [..., 256] float32 of the action ids alone."""
        return self._logits(hidden, slice(self.action_token_ids.start, self.action_token_ids.stop))

    def _logits(self, hidden: Tensor, ids: slice) -> Tensor:
        """Logits float32 of these ids alone."""
        head: Any = self.language_model.lm_head
        rows = (
            head.rows(ids) if hasattr(head, "rows") else head.weight[ids]
        )  # an adapted head merges the rows that are asked for
        return F.linear(hidden, rows).float()


def right_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move pads behind the prompt, wherever they were: ([B, L] ids, [B] int64 prompt lengths)."""
    mask = attention_mask.bool()
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
    return input_ids.gather(1, order), mask.sum(dim=1)


def append_to_rows(text: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    """Put `tokens` [B, n] directly behind each row's prompt: [B, L + n]; what was there are pads."""
    columns = lengths[:, None] + torch.arange(tokens.shape[1], device=text.device)
    return torch.cat([text, text.new_zeros(tokens.shape)], dim=1).scatter(1, columns, tokens)
