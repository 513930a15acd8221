"""The candidates: our functions, their peers, and the bare matrix products that no exact algorithm
can avoid.

A candidate is a function that runs forward and backward of a problem once and returns its `Result`.
Peers name the divergences by numbers: 0 is forward KL, 1 reverse KL, and a number between them the
teacher's share of the mixture.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from opsd_kernels import backends, linear_divergence, linear_log_prob

from .problem import Case, Problem, Result

Run = Callable[[Problem], Result]
MOST_LOGITS = 2**29  # for the bare products: 2 GiB in fp32
NUMBERED = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def ours(backend: str = "auto", budget: int | None = None, reduction: str = "mean") -> Run:
    """opsd_kernels with one backend and memory budget; it computes the mean, or with "none" we
    do.
    """

    def run(problem: Problem) -> Result:
        student, weight = problem.fresh()
        options: dict[str, Any] = {"backend": backend, "memory_budget": budget}
        options["reduction"] = reduction
        if problem.case.task == "log_prob":
            loss = -linear_log_prob(student, weight, problem.targets, **options).log_prob
        else:
            options["divergence"] = problem.case.task
            loss = linear_divergence(student, problem.teacher, weight, **options).loss
        return _backward(loss.mean(), student, weight)

    return run


def sampled(problem: Problem) -> Result:
    """A divergence, with a loss of the targets' log-probabilities in the same sweep (GRPO's, with
    `loss.distil`). That loss is 0, so that the result stays the divergence's.
    """
    student, weight = problem.fresh()
    each = torch.full_like(problem.targets, 1 / len(student), dtype=torch.float32)
    loss = linear_divergence(
        student,
        problem.teacher,
        weight,
        divergence=problem.case.task,
        token_weight=each,
        targets=problem.targets,
        token_loss=lambda log_prob, rows: 0 * log_prob,
        reduction="sum",
    ).loss
    return _backward(loss, student, weight)


def mixture(problem: Problem) -> Result:
    """A mixture of two teachers that share the head, as `teacher.mix` makes it: a coefficient for
    each token. Both are the problem's teacher, so that the result stays the divergence's.
    """
    share = torch.rand(len(problem.teacher), 1, device=problem.teacher.device)
    state = problem.teacher.float()
    both = (share * state + (1 - share) * state).to(problem.teacher.dtype)
    return ours()(replace(problem, teacher=both))


# --- Peers that need only torch ---


def dense(problem: Problem) -> Result:
    """The direct implementation: all logits in memory, in the operands' dtype; statistics in
    fp32.
    """
    student, weight = problem.fresh()
    loss = _dense_loss(student, problem.teacher, weight, problem.targets, problem.case.task)
    return _backward(loss, student, weight)


def compiled(problem: Problem) -> Result:
    """`dense` with torch.compile."""
    student, weight = problem.fresh()
    function = torch.compile(_dense_loss, fullgraph=True)
    loss = function(student, problem.teacher, weight, problem.targets, problem.case.task)
    return _backward(loss, student, weight)


def torch_chunked(problem: Problem) -> Result:
    """torch's linear_cross_entropy, in chunks by its default strategy."""
    student, weight = problem.fresh()
    chunks = torch.nn.LinearCrossEntropyOptions()
    loss = torch.nn.functional.linear_cross_entropy(
        student, weight, problem.targets, options=chunks
    )
    return _backward(loss, student, weight)


def _dense_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, targets: Tensor, task: str
) -> Tensor:
    log_s = (student @ weight.T).float().log_softmax(-1)
    if task == "log_prob":
        return -log_s.gather(-1, targets[:, None]).mean()
    with torch.no_grad():
        log_t = (teacher @ weight.T).float().log_softmax(-1)

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    if task == "forward_kl":
        return kl(log_t, log_s)
    if task == "reverse_kl":
        return kl(log_s, log_t)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0))
    return 0.5 * (kl(log_t, log_m) + kl(log_s, log_m))


def gemms(problem: Problem, parts: bool = True) -> None:
    """Only the matrix products that an exact algorithm cannot avoid: other time is overhead. Logits
    are in fp32 (on the CPU, where torch has no such product, in the operands' dtype). If they would
    take more than 2 GiB, the tokens are computed in parts, unless parts=False.
    """
    weight, trainable = problem.weight, not problem.case.frozen
    n, (v, _) = problem.case.tokens, weight.shape
    rows = rows_of_a_part(problem.case) if parts else n
    wide: dict[str, Any] = {"out_dtype": torch.float32} if _mixed(weight) else {}
    dtype = torch.float32 if wide else weight.dtype
    logits = weight.new_empty((rows, v), dtype=dtype)
    gradient = weight.new_zeros((rows, v)) if wide else logits
    roles = (
        (problem.student,)
        if problem.case.task == "log_prob"
        else (
            problem.student,
            problem.teacher,
        )
    )
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        size = part.stop - part.start
        for hidden in roles:
            torch.mm(hidden[part], weight.T, out=logits[:size], **wide)
        torch.mm(gradient[:size], weight, **wide)
        if trainable:
            torch.mm(gradient[:size].T, problem.student[part], **wide)


