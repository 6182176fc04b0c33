"""Reading JSON that somebody else may have written, or a disk damaged."""

from __future__ import annotations

import json
from typing import Any

from vlarl_rllib.process.storage import Place


def read_json_object(file: Place, remedy: str) -> dict[str, Any]:
    """What a JSON file holds.

    Raises ValueError, in one line that ends with `remedy`, where that is no object, or the file cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}); {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}, must hold an object; {remedy}")
    return content
