"""Bound the number of a text's tokens by its size: a hundred times faster than tokenising it.

Each token stands for at least one byte of the text that reaches a tokenizer's model. The factors
here bound how much each earlier step can lengthen a text; a step not listed has no bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NORMALISE = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "StripAccents": 1}
"""Normaliser → its growth in UTF-8 bytes (Unicode's annex 15, table 6). ASCII does not grow."""

_MODELS = frozenset({"BPE", "Unigram", "WordPiece", "WordLevel"})

_SPLIT = frozenset(
    "Split Digits Whitespace WhitespaceSplit Punctuation CharDelimiterSplit UnicodeScripts".split()
)
"""Pre-tokenizers that split a text without adding anything."""


def token_bound(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int] | None:
    """A function that bounds a text's number of tokens from above; None if there is no bound."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ not in _MODELS:
        return None
    try:
        parts = filter(None, (backend.normalizer, backend.pre_tokenizer))
        steps = [json.loads(step.__getstate__()) for step in parts]
    except Exception:  # a step written in Python
        return None
    growth = _growth({"type": "Sequence", "normalizers": steps}, backend.token_to_id)
    if growth is None:
        return None
    of_ascii, of_any = growth

    def bound(text: str) -> int:
        return len(text) * of_ascii if text.isascii() else len(text.encode()) * of_any

    return bound


def _growth(step: dict[str, Any], token_to_id: Callable) -> tuple[int, int] | None:
    """The factors by which a step can lengthen (ASCII, any text); None without a bound."""
    kind = step["type"]
    if kind == "Sequence":
        parts = step.get("normalizers") or step.get("pretokenizers") or ()
        inner = [_growth(one, token_to_id) for one in parts]
        if None in inner:
            return None
        return prod(ascii_growth for ascii_growth, _ in inner), prod(growth for _, growth in inner)
    if kind in _NORMALISE:
        return 1, _NORMALISE[kind]
    if kind in _SPLIT:
        return 1, 1
    if kind == "ByteLevel":  # may add a space before each piece of at least one byte
        return (2, 2) if step.get("add_prefix_space") else (1, 1)
    # A mark that replaces a space has three bytes, but is one token if it is in the vocabulary.
    if kind == "Replace" and step["pattern"] == {"String": " "}:
        return (1, 1) if token_to_id(step["content"]) is not None else None
    if kind == "Prepend":
        return (2, 2) if token_to_id(step["prepend"]) is not None else None
    if kind == "Metaspace":
        return (2, 2) if token_to_id(step["replacement"]) is not None else None
    return None
