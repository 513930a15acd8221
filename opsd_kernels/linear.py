"""Computes the divergence of two roles' next-token distributions from hidden states, without any
[N, V] tensor.

This module has the operator and the public function; the algorithm is in `divergence_loop.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, float16

from opsd_kernels import arguments, gemm
from opsd_kernels.divergence import Clip, Divergence, LogitTransform, Rule
from opsd_kernels.divergence_loop import (
    CLIPPED,
    DIVERGENCE,
    INVERTED,
    LOSS,
    STATISTICS,
    STUDENT_ENTROPY,
    STUDENT_LOG_PROB,
    TEACHER_ENTROPY,
    TEACHER_LOG_PROB,
    TOKEN_LOSS,
    TokenLoss,
    divergence_blocks,
)
from opsd_kernels.operator import FusedOperator, wanted
from opsd_kernels.resolve import resolve
from opsd_kernels.sharded import Placement, Shards, place
from opsd_kernels.sweep import Head, Want


class Options(NamedTuple):
    """The operator's arguments beside tensors, in types that its schema allows."""

    drop_zeros: bool
    want_hidden: bool
    want_weight: bool
    want_bias: bool
    divergence: str
    beta: float
    temperature: float
    logit_scale: float
    logit_softcap: float | None
    teacher_temperature: float
    teacher_logit_scale: float
    teacher_logit_softcap: float | None
    clip: str | None
    clip_threshold: float
    memory_budget: int | None
    backend: str
    group: str | None

    @property
    def rule(self) -> Rule:
        """The rule that these fields describe."""
        return Rule(
            Divergence(self.divergence, self.beta),
            LogitTransform(self.temperature, self.logit_scale, self.logit_softcap),
            None if self.clip is None else Clip(self.clip, self.clip_threshold),
            LogitTransform(
                self.teacher_temperature, self.teacher_logit_scale, self.teacher_logit_softcap
            ),
        )


def _fields_of(rule: Rule) -> dict[str, Any]:
    """The fields of `Options` that describe the rule."""
    fields: dict[str, Any] = {
        "divergence": rule.divergence.name,
        "beta": float(rule.divergence.beta),
        "clip": None if rule.clip is None else rule.clip.kind,
        "clip_threshold": 1.0 if rule.clip is None else float(rule.clip.threshold),
    }
    for role, transform in (("", rule.transform), ("teacher_", rule.of_teacher)):
        softcap = transform.softcap
        fields[f"{role}temperature"] = float(transform.temperature)
        fields[f"{role}logit_scale"] = float(transform.scale)
        fields[f"{role}logit_softcap"] = None if softcap is None else float(softcap)
    return fields


def _run(
    tensors: Sequence[Any],
    row_weight: Tensor,
    options: Options,
    gradients: bool,
    token_loss: TokenLoss | None = None,
) -> tuple[Tensor | None, ...]:
    student, teacher, weight, teacher_weight, bias, teacher_bias, targets = tensors
    dtype = gemm.tile_dtype(student.dtype)
    bias, teacher_bias = (
        None if b is None else b.to(dtype).contiguous() for b in (bias, teacher_bias)
    )
    stats, d_hidden, d_weight, d_bias = divergence_blocks(
        student,
        teacher,
        (
            Head(weight, bias),
            Head(weight if teacher_weight is None else teacher_weight, teacher_bias),
        ),
        row_weight,
        rule=options.rule,
        want=wanted(options) if gradients else Want(False, False, False),
        budget=options.memory_budget,
        backend=options.backend,
        shards=None
        if options.group is None
        else Shards.agree(options.group, weight.shape[0], student.shape[0], student.device),
        targets=targets,
        token_loss=token_loss,
    )
    return row_weight * stats[LOSS] + stats[TOKEN_LOSS], stats, d_hidden, d_weight, d_bias


