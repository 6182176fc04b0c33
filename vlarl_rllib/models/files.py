"""The files of a model, an adapter or a judge, checked without torch: weights are whole safetensors, and nothing asks
for foreign code.

Model code, tokenizer code and pickles beside the weights are never read, but for OpenVLA-OFT's own parts, of which
torch's reader of weights takes tensors alone (`models/openvla_oft/components.py`); what here is refused are settings
that would have a library fetch or import something, and weights that a library would fail at, or fall back from, later.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlarl_rllib.process.json_files import read_json_object

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CONFIG_FILE, STATISTICS_FILE = "config.json", "dataset_statistics.json"
ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
OTHER_FORMATS = "weights in another format (*.bin, *.pt) are not read"
AGAIN = "copy it again"
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Where transformers takes the name of a repository whose compiled code it would download and run."""

ADAPTER_KEYS = frozenset(
    (
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
        "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern",
        "revision", "target_modules",
        "task_type", "use_rslora",
    )
)  # fmt: skip
"""Fields of an adapter's config that plain LoRA has; `auto_mapping`, `base_model_name_or_path` and `revision` are not
followed. Others must be
unset: they change what is computed, or (`megatron_core`) name a module that PEFT would import."""
UNSET: tuple[Any, ...] = (None, False, "none", {}, [], "megatron.core")
"""Values of other fields that PEFT writes where a feature is not used, or that have no effect without one that is."""
HARMLESS = {"qalora_group_size": 16}
"""Further such values, by field."""


def check_weights(directory: Path) -> None:
    """Whether a model's directory has its weights, whole, and no adapter that transformers would put onto them.

    Raises:
        FileNotFoundError: no weights in safetensors.
        ValueError: in one line, which file is wrong.
    """
    if (directory / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(f"{directory} holds an adapter ({ADAPTER_CONFIG_FILE}) beside the model; merge it first")
    index = directory / INDEX_FILE
    if (directory / WEIGHTS_FILE).is_file() or not index.is_file():  # transformers prefers it too
        if not (directory / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(
                f"{directory} has no {WEIGHTS_FILE}; {OTHER_FORMATS}: save the model as safetensors"
            )
        check_safetensors(directory / WEIGHTS_FILE)
        return
    shards = read_json_object(index, AGAIN).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} has no weight_map of file names; {AGAIN}")
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is no safetensors file of this directory; {OTHER_FORMATS}")
        check_safetensors(directory / name)


def check_safetensors(file: Path) -> dict[str, Any]:
    """Whether a file has the length that its header says; what that header says of each tensor.

    Raises ValueError, in one line, where not, or where there is none.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"it has {size} bytes and its header claims {length}")
            header = json.loads(stream.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; {AGAIN}") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}); {AGAIN}") from None
    if 8 + length + end != size:
        raise ValueError(f"{file} is damaged: its header describes {8 + length + end} bytes, it has {size}; {AGAIN}")
    return tensors


@dataclass(frozen=True)
class WeightFacts:
    """What the headers of a model's weights say; the weights themselves are not read."""

    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int]
    """Parameters by type, in safetensors' words: F32, BF16, ..."""


def weight_facts(directory: Path) -> WeightFacts:
    """Of a model's or adapter's directory. Raises ValueError, in one line, for a damaged file."""
    dtypes: Counter[str] = Counter()
    num_tensors = num_bytes = 0
    whole = directory / WEIGHTS_FILE  # transformers prefers it to shards
    for file in [whole] if whole.is_file() else sorted(directory.glob("*.safetensors")):
        for name, entry in check_safetensors(file).items():
            try:
                (begin, end), size = map(int, entry["data_offsets"]), math.prod(map(int, entry["shape"]))
                dtypes[str(entry["dtype"])] += size
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: {name} cannot be read ({error}); {AGAIN}") from None
            num_tensors, num_bytes = num_tensors + 1, num_bytes + end - begin
    return WeightFacts(num_tensors, sum(dtypes.values()), num_bytes, dict(dtypes))


def check_adapter(directory: str | Path) -> dict[str, Any]:
    """Whether a directory holds a whole PEFT adapter of plain LoRA; its config.

    Raises:
        FileNotFoundError: there is none, or none with weights in safetensors.
        ValueError: in one line, what is wrong with it.
    """
    root = Path(directory).expanduser()
    if not (root / ADAPTER_CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{directory}: no PEFT adapter here ({ADAPTER_CONFIG_FILE} is missing)")
    config = read_json_object(root / ADAPTER_CONFIG_FILE, AGAIN)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory}: the adapter is of type {config.get('peft_type')}, must be LORA")
    unsupported = sorted(
        name for name, value in config.items() if name not in ADAPTER_KEYS and value not in (*UNSET, HARMLESS.get(name))
    )
    if unsupported:
        raise ValueError(
            f"{directory}: the adapter uses {', '.join(unsupported)}, which is not supported; plain LoRA without "
            "bias is"
        )
    if not (root / ADAPTER_WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"{directory} has no {ADAPTER_WEIGHTS_FILE}; {OTHER_FORMATS}: save the adapter as safetensors"
        )
    check_safetensors(root / ADAPTER_WEIGHTS_FILE)
    return config


def refuse_foreign_code(config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where a model's config asks for code or weights from elsewhere.

    `auto_map` is no such thing: nobody follows it.
    """
    for name in ("", "text_config", "vision_config"):
        values = config.get(name) if name else config
        if not isinstance(values, Mapping):
            continue
        for key in KERNEL_KEYS:
            asked = values.get(key)
            if asked is not None and (not isinstance(asked, str) or "/" in asked):
                raise ValueError(
                    f"{where}: {name}{'.' if name else ''}{key} is {asked!r}, which would run code from "
                    "elsewhere; remove it"
                )
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"{where}: transformers_weights is {config['transformers_weights']!r}; weights are read from "
            f"{WEIGHTS_FILE} alone, remove it"
        )


def read_config(checkpoint: str) -> tuple[dict[str, Any], Path]:
    """`config.json` of a directory or hub id, and where it lies.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object, in one line.
    """
    file = find_file(checkpoint, CONFIG_FILE)
    if file is None:
        raise FileNotFoundError(
            f"{checkpoint}: has no config.json; give a checkpoint directory, a hub id, or a preset such as tiny"
        )
    return read_json_object(file, AGAIN), file


def find_file(checkpoint: str, name: str) -> Path | None:
    """A file of a directory or hub id; None where there is none. Raises FileNotFoundError: the hub is not reached."""
    directory = Path(checkpoint)
    if directory.is_dir():
        return directory / name if (directory / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(checkpoint, name))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{checkpoint}: cannot be fetched from the hub and is not in the local cache; download it first"
        ) from error
    except EntryNotFoundError:
        return None
