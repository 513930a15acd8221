"""Any call, against the dense reference in fp64: shapes, layouts in memory, dtypes and options that
hypothesis makes up. CONTRIBUTING.md says how to let it make up 10 000.
"""

import re

import pytest
import torch
from helpers.kernel_cases import DIVERGENCES, LIMITS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opsd_kernels import (
    Clip,
    Divergence,
    LogitTransform,
    linear_divergence,
    linear_log_prob,
    reference,
)

BACKENDS = {
    "torch": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cpp": (torch.float32, torch.bfloat16, torch.float16),
}
LAYOUTS = ("contiguous", "transposed", "every other column", "padded rows")
TRANSFORMS = st.builds(
    LogitTransform,
    temperature=st.floats(0.3, 4.0),
    scale=st.sampled_from([1.0, -0.5, 2.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same matrix, elsewhere in memory; NaN between its entries."""
    rows, columns = x.shape
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "every other column":
        return x.new_full((rows, 2 * columns), torch.nan)[:, ::2].copy_(x)
    if layout == "padded rows":
        return x.new_full((rows, columns + 3), torch.nan)[:, 1 : columns + 1].copy_(x)
    return x.clone()


class Problem:
    """The tensors of a call, drawn; sizes are hypothesis's, numbers come from a seed."""

    def __init__(self, draw: st.DrawFn) -> None:
        torch.manual_seed(draw(st.integers(0, 2**31)))
        self.draw = draw
        self.backend = draw(st.sampled_from(sorted(BACKENDS)))
        self.dtype = draw(st.sampled_from(BACKENDS[self.backend]))
        self.n, self.v, self.d = (draw(st.integers(*span)) for span in ((0, 24), (1, 300), (1, 20)))
        self.transform = draw(TRANSFORMS)
        self.reduction = draw(st.sampled_from(["mean", "sum", "none"]))
        self.frozen = draw(st.booleans())  # the head
        self.student = self.matrix(torch.randn(self.n, self.d)).requires_grad_()
        self.weight = self.head(self.d).requires_grad_(not self.frozen)
        self.bias = self.vector(torch.randn(self.v)) if draw(st.booleans()) else None
        if self.bias is not None:
            self.bias.requires_grad_(not self.frozen)
        self.token_weight = None
        if draw(st.booleans()):  # some of weight 0, perhaps all of them
            kept = torch.rand(self.n) < draw(st.sampled_from([0.0, 0.5, 1.0]))
            self.token_weight = self.vector(torch.rand(self.n) * kept)

    def matrix(self, x: Tensor) -> Tensor:
        return laid_out(x.to(self.dtype), self.draw(st.sampled_from(LAYOUTS)))

    def head(self, width: int) -> Tensor:
        return self.matrix(torch.randn(self.v, width) * (2.0 / width**0.5))

    def vector(self, x: Tensor) -> Tensor:
        return self.matrix(x[None])[0].detach()

    def options(self) -> dict:
        """Of both functions."""
        return {
            "bias": self.bias,
            "temperature": self.transform.temperature,
            "logit_scale": self.transform.scale,
            "logit_softcap": self.transform.softcap,
            "token_weight": self.token_weight,
            "reduction": self.reduction,
            "backend": self.backend,
        }

    def budget(self, call) -> int | None:
        """None, or from the least that the function says it works with."""
        if self.draw(st.booleans()):
            return None
        with pytest.raises(ValueError, match="memory_budget: got 1 bytes") as error:
            call(memory_budget=1)
        least = int(re.search(r"at least (\d+)", str(error.value))[1])
        return least + self.draw(st.sampled_from([0, 1000, 20_000, 200_000]))

    def trained(self) -> list[Tensor]:
        tensors = (self.student,) if self.frozen else (self.student, self.weight, self.bias)
        return [x for x in tensors if x is not None]

    def weights(self) -> Tensor:
        """[n] of the loss's terms."""
        w = torch.ones(self.n) if self.token_weight is None else self.token_weight
        w = w.double()
        return w / w.sum() if self.reduction == "mean" and w.sum() else w

    def check(self, loss: Tensor, truth: Tensor, logits: Tensor) -> None:
        """Value and gradients under a random upstream gradient. `logits`: all there are, exact."""
        upstream = torch.randn(truth.shape, dtype=torch.float64)
        got = torch.autograd.grad(loss, self.trained(), upstream.to(loss.dtype))
        want = torch.autograd.grad(truth, self.trained_exact, upstream)
        value, gradient = LIMITS[self.dtype]
        unit = rounding(logits, loss.dtype) * self.weights().norm()
        slope = abs(self.transform.scale) / self.transform.temperature * upstream.norm()
        others = [self.weight, self.student, torch.ones(())]
        pairs = [(loss, truth, value, unit)]
        pairs += [
            (x, y, gradient, unit * slope * other.detach().double().norm())
            for x, y, other in zip(got, want, others, strict=False)
        ]
        for x, y, limit, noise in pairs:
            assert x.shape == y.shape and x.dtype in (loss.dtype, self.dtype)
            limits = torch.finfo(x.dtype)
            underflow = limits.tiny * limits.eps * x.numel() ** 0.5
            error = (x.detach().double() - y).norm()
            assert error <= limit * y.norm() + noise + underflow, (error, y.norm(), noise)

    def exact(self) -> dict[str, Tensor | None]:
        """student, weight, bias and token_weight in fp64, the trained ones to be trained."""
        names = ("student", "weight", "bias", "token_weight")
        given = {name: getattr(self, name) for name in names}
        found = {
            name: None if x is None else x.detach().double().requires_grad_(x.requires_grad)
            for name, x in given.items()
        }
        self.trained_exact = [x for x in found.values() if x is not None and x.requires_grad]
        return found


def rounding(logits: Tensor, dtype: torch.dtype) -> float:
    """What rounding the logits alone makes of probabilities near 1 and log-ratios as large as the
    logits: where roles are nearly equal it is all there is.
    """
    size = 1.0 + float(logits.detach().abs().max() if logits.numel() else 0.0)
    return 4 * torch.finfo(dtype).eps * size**2


def threshold_in_a_gap(terms: Tensor, share: float, noise: float) -> float:
    """About the quantile `share` of the terms, and further from all than `noise`: the entry clip's
    gradient jumps there. Above all terms where no gap is as wide.
    """
    values = terms.detach()[terms.detach() > noise].sort().values
    start = int(share * (len(values) - 1))
    near = values[max(0, start - 30) : start + 31]
    if len(near) < 2 or near.diff().max() < 2 * noise:
        return 2 * float(values[-1]) if len(values) else 1.0
    k = int(near.diff().argmax())
    return float(near[k : k + 2].mean())


@given(st.data())
def test_any_divergence(data):
    p = Problem(data.draw)
    divergence = Divergence(
        data.draw(st.sampled_from(DIVERGENCES)), data.draw(st.floats(0.05, 0.95))
    )
    separate, own_bias = data.draw(st.booleans()), data.draw(st.booleans())
    width = data.draw(st.integers(1, 20)) if separate else p.d
    if separate:
        teacher = p.matrix(torch.randn(p.n, width))
    else:  # near the student, or equal to it
        distance = data.draw(st.sampled_from([0.0, 1e-3, 0.5]))
        teacher = p.matrix(p.student.detach() + distance * torch.randn(p.n, p.d, dtype=p.dtype))
    teacher_weight = p.head(width) if separate else None
    teacher_bias = p.vector(torch.randn(p.v)) if own_bias else None

    exact = p.exact()
    wide = [None if x is None else x.double() for x in (teacher, teacher_weight, teacher_bias)]
    teacher_head = exact["weight"].detach() if wide[1] is None else wide[1]
    shared_bias = exact["bias"] if teacher_weight is None else None
    z = reference.logits(exact["student"], exact["weight"], exact["bias"], p.transform)
    z_t = reference.logits(
        wide[0], teacher_head, shared_bias if wide[2] is None else wide[2], p.transform
    )
    terms = reference.entries(z.log_softmax(-1), z_t.log_softmax(-1), divergence)
    kind, share = data.draw(st.sampled_from([None, "entry", "token"])), data.draw(st.floats(0, 1))
    clip = None
    if kind == "entry":
        noise = rounding(torch.cat((z, z_t)), torch.float32)
        clip = Clip(kind, threshold_in_a_gap(terms, share, noise))
    elif kind == "token":
        clip = Clip(kind, 0.01 + share)

    def call(**more):
        return linear_divergence(
            *(p.student, teacher, p.weight, teacher_weight),
            teacher_bias=teacher_bias,
            divergence=divergence.name,
            beta=divergence.beta,
            clip=clip,
            **p.options(),
            **more,
        )

    result = call(memory_budget=p.budget(call))
    truth = reference.linear_divergence(
        *(exact["student"], wide[0], exact["weight"], wide[1]),
        bias=exact["bias"],
        teacher_bias=wide[2],
        divergence=divergence,
        transform=p.transform,
        token_weight=exact["token_weight"],
        clip=clip,
        reduction=p.reduction,
    )
    p.check(result.loss, truth, torch.cat((z, z_t)))


@given(st.data())
def test_any_log_prob(data):
    p = Problem(data.draw)
    targets = torch.randint(p.v, (p.n,))
    exact = p.exact()
    z = reference.logits(exact["student"], exact["weight"], exact["bias"], p.transform)
    log_prob, entropy = reference.linear_log_prob(
        exact["student"], exact["weight"], targets, bias=exact["bias"], transform=p.transform
    )
    given = targets
    if p.token_weight is not None:  # where a token does not count, anything
        given = targets.masked_fill(p.token_weight == 0, -100)

    def call(**more):
        return linear_log_prob(p.student, p.weight, given, **p.options(), **more)

    result = call(memory_budget=p.budget(call))
    truth = p.weights() * log_prob
    p.check(result.log_prob, truth if p.reduction == "none" else truth.sum(), z)
    counts = p.weights() != 0
    error = (result.entropy.double() - entropy * counts).abs()
    assert (error <= LIMITS[result.entropy.dtype][0] * (1.0 + entropy)).all()
