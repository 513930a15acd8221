"""The config's sections on what is learnt: the loss, its token weights, and rewards.

`opsd train --help` prints the fields' descriptions, as those of `sections.py`.
"""

import re
from typing import Literal

from pydantic import Field, field_validator

from opsd.config.base import Section


class WeightsSection(Section):
    """What a token counts in the loss."""

    correct: float = Field(1.0, ge=0, description="Weight of rollouts that are right.")
    incorrect: float = Field(1.0, ge=0, description="Weight of rollouts that are wrong.")
    truncated: float = Field(
        1.0, ge=0, description="Weight of rollouts cut at rollout.max_new_tokens."
    )
    skip_first: int = Field(0, ge=0, description="Tokens at a rollout's start that count nothing.")
    position: list[float] = Field(
        [1.0, 1.0],
        min_length=2,
        max_length=2,
        description="Weights of a rollout's first and last token, linear between them.",
    )
    maths: float = Field(1.0, ge=0, description="Weight of tokens with digits or symbols.")
    style: float = Field(
        1.0, ge=0, description="Weight of words about thinking itself, such as wait, so, maybe."
    )
    special: float = Field(1.0, ge=0, description="Weight of the tokenizer's special tokens.")
    other: float = Field(1.0, ge=0, description="Weight of all other tokens.")

    @field_validator("position")
    @classmethod
    def _check_position(cls, ends: list[float]) -> list[float]:
        if min(ends) < 0 or max(ends) == 0:
            raise ValueError("weights must be at least 0, and one of them more")
        return ends


class RewardSection(Section):
    """How a rollout is graded: for grpo, for weights by correctness and for the log."""

    verifier: str = Field(
        "math",
        description="What grades a rollout: math (its last \\boxed{}, by math-verify), or "
        "FILE.py:FUNCTION, called with the text and the row (docs/methods.md).",
    )
    strict: bool = Field(
        True,
        description="math: sums left to be worked out (17 + 25 for 42) and answers in another base "
        "than the reference's earn nothing (docs/evaluate.md).",
    )
    keep_special_tokens: bool = Field(
        False,
        description="Hand the verifier the whole text with its special tokens; by default it gets "
        "what follows the thought, and nothing where a thought was never closed.",
    )
    success_threshold: float = Field(
        1.0, description="The verifier's score from which a rollout is right."
    )
    format: str | None = Field(
        None, description="A regular expression that the whole rollout should match."
    )
    format_weight: float = Field(0.1, gt=0, description="Reward of a match.")
    overlong_buffer: int | None = Field(
        None,
        ge=1,
        description="Last tokens before rollout.max_new_tokens over which the reward falls by 1 "
        "(DAPO's soft overlong punishment).",
    )
    log: bool = Field(
        False, description="Grade rollouts for the log's sake (pass@k) where no loss needs it."
    )

    @field_validator("format")
    @classmethod
    def _check_format(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"it is no regular expression: {error}") from None
        return pattern


class LossSection(Section):
    """What is minimised."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "sampled_token"] = Field(
        "forward_kl",
        description="opsd: D(teacher ‖ student) over the vocabulary; sampled_token: policy "
        "gradient with log p_T - log p_S of the rollout's own tokens (docs/methods.md).",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="opsd: the teacher's share in jsd's mixture.")
    temperature: float = Field(1.0, gt=0, description="opsd: divides both roles' logits.")
    clip: Literal["none", "entry", "token"] = Field(
        "none",
        description="opsd: bound each vocabulary entry's part (the official code's; can invert the "
        "gradient), or each token's.",
    )
    clip_threshold: float = Field(0.05, gt=0, description="opsd: the clip's bound τ, in nats.")
    importance_bound: float | None = Field(
        2.0,
        gt=0,
        description="Rollouts by vLLM, or of before a step's first update: a token counts by its "
        "probability under the student ÷ under what sampled it, at most this; null: as it is.",
    )
    weights: WeightsSection = Field(
        WeightsSection(), description="What a token counts; the factors multiply."
    )
    aggregation: Literal["token", "rollout", "constant"] = Field(
        "token",
        description="The step's loss is the mean over its tokens, the mean over rollouts of their "
        "tokens' mean (TRL's SDFT, the first GRPO), or the sum ÷ (rollouts * max_new_tokens) "
        "(Dr. GRPO).",
    )
    reward: RewardSection = Field(RewardSection(), description="How rollouts are graded.")
    epsilon: float = Field(
        0.2, gt=0, lt=1, description="grpo, sampled_token: lower clip of the probability ratio."
    )
    epsilon_high: float | None = Field(
        None, gt=0, description="Its upper clip; none: epsilon (DAPO: 0.28)."
    )
    kl: float = Field(
        0.0, ge=0, description="grpo: weight of the KL to the reference, teacher.policy's weights."
    )
    credit: float = Field(
        0.0,
        ge=0,
        le=1,
        description="grpo: how far the teacher shares a rollout's advantage out among its tokens "
        "(RLSD's λ).",
    )
    credit_clip: float = Field(
        0.2, gt=0, lt=1, description="grpo: a token's share is within 1 ± this (RLSD's ε_w)."
    )
    credit_steps: int | None = Field(
        None, ge=1, description="grpo: steps over which credit falls to 0; none: it stays."
    )
    scale_advantages: bool = Field(
        True, description="grpo: divide advantages by the group's standard deviation."
    )
    roles: list[Literal["student", "teacher"]] = Field(
        ["student"],
        min_length=1,
        description="sft: whose contexts the target follows. Both: the cold start.",
    )
    backend: Literal["auto", "torch", "cpp", "triton", "cuda"] = Field(
        "auto", description="The kernel's backend."
    )
    memory_budget: int | None = Field(
        None, ge=1 << 20, description="Bytes of logits the kernel may hold; none: its own choice."
    )