_operator = FusedOperator(
    "linear_divergence",
    _run,
    tensors=(
        "student",
        "teacher",
        "weight",
        "teacher_weight?",
        "bias?",
        "teacher_bias?",
        "targets?",
    ),
    by_token=("student", "teacher", "targets"),
    trainable=("student", "weight", "bias"),
    options=Options,
    statistics=STATISTICS,
)


@dataclass(frozen=True)
class LinearDivergence:
    """The result of `linear_divergence`. Per-token tensors have the hidden states' leading shape
    and are fp32 (fp64 for fp64 inputs). All but the losses are detached, and 0 at tokens of weight
    0.

    loss: a scalar, or with reduction="none" w_n d_n for each token.
    token_loss: l_n; None without a `token_loss` function.
    per_token: the divergence in nats, neither weighted nor clipped.
    student_entropy, teacher_entropy: in nats.
    log_prob, teacher_log_prob: of each token's target by the student and by the teacher; None
        without `targets`.
    clipped_fraction: a scalar, the clipped share of tokens for Clip("token", ...), of vocabulary
        entries for Clip("entry", ...), 0 without a clip. Tokens of weight 0 do not count, here
        and below.
    inverted_gradient_fraction: a scalar, the share of tokens whose clipped gradient points away
        from the unclipped one.
    """

    loss: Tensor
    per_token: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    clipped_fraction: Tensor
    inverted_gradient_fraction: Tensor
    log_prob: Tensor | None = None
    teacher_log_prob: Tensor | None = None
    token_loss: Tensor | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> None:
            hint = f"; the loss is a tensor: .loss.{name}" if hasattr(Tensor, name) else ""
            raise AttributeError(f"LinearDivergence has no attribute {name!r}{hint}")