def rows_of_a_part(case: Case) -> int:
    return max(1, min(case.tokens, MOST_LOGITS // case.vocabulary))


def _mixed(weight: Tensor) -> bool:
    return weight.device.type == "cuda" and weight.dtype != torch.float32


# --- Other projects' ---


def trl(problem: Problem) -> Result:
    """TRL's chunked divergence and chunked log-probability."""
    student, weight = problem.fresh()
    if problem.case.task == "log_prob":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        chunk = 32768  # of the vocabulary, as in its divergence
        log_prob, *_ = ChunkedLogProbFunction.apply(
            student, weight, None, problem.targets, 1.0, chunk, None, 1.0, ()
        )
        return _backward(-log_prob.mean(), student, weight)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = NUMBERED[problem.case.task]
    per_token, _ = ChunkedDivergenceFunction.apply(
        student, weight, None, problem.teacher, weight.detach(), None, beta
    )
    return _backward(per_token.mean(), student, weight)


def liger(kernels: str) -> Run:
    """Liger's fused_linear_jsd, with the JSD of Triton or CuTe ("nvidia-triton",
    "nvidia-cutedsl").
    """

    def run(problem: Problem) -> Result:
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

        student, weight = problem.fresh()
        operands = student, weight, problem.teacher, weight.detach()
        # No labels; their ignored index; temperature; the dtype that dW is summed in.
        options = None, NUMBERED[problem.case.task], -100, 1.0, None
        loss = LigerFusedLinearJSDFunction.apply(*operands, *options, kernels)
        return _backward(loss, student, weight)

    return run


def quack(problem: Problem) -> Result:
    """QuACK's linear cross-entropy, in CuTe: logits in the operands' dtype, 4096 tokens a chunk."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    student, weight = problem.fresh()
    return _backward(
        chunked_linear_cross_entropy(student, weight, problem.targets), student, weight
    )


def liger_chunked(problem: Problem) -> Result:
    """Liger's LigerFusedLinearJSDLoss: torch operations on chunks of tokens, compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    student, weight = problem.fresh()
    beta = NUMBERED[problem.case.task]
    function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    loss = function(student, weight, problem.teacher, weight.detach(), problem.targets)
    return _backward(loss, student, weight)


def cce(**options) -> Run:
    """Apple's cut cross-entropy."""

    def run(problem: Problem) -> Result:
        from cut_cross_entropy import linear_cross_entropy

        student, weight = problem.fresh()
        loss = linear_cross_entropy(student, weight, problem.targets, **options)
        return _backward(loss, student, weight)

    return run


def _backward(loss: Tensor, student: Tensor, weight: Tensor) -> Result:
    loss.backward()
    assert student.grad is not None
    return Result(loss.detach(), student.grad, weight.grad)


# --- Which can run here ---

# The candidates that compile in their first call.
COMPILES = {"cpu": {"compiled", "liger chunked", "cce"}, "cuda": {"compiled", "liger chunked"}}


def candidates(task: str, device: str) -> tuple[dict[str, Run], dict[str, str]]:
    """(the candidates that can run `task` on `device`, the reasons of the others). Ours comes
    first.
    """
    found: dict[str, Run] = {"ours": ours(), "dense": dense, "compiled": compiled}
    missing: dict[str, str] = {}
    log_prob, gpu = task == "log_prob", device == "cuda"

    def offer(name: str, run: Run, module: str, unusable: str | None = None) -> None:
        reason = unusable or _not_importable(module)
        if reason is None:
            found[name] = run
        else:
            missing[name] = reason

    triton, cute = (
        None if gpu else f"its kernels are {whose}: needs a CUDA device"
        for whose in ("Triton's", "CuTe's")
    )
    kernel = "logprob" if log_prob else "divergence"
    offer("trl", trl, f"trl.kernels.chunked_{kernel}")
    if log_prob:
        found["ours, per token"] = ours(reduction="none")
        core = hasattr(torch.nn, "LinearCrossEntropyOptions")
        lacks = None if core else "torch has had linear_cross_entropy since 2.13"
        offer("torch chunked", torch_chunked, "torch", lacks)
        module = "cut_cross_entropy"
        offer("cce", cce(impl="cce") if gpu else cce(impl="torch_compile"), module)
        offer("cce exact", cce(impl="cce", filter_eps=None), module, triton)
        offer("quack", quack, "quack.linear_cross_entropy", cute)
    else:
        jsd = "liger_kernel.ops.fused_linear_jsd"
        offer("liger", liger("nvidia-triton"), jsd, triton)
        lacks = cute or _not_importable("cutlass.cute")
        offer("liger cute", liger("nvidia-cutedsl"), jsd, lacks)
        offer("liger chunked", liger_chunked, "liger_kernel.chunked_loss")
    return found, missing


def our_backends(device: str) -> tuple[dict[str, Run], dict[str, str]]:
    """The same for each of our backends."""
    found, missing = {}, {}
    for name, reason in backends().items():
        if reason is None and (name == "cpp") == (device == "cuda") and name != "torch":
            reason = f"serves {'the CPU' if name == 'cpp' else 'CUDA devices'} only"
        if reason is None:
            found[f"ours, {name}"] = ours(name)
        else:
            missing[f"ours, {name}"] = reason
    return found, missing


def our_others(task: str) -> dict[str, Run]:
    """What else a divergence's call may have to do."""
    return {} if task == "log_prob" else {"ours, sampled": sampled, "ours, mixture": mixture}


def our_budgets(mebibytes: tuple[int, ...]) -> dict[str, Run]:
    """Ours with each of these memory budgets."""
    return {f"ours, {m} MiB": ours(budget=m * 2**20) for m in mebibytes}


def _not_importable(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer's import may fail in any way
        return f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None
