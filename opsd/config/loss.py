"""The config's `loss` section, with its token weights, gates and rewards.

`opsd train --help` prints the docstrings below the fields.
"""

import re
from typing import Literal

from pydantic import Field, field_validator

from opsd.config.base import Count, Fraction, Natural, NonNegative, Positive, Section, Share

GATES = ("teacher_entropy", "teacher_unsure", "gap", "share", "history")


class WeightsSection(Section):
    """A token's weight in the loss: the product of these factors."""

    correct: NonNegative = 1.0
    """Weight of rollouts that are right."""
    incorrect: NonNegative = 1.0
    """Weight of rollouts that are wrong."""
    truncated: NonNegative = 1.0
    """Weight of rollouts cut at rollout.max_new_tokens."""
    skip_first: Natural = 0
    """Tokens at a rollout's start that count nothing."""
    position: list[float] = Field([1.0, 1.0], min_length=2, max_length=2)
    """Weights of a rollout's first and last token, linear between them."""
    maths: NonNegative = 1.0
    """Weight of tokens with digits or symbols."""
    style: NonNegative = 1.0
    """Weight of words about thinking itself, such as wait, so, maybe."""
    special: NonNegative = 1.0
    """Weight of the tokenizer's special tokens."""
    other: NonNegative = 1.0
    """Weight of all other tokens."""
    balance: bool = True
    """teacher.routes: each teacher's tokens together count in a step as much as any other's."""

    @field_validator("position")
    @classmethod
    def _check_position(cls, ends: list[float]) -> list[float]:
        if min(ends) < 0 or max(ends) == 0:
            raise ValueError("weights must be at least 0, and one of them above 0")
        return ends


class RewardSection(Section):
    """How a rollout is graded: for grpo, for weights by correctness and for the log."""

    verifier: str = "math"
    r"""What grades a rollout: math (its last \boxed{}, by math-verify), or FILE.py:FUNCTION, called
    with the text and the row (docs/methods.md)."""
    strict: bool = True
    """math: sums left to be worked out (17 + 25 for 42) and answers in another base than the
    reference's earn nothing (docs/evaluate.md)."""
    keep_special_tokens: bool = False
    """Pass the whole text with its special tokens to the verifier; by default it gets the text
    after the thought, and nothing if the thought never ends."""
    success_threshold: float = 1.0
    """The verifier's score from which a rollout is right."""
    format: str | None = None
    """A regular expression that the whole rollout should match."""
    format_weight: Positive = 0.1
    """Reward of a match."""
    overlong_buffer: Count | None = None
    """Last tokens before rollout.max_new_tokens over which the reward falls by 1 (DAPO's soft
    overlong punishment)."""
    log: bool = False
    """Grade rollouts for the log (pass@k) even if the loss does not need it."""

    @field_validator("format")
    @classmethod
    def _check_format(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"it is not a regular expression: {error}") from None
        return pattern


class GateSection(Section):
    """A factor of a token's weight: floor + (1 - floor) · gate. Several multiply
    (docs/methods.md)."""

    gate: str
    """teacher_entropy: exp(-H_T ÷ scale); teacher_unsure: 1 where H_T > scale; gap: the logistic
    function of scale · Δ; share: 1 + scale · (1 - the share of Σ|Δ| before the token);
    history: DASH's, by the divergences before; or FILE.py:FUNCTION."""
    scale: Positive = 1.0
    """The gate's one number: nats for entropies, otherwise a factor."""
    floor: Share = 0.0
    """The least that the factor can be."""

    @field_validator("gate")
    @classmethod
    def _check_gate(cls, name: str) -> str:
        if name not in GATES and ".py:" not in name:
            raise ValueError(f"it may be {', '.join(GATES)} or FILE.py:FUNCTION")
        return name