def linear_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    token_weight: Tensor | None = None,
    clip: Clip | None = None,
    reduction: str = "mean",
    memory_budget: int | None = None,
    backend: str = "auto",
    gradient: str = "exact",
    process_group: object = None,
    teacher_transform: LogitTransform | None = None,
    targets: Tensor | None = None,
    token_loss: TokenLoss | None = None,
) -> LinearDivergence:
    """Divergence of the teacher's from the student's distribution, without the logits ever in
    memory at once.

    student_hidden [..., D], teacher_hidden [..., D_t] of the same leading shape; weight [V, D],
    bias [V]; teacher_weight [V, D_t], teacher_bias [V]. Without `teacher_weight`, `weight` serves
    both roles, and so does `bias` unless `teacher_bias` is given. All in one dtype (fp32, bf16,
    fp16; fp64 by the torch backend) on one device. Logits are accumulated and kept in fp32.

    divergence, beta: forward_kl | reverse_kl | jsd (with `beta`), see `opsd_kernels.Divergence`.
    temperature, logit_scale, logit_softcap: logits are softcap(logit_scale * (h W^T + bias)) /
        temperature. Those of both roles, or with a `teacher_transform` the student's only.
    teacher_transform: temperature, scale and soft cap of the teacher's logits, where they differ.
    token_weight [...]: a constant weight w_n for each token; those of weight 0 cost nothing, and
        NaN in their hidden states does not spread.
    clip: see `opsd_kernels.Clip`.
    reduction: mean = sum w d / sum w, sum = sum w d, none = w d for each token. All weights 0, or
        no tokens: loss 0 and zero gradients.
    memory_budget: bytes of scratch memory, beside the gradients (default: 256 MiB, on a GPU 1 GiB).
        A small one costs time: see `opsd_kernels/plan.py`. The gradient of a head trained in 16
        bits is summed in fp32, in 4 V D more bytes during the call, unless the gradients of all
        tokens' logits fit the budget. On a GPU the default is increased to that size (and to at
        least 4 V D) if this takes no more memory than the sum.
    backend: auto | torch | cpp | triton | cuda, see `opsd_kernels.backends()`.
    gradient: "exact", the only one: docs/kernel.md says why.
    targets [...]: integers in [0, V), such as sampled tokens. The same sweep returns their
        log-probabilities by both roles, detached, for D multiply-adds a token.
    token_loss: a function that adds sum l_n to the loss, with l = token_loss(log_prob, rows), [n],
        for the student's log_prob of the targets of the tokens `rows` (indices in the flattened
        leading shape). So a policy gradient and the divergence need one sweep of the head. It is
        called for a block of tokens at a time and differentiated by torch; each l_n may depend
        only on its own log_prob. For reduction="sum", and not for fp16; tokens of weight 0 have no
        l_n either. Not in torch.compile's graph.
    process_group: the vocabulary is split over its ranks. Each passes its own rows of the heads and
        biases, in order of rank, and the same hidden states and token weights; loss and dh are then
        the same on every rank. DTensor heads sharded over the vocabulary need no group. Without
        one, as with FSDP2, every rank has its own hidden states and gets their loss, and the head's
        gradient is that of the mean over ranks. All ranks must make the call and run backward.

    Gradients reach student_hidden, weight and bias (in the student's role only), never the
    teacher's side. Raises ValueError, naming the argument, for arguments that do not fit. Source:
    On-Policy Self-Distillation, arXiv 2601.18734; docs/kernel.md describes the algorithm.

    >>> import torch
    >>> student, teacher = torch.zeros(3, 4, requires_grad=True), torch.ones(3, 4)
    >>> result = linear_divergence(student, teacher, torch.eye(5, 4))
    >>> result.per_token
    tensor([0.0509, 0.0509, 0.0509])
    >>> result.loss.backward()
    >>> student.grad[0]
    tensor([-0.0096, -0.0096, -0.0096, -0.0096])
    """
    _check_described(gradient, teacher_transform, clip)
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    rule = Rule(Divergence(divergence, beta), transform, clip, teacher_transform)
    arguments.check_reduction(reduction)
    arguments.check_budget(memory_budget)
    arguments.check_tensors(
        {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden, "weight": weight},
        teacher_weight=teacher_weight,
        bias=bias,
        teacher_bias=teacher_bias,
        token_weight=token_weight,
    )
    if teacher_weight is None and teacher_bias is None:
        teacher_bias = bias
    placed, (weight, teacher_weight, bias, teacher_bias) = place(
        process_group,
        weight,
        teacher_weight=teacher_weight,
        bias=bias,
        teacher_bias=teacher_bias,
    )
    student_hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias = (
        arguments.cast_for_autocast(
            student_hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias
        )
    )
    sharded = placed.group is not None
    _check_roles(
        student_hidden, teacher_hidden, Head(weight, bias), teacher_weight, teacher_bias, sharded
    )
    arguments.check_beta(rule.divergence, student_hidden.dtype)
    _check_targets(targets, student_hidden, None if sharded else len(weight))
    _check_token_loss(token_loss, targets, reduction, placed, student_hidden)

    leading = student_hidden.shape[:-1]
    n_tokens = leading.numel()
    row_weight = arguments.row_weights(token_weight, reduction, "student_hidden", student_hidden)
    placed = placed.with_tokens(n_tokens, student_hidden.device)
    loss, stats = _operator(
        (
            placed.gather(student_hidden.reshape(n_tokens, student_hidden.shape[-1])),
            placed.gather(teacher_hidden.detach().reshape(n_tokens, teacher_hidden.shape[-1])),
            weight,
            None if teacher_weight is None else teacher_weight.detach(),
            bias,
            None if teacher_bias is None else teacher_bias.detach(),
            None if targets is None else placed.gather(targets.reshape(-1).long()),
        ),
        placed.gather(row_weight),
        reduction == "none" or placed.own_tokens,
        Options(
            drop_zeros=token_weight is not None,
            want_hidden=arguments.wants_gradient(student_hidden),
            want_weight=arguments.wants_gradient(weight),
            want_bias=arguments.wants_gradient(bias),
            **_fields_of(rule),
            memory_budget=memory_budget,
            backend=resolve(backend, student_hidden.device, student_hidden.dtype),
            group=placed.name,
        ),
        token_loss,
    )
    if placed.own_tokens:
        loss, stats = placed.own(loss), stats[:, placed.rows]
        loss = loss if reduction == "none" else loss.sum()
    counted = (row_weight != 0).sum().clamp(min=1)
    looked_at = counted
    if clip is not None and clip.kind == "entry":
        looked_at = counted * placed.vocabulary(weight.shape[0], weight.device)
    return LinearDivergence(
        loss=loss.reshape(leading) if reduction == "none" else loss,
        per_token=stats[DIVERGENCE].reshape(leading),
        student_entropy=stats[STUDENT_ENTROPY].reshape(leading),
        teacher_entropy=stats[TEACHER_ENTROPY].reshape(leading),
        clipped_fraction=stats[CLIPPED].sum() / looked_at,
        inverted_gradient_fraction=stats[INVERTED].sum() / counted,
        log_prob=None if targets is None else stats[STUDENT_LOG_PROB].reshape(leading),
        teacher_log_prob=None if targets is None else stats[TEACHER_LOG_PROB].reshape(leading),
        token_loss=None if token_loss is None else stats[TOKEN_LOSS].reshape(leading),
    )


