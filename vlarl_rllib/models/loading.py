"""What transformers says of a checkpoint whose tensors are not exactly the model's."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

LOADING_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def ill_fitting(info: Mapping[str, Any]) -> dict[str, str]:
    """The first few tensors of each kind of fault in `from_pretrained`'s loading info; empty where all fit."""
    return {kind: _abbreviate(info[kind]) for kind in LOADING_FAULTS if info[kind]}


@contextmanager
def without_loading_report() -> Iterator[None]:
    """Hold back transformers' table of ill-fitting tensors, which has a line for each.

    A filter, because a higher logger level makes transformers print its tensor-parallel plan.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _abbreviate(entries: Iterable[Any]) -> str:
    """The first few of many names (or of tuples that begin with a name)."""
    names = sorted(entry if isinstance(entry, str) else entry[0] for entry in entries)
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