class LossSection(Section):
    """The loss: divergences, token weights, rewards."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "sampled_token"] = "forward_kl"
    """opsd: D(teacher ‖ student) over the vocabulary; sampled_token: policy gradient with log p_T -
    log p_S of the rollout's own tokens (docs/methods.md)."""
    beta: Fraction = 0.5
    """opsd: the teacher's share in jsd's mixture."""
    temperature: Positive = 1.0
    """opsd: divides both roles' logits."""
    clip: Literal["none", "entry", "token"] = "none"
    """opsd: bound each token's divergence, or the term of each vocabulary entry (as the official
    code does; it can invert the gradient)."""
    clip_threshold: Positive = 0.05
    """opsd: the clip's bound τ, in nats."""
    importance_bound: Positive | None = 2.0
    """Where other weights sampled (vLLM, or the student before the step's first update), a token is
    weighted by its probability under the student ÷ under the sampler, at most this; null: not
    weighted."""
    weights: WeightsSection = WeightsSection()
    """A token's weight in the loss, a product of factors."""
    gates: list[GateSection] = Field([])
    """opsd: more factors of a token's weight, from its entropies and log-probabilities."""
    unsure: NonNegative = 0.0
    """reverse_kl: add this times the forward KL at tokens where the teacher is unsure (EOPD)."""
    unsure_entropy: Positive = 0.8
    """loss.unsure: the teacher is unsure where its entropy is above this, in nats."""
    control_variate: bool = False
    """sampled_token: add KL(student ‖ teacher) to the advantage, whose mean is then 0 (vOPD)."""
    aggregation: Literal["token", "rollout", "constant"] = "token"
    """The step's loss is the mean over its tokens, the mean over rollouts of their tokens' mean
    (TRL's SDFT, the first GRPO), or the sum ÷ (rollouts * max_new_tokens) (Dr. GRPO)."""
    reward: RewardSection = RewardSection()
    """How rollouts are graded."""
    epsilon: Fraction = 0.2
    """grpo, sampled_token: lower clip of the probability ratio."""
    epsilon_high: Positive | None = None
    """grpo, sampled_token: upper clip of the ratio; none: epsilon (DAPO: 0.28)."""
    kl: NonNegative = 0.0
    """grpo: weight of the KL to the reference, teacher.policy's weights."""
    credit: float = Field(0.0, ge=0, le=1)
    """grpo: how far the teacher redistributes a rollout's advantage over its tokens (RLSD's λ)."""
    credit_clip: Fraction = 0.2
    """grpo: that multiplies a token's advantage by 1 ± this at most (RLSD's ε_w)."""
    credit_steps: Count | None = None
    """grpo: steps over which credit falls to 0; none: it stays."""
    distil: NonNegative = 0.0
    """grpo: weight of opsd's divergence beside the policy gradient (SDPG)."""
    distil_groups: Literal["all", "all_wrong"] = "all"
    """grpo: which groups distil. all_wrong: those without a right rollout, which then only distil
    (I-SDPO)."""
    sft_alpha: NonNegative = 0.0
    """opsd, distill, grpo: add this times sft's loss on the step's rows (prompts.target)."""
    router_aux: NonNegative = 0.0
    """Mixtures of experts: add this times the loss that evens the experts out (TRL's
    router_aux_loss_coef), over each micro-batch's tokens in the student's role."""
    scale_advantages: bool = True
    """grpo: divide advantages by the group's standard deviation."""
    roles: list[Literal["student", "teacher"]] = Field(["student"], min_length=1)
    """sft: the contexts in which the target is learnt. Both: the quickstart's cold start."""
    backend: Literal["auto", "torch", "cpp", "triton", "cuda"] = "auto"
    """The kernel's backend."""
    memory_budget: int | None = Field(None, ge=1 << 20)
    """Bytes of logits the kernel may hold; none: its own choice."""

    def without_code(self) -> "LossSection":
        """A copy without the user's own gates, which are Python files to run."""
        ours = [gate for gate in self.gates if gate.gate in GATES]
        return self.model_copy(update={"gates": ours})