def _check_targets(targets: Tensor | None, student: Tensor, vocabulary: int | None) -> None:
    if targets is not None:
        arguments.check_rows("targets", targets, "student_hidden", student)
        arguments.check_targets(targets, targets.new_ones(()), vocabulary)


def _check_token_loss(
    token_loss: TokenLoss | None,
    targets: Tensor | None,
    reduction: str,
    placed: Placement,
    student: Tensor,
) -> None:
    if token_loss is None:
        return
    if targets is None:
        raise ValueError("token_loss: got a function of log-probabilities, but no targets")
    if reduction != "sum":
        raise ValueError(f"token_loss: got reduction={reduction!r} beside it, must be 'sum'")
    if student.dtype == float16:  # `gradient_unit` computes its scale from the token weights
        raise ValueError("token_loss: got float16 hidden states, must be bfloat16 or float32")
    if placed.own_tokens:
        raise ValueError(
            "token_loss: got a weight that is a DTensor of ranks with tokens of their own, must be "
            "a plain tensor or have a process_group"
        )


def _check_described(
    gradient: str, teacher_transform: LogitTransform | None, clip: Clip | None
) -> None:
    if gradient == "filtered":
        raise ValueError(
            "gradient: got 'filtered', must be 'exact': leaving out small entries gained less than "
            "it cost in exactness (docs/kernel.md)"
        )
    if gradient != "exact":
        raise ValueError(f"gradient: got {gradient!r}, must be 'exact'")
    if teacher_transform is not None and not isinstance(teacher_transform, LogitTransform):
        raise ValueError(
            f"teacher_transform: got {teacher_transform!r}, must be None or an "
            "opsd_kernels.LogitTransform"
        )
    if clip is not None and not isinstance(clip, Clip):
        raise ValueError(f"clip: got {clip!r}, must be None or an opsd_kernels.Clip")


def _check_roles(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Head,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    sharded: bool,
) -> None:
    """Raise ValueError if shapes, dtypes or devices of the two roles do not match."""
    arguments.check_hidden("student_hidden", student_hidden)
    arguments.check_hidden("teacher_hidden", teacher_hidden)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden: got {arguments.describe(teacher_hidden)}, must have the "
            f"leading shape {list(student_hidden.shape[:-1])} of student_hidden"
        )
    arguments.check_alike("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    weight, bias = head.weight, head.bias
    arguments.check_head("student_hidden", student_hidden, "weight", weight, "bias", bias, sharded)
    teacher_head = weight if teacher_weight is None else teacher_weight
    name = "weight" if teacher_weight is None else "teacher_weight"
    arguments.check_head(
        "teacher_hidden", teacher_hidden, name, teacher_head, "teacher_bias", teacher_bias, sharded
    )
    if teacher_head.shape[0] != weight.shape[0]:
        raise ValueError(
            f"teacher_weight: got {arguments.describe(teacher_head)}, must be "
            f"[{weight.shape[0]}, D_t]: one vocabulary"
        )
