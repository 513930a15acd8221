"""Estimate a step's floating-point operations and its time on a GPU, by arithmetic alone.

It counts the products with the weights (2 operations per weight and token forward, 4 backward) and
those of attention. Training and reading prompts run at TRAINING_SHARE of the GPU's peak operations;
a sampled token takes at least the time of reading the weights and caches from memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from opsd.config.config import Config
from opsd.config.sections import RolloutSection
from opsd.models.head import attention_shapes
from opsd.plan.gpus import GPU
from opsd.plan.memory import Planner
from opsd.plan.workload import Lengths, Tokens
from opsd.rollout import SAMPLERS

TRAINING_SHARE = 0.35
"""The share of the GPU's peak operations that training reaches: assumed."""

READING_SHARE = 0.6
"""The share of the memory bandwidth that decoding reaches: assumed."""

LAUNCHES = 0.4e-3
"""Seconds per layer and token for transformers' Python code and kernel launches: assumed."""


@dataclass(frozen=True)
class Work:
    """A step's floating-point operations, and its seconds on one GPU."""

    sampling_flops: float
    student_flops: float
    teacher_flops: float
    sampling_seconds: float
    training_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.sampling_seconds + self.training_seconds


def plan_work(config: Config, planner: Planner, tokens: Tokens, gpu: GPU | None) -> Work | None:
    """The work of a step of a dense model; None for a CPU or a GPU of unknown speed."""
    if gpu is None or not gpu.operations:
        return None
    student, lengths = planner.student, planner.lengths
    text = student.get_text_config()
    head = text.vocab_size * text.hidden_size
    body = planner.parameters - head * (1 if student.tie_word_embeddings else 2)
    # Scores and their product with the values: 4 operations per visible token and head's width.
    per_pair = 4 * sum(heads * width for heads, _, width in attention_shapes(text))
    rollout, seen = lengths.rollout, {"opsd": lengths.prompt + lengths.solution}
    teacher_context = seen.get(config.method, lengths.prompt)

    def forward(ran: int, context: int) -> float:
        return ran * (2 * body + per_pair * (context + rollout / 2))

    # Frozen weights have no gradient, so backward has one product fewer.
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
    sampling_seconds = _sampling_seconds(
        config.rollout, text, body + head, rollouts, lengths, sampling_flops, gpu
    )
    return Work(
        sampling_flops,
        student_flops,
        teacher_flops,
        sampling_seconds,
        (student_flops + teacher_flops) / (gpu.operations * TRAINING_SHARE),
    )


def _sampling_seconds(
    section: RolloutSection,
    text: PreTrainedConfig,
    weights: int,
    rollouts: int,
    lengths: Lengths,
    flops: float,
    gpu: GPU,
) -> float:
    if not rollouts:
        return 0.0
    own = section.engine in SAMPLERS
    at_once = min(section.batch_size, rollouts)
    rounds = -(-rollouts // at_once)
    token = 4 * sum(heads * width for _, heads, width in attention_shapes(text))  # K and V in bf16
    read = 2 * weights + at_once * token * (lengths.prompt + lengths.rollout / 2)
    each = read / (gpu.bandwidth * READING_SHARE)
    if own:
        each = max(each, text.num_hidden_layers * LAUNCHES)
    return max(rounds * lengths.rollout * each, flops / (gpu.operations * TRAINING_SHARE))
