"""The base of `opsd quickstart --tiny`: a Qwen3 of 0.8M parameters, trained on worksheets.

It learns two things at once. From the student's prompt (the problem) it learns some arithmetic, and
is stopped while it still errs. From the teacher's prompt (the problem and a solution in somebody
else's form) it learns to give the solution in its own form, and, because the digits of its *inputs*
are corrupted at random while its labels stay clean, to return to it after a wrong digit. That is
what a teacher has to do on a student's rollout.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opsd.common.errors import UserError
from opsd.common.saved_directory import check_saved, new_directory
from opsd.common.templates import fill_in, shipped
from opsd.data.rows import Row
from opsd.quickstart import worksheet
from opsd.quickstart.cache import tiny_base
from opsd.quickstart.settings import settings

_PROMPTS = settings("tiny")[0]["prompts"]
STUDENT_PROMPT, TEACHER_PROMPT = _PROMPTS["student"], _PROMPTS["teacher"]

_CHAT_TEMPLATE = shipped(
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_CHARACTERS = "\n 0123456789+-*=;:.,QS"
_IGNORED = -100  # cross_entropy's label for a token without loss
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class BaseTraining:
    """How the base is trained; part of the cache's key."""

    steps: int = 450  # optimizer steps
    batch_size: int = 32  # rows a step, all of them in the same role's prompt
    teacher_share: float = 0.4  # share of the steps that are in the teacher's prompt
    # In those steps, the share of the response's input digits replaced by random ones.
    corruption: float = 0.15
    # The highest; a linear warm-up over a twentieth of the steps, then a cosine down to a tenth
    # of it. AdamW with betas .9 and .99, no weight decay.
    learning_rate: float = 6e-3
    # Of all weight matrices. Near 1/sqrt(width); with transformers' usual .02 a model this small
    # learns to copy only after twice as many steps.
    initial_deviation: float = 0.12


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token a character, five special tokens, and a chat template."""
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    characters = Tokenizer(WordLevel(vocabulary, unk_token="<|pad|>"))
    characters.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def make_model(
    seed: int, tokenizer: PreTrainedTokenizerFast, initial_deviation: float = 0.12
) -> Qwen3ForCausalLM:
    """An untrained fp32 Qwen3 of 0.8M parameters for this tokenizer, the same for the same seed."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=initial_deviation,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def train_base(
    seed: int,  # of the weights, the worksheets (none of them held out) and the corruption
    recipe: BaseTraining = BaseTraining(),  # how
    *,
    # Called after each step with the number of steps done and the loss, in nats a token
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Train the base from scratch on the CPU; the same model for the same arguments and threads."""
    tokenizer = make_tokenizer()
    model = make_model(seed, tokenizer, recipe.initial_deviation).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    rng = random.Random(f"roles {seed}")
    generator = torch.Generator().manual_seed(seed)
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    rows = _endless_rows(seed)
    for step in range(recipe.steps):
        teacher = rng.random() < recipe.teacher_share
        batch = [next(rows) for _ in range(recipe.batch_size)]
        inputs, labels = encode(batch, tokenizer, TEACHER_PROMPT if teacher else STUDENT_PROMPT)
        if teacher:
            inputs = corrupt(inputs, labels, digits, recipe.corruption, generator)
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        supervised = labels != _IGNORED
        loss = cross_entropy(model.lm_head(hidden[supervised]), labels[supervised])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress:
            progress(step + 1, loss.item())
    return model.eval(), tokenizer


def cached_base(
    seed: int,
    recipe: BaseTraining = BaseTraining(),
    *,
    cache: Path | None = None,  # where bases are kept; by default `$OPSD_CACHE`, or `~/.cache/opsd`
    progress: Callable[[int, float], None] | None = None,
) -> Path:
    """The directory of the trained base, for plain `from_pretrained`; trained only if not cached.

    A base is found again by its seed, its recipe, this code and the versions of torch and
    transformers. One that is damaged is trained anew.
    """
    directory = tiny_base(seed, _digest(recipe), cache)
    with suppress(UserError):
        if check_saved(directory, "the cache") is not None:
            return directory
    model, tokenizer = train_base(seed, recipe, progress=progress)
    with new_directory(directory) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return directory


def load_base(directory: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The fp32 model and the tokenizer that `cached_base` saved."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(directory)


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, prompt: str
) -> tuple[Tensor, Tensor]:
    """Rows as a batch: the prompt through the chat template, the `worked` column, the end token.

    Returns:
        inputs [B, T] int64, padded on the right (causal attention needs no mask then), and labels
        [B, T] int64: the next token where it belongs to the response, -100 elsewhere.
    """
    prompts = fill_in(prompt, [row.columns for row in rows])
    contexts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": message}] for message in prompts],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    texts = [row.columns["worked"] for row in rows]
    responses = [
        [*ids, tokenizer.eos_token_id]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]
    length = max(len(c) + len(r) for c, r in zip(contexts, responses, strict=True))
    inputs = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), _IGNORED)
    for index, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        start, end = len(context), len(context) + len(response)
        inputs[index, :end] = torch.tensor(context + response)
        labels[index, start - 1 : end - 1] = torch.tensor(response)
    return inputs, labels


def corrupt(
    inputs: Tensor, labels: Tensor, digits: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """`inputs` [B, T] with about `share` of the response's digits replaced by random ones.

    The response is what `labels` [B, T] ask for, one position later; the context stays as it is.
    `digits` [10] are the digits' token ids.
    """
    response = torch.zeros_like(labels, dtype=torch.bool)
    response[:, 1:] = labels[:, :-1] != _IGNORED
    chosen = response & torch.isin(inputs, digits)
    chosen &= torch.rand(inputs.shape, generator=generator) < share
    drawn = torch.randint(len(digits), (int(chosen.sum()),), generator=generator)
    corrupted = inputs.clone()
    corrupted[chosen] = digits[drawn]
    return corrupted


def _endless_rows(seed: int) -> Iterator[Row]:
    block = 0
    while True:
        # The blocks' seeds are negative: those of the rows that OPSD trains on later are not.
        yield from worksheet.worksheet_rows(_ROWS_AT_ONCE, seed=-1 - (seed * 10_000 + block))
        block += 1


def _rate(step: int, steps: int) -> float:
    """Share of the highest learning rate at `step`: a warm-up, then a cosine down to a tenth."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def _digest(recipe: BaseTraining) -> str:
    parts = [Path(module).read_bytes() for module in (__file__, worksheet.__file__)]
    parts.append(
        repr((astuple(recipe), _PROMPTS, torch.__version__, transformers.__version__)).encode()
    )
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]
