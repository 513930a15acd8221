"""Floating-point operations of a step, and how long a named GPU would take: arithmetic, no measure.

Counted are the products with the weights (2 a weight and token forward, 4 backward) and attention's
own. Time is operations ÷ TRAINING_SHARE of the peak for training and for reading prompts; a sampled
token takes at least the time in which its weights and caches are read from memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from opsd.config.config import Config
from opsd.plan.workload import Lengths, Tokens
from opsd.rollout import SAMPLERS


@dataclass(frozen=True)
class GPU:
    """By the maker: bytes of memory, bytes a second, dense bf16 operations a second."""

    memory: float
    bandwidth: float
    operations: float


GPUS = {
    "b200": GPU(180e9, 8.0e12, 2250e12),
    "h200": GPU(141e9, 4.8e12, 989e12),
    "h100": GPU(80e9, 3.35e12, 989e12),
    "a100": GPU(80e9, 2.04e12, 312e12),
    "a100-40": GPU(40e9, 1.56e12, 312e12),
    "l40s": GPU(48e9, 0.864e12, 362e12),
    "5090": GPU(32e9, 1.79e12, 209e12),
    "4090": GPU(24e9, 1.01e12, 165e12),
    "3090": GPU(24e9, 0.936e12, 71e12),
    "l4": GPU(24e9, 0.3e12, 121e12),
}

TRAINING_SHARE = 0.35
"""Of the peak operations that training is taken to reach."""

READING_SHARE = 0.6
"""Of the bandwidth that decoding is taken to reach."""

LAUNCHES = 0.4e-3
"""Seconds a layer and token that transformers' Python and kernel launches are taken to need."""


@dataclass(frozen=True)
class Work:
    """A step's operations, and its seconds on a GPU."""

    sampling_flops: float
    student_flops: float
    teacher_flops: float
    sampling_seconds: float
    training_seconds: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.sampling_seconds + self.training_seconds


def plan_work(
    config: Config,
    student: PreTrainedConfig,
    parameters: int,
    tokens: Tokens,
    lengths: Lengths,
    gpu: GPU,
) -> Work:
    """The work of one step of a dense model."""
    text = student.get_text_config()
    head = text.vocab_size * text.hidden_size
    body = parameters - head * (1 if student.tie_word_embeddings else 2)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    # Scores and their product with the values: 4 a head's width and visible token.
    per_pair = 4 * text.num_hidden_layers * heads * width
    rollout, seen = lengths.rollout, {"opsd": lengths.prompt + lengths.solution}
    teacher_context = seen.get(config.method, lengths.prompt)

    def forward(ran: int, context: int) -> float:
        return ran * (2 * body + per_pair * (context + rollout / 2))

    # Of frozen weights there is no gradient: a product less in backward.
    passes = 3 if config.model.lora is None else 2
    student_flops = passes * forward(tokens.student, lengths.prompt)
    student_flops += 2 * passes * head * tokens.trained
    if config.train.gradient_checkpointing:
        student_flops += forward(tokens.student, lengths.prompt)
    teacher_flops = forward(tokens.teacher, teacher_context)
    if tokens.teacher:
        teacher_flops += 2 * head * tokens.trained
    rollouts = tokens.generated // rollout if tokens.generated else 0
    prompts = rollouts * lengths.prompt
    sampling_flops = forward(prompts + tokens.generated, lengths.prompt)
    sampling_flops += 2 * head * tokens.generated
    return Work(
        sampling_flops,
        student_flops,
        teacher_flops,
        _sampling_seconds(config, text, body + head, rollouts, lengths, sampling_flops, gpu),
        (student_flops + teacher_flops) / (gpu.operations * TRAINING_SHARE),
    )


def _sampling_seconds(config, text, weights, rollouts, lengths, flops, gpu) -> float:
    if not rollouts:
        return 0.0
    own = config.rollout.engine in SAMPLERS
    at_once = min(config.rollout.batch_size, rollouts)
    rounds = -(-rollouts // at_once)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 4 * text.num_hidden_layers * text.num_key_value_heads * width  # K and V in bf16
    read = 2 * weights + at_once * token * (lengths.prompt + lengths.rollout / 2)
    each = read / (gpu.bandwidth * READING_SHARE)
    if own:
        each = max(each, text.num_hidden_layers * LAUNCHES)
    return max(rounds * lengths.rollout * each, flops / (gpu.operations * TRAINING_SHARE))
