"""Token classes: maths, style, special, other.

The OPSD paper's ablation finds that words about thinking ("wait", "so") have several times the
divergence of mathematical tokens. A vocabulary entry belongs to one class, by its text:
- special: the tokenizer's special and added tokens;
- maths: text with a digit or one of the symbols below, or a LaTeX command;
- style: one of style_words.toml, alone;
- other: the rest.
"""

import re

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd.common.files import read_toml

CLASSES = ("maths", "style", "special", "other")

_SYMBOLS = "=+*/^<>_{}|&\\$-" + "".join(map(chr, range(0x2200, 0x2300))) + "\xb1\xd7\xf7"
"""They include the Unicode block of mathematical operators, plus-minus, times and division."""

_MATHS = re.compile(rf"[\d{re.escape(_SYMBOLS)}]")
_STYLE = frozenset(read_toml(__file__, "style_words")["words"])


def class_table(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The class of each vocabulary entry, as its index in CLASSES: [V + 1], uint8.

    The last entry, `other`, is for ids beyond the tokenizer, which a padded head has.
    """
    size = len(tokenizer)
    texts = tokenizer.batch_decode([[entry] for entry in range(size)])
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return torch.tensor(
        [
            CLASSES.index("special" if entry in special else class_of(text))
            for entry, text in enumerate(texts)
        ]
        + [CLASSES.index("other")],
        dtype=torch.uint8,
    )


def class_of(text: str) -> str:
    """The class of an ordinary token's text."""
    if _MATHS.search(text):
        return "maths"
    return "style" if text.strip().casefold() in _STYLE else "other"


def classes_of(table: Tensor, tokens: Tensor) -> Tensor:
    """The classes of `tokens` [N], as indices in CLASSES: [N]."""
    return table[tokens.clamp(max=len(table) - 1)]


def split_by_class(table: Tensor, tokens: Tensor, values: Tensor) -> dict[str, Tensor]:
    """For each class: `values` [N], with 0 for `tokens` [N] of other classes."""
    kinds = classes_of(table.to(values.device), tokens)
    return {name: values * (kinds == index) for index, name in enumerate(CLASSES)}
