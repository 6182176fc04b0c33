"""What Weights & Biases was told, from a `.wandb` file: its records, in LevelDB's log format, as protocol buffers."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(file: Path) -> Iterator[Record]:
    """Those that are whole: a kill cuts the last one short."""
    content, at, parts = file.read_bytes(), FILE_HEADER, b""
    assert content.startswith(b":W&B") or not content
    while at + HEADER <= len(content):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        piece = content[at + HEADER : at + HEADER + length]
        if len(piece) < length or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
        at += HEADER + length


def history_of(file: Path) -> list[dict[str, Any]]:
    """What was logged, step by step; nested names with a slash."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in read_records(file)
        if record.WhichOneof("record_type") == "history"
    ]


def run_of(file: Path) -> tuple[Any, dict[str, Any]]:
    """W&B's run, and the config that it was given."""
    run = next(record.run for record in read_records(file) if record.WhichOneof("record_type") == "run")
    return run, {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in run.config.update}
