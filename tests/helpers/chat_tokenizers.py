"""Small tokenizers of the types that the families in `chat_templates` have."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.chat_templates import Family
from opsd.data.chat import ChatTemplate


def corpus() -> list[str]:
    """Enough text for a vocabulary of words and numbers."""
    sums = [
        f"What is {a} + {b}? So {a} + {b} is \\boxed{{{a + b}}}. "
        for a in range(9)
        for b in range(40)
    ]
    return [
        *sums,
        "Please reason step by step, and put your final answer within the box.",
        "user assistant system model think",
    ]


@cache
def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A small tokenizer with the family's special tokens and template."""
    if family.metaspace:
        tokenizer = Tokenizer(
            models.BPE(unk_token=family.special[0], byte_fallback=True, fuse_unk=True)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special = [*family.special, *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, show_progress=False, max_token_length=8
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(family.special),
            initial_alphabet=alphabet,
            show_progress=False,
        )
    tokenizer.train_from_iterator(corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=family.eos, bos_token=family.bos
    )
    fast.add_special_tokens({"additional_special_tokens": list(family.special)})
    fast.chat_template = family.template
    return fast


def context_ids(chat: ChatTemplate, *turn) -> list[int]:
    """The tokens of a context."""
    return chat.tokenizer(chat.context(*turn), add_special_tokens=False).input_ids


def target_ids(chat: ChatTemplate, message: str, answer: str) -> list[int]:
    """The tokens of an answer to a message."""
    return chat.targets([(message, None, ())], [answer])[0]
