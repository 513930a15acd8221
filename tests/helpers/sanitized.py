"""Run by test_sanitizers.py with sanitizers: every function of the C++ library, on tensors that end
at the end of their memory.

python sanitized.py LIBRARY [overrun]
"""

import itertools
import sys
from pathlib import Path

import torch

from opsd_kernels import (
    Clip,
    Divergence,
    LogitTransform,
    attention,
    linear_divergence,
    linear_log_prob,
    packed,
)
from opsd_kernels.divergence import DIVERGENCES, Rule
from opsd_kernels.tiles import cpp
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits

# Near the lengths of vectors (4, 8, 16) and blocks (512).
WIDTHS = (1, 3, 4, 5, 8, 9, 15, 16, 17, 33, 511, 512, 513, 1043)
CLIPS = (None, Clip("entry", 0.02), Clip("token", 0.3))
TRANSFORMS = (LogitTransform(), LogitTransform(0.8, -1.1, 5.0))
# Nothing special; padding; values that logits should not have.
SPECIAL = (None, -torch.inf, torch.inf, torch.nan, 3e38, 1e-42)


def tile(n: int, v: int, special: float | None) -> tuple:
    """Products of both roles and a bias. The second role's rows are longer in memory than in the
    tile.
    """
    student, teacher = (
        torch.randn(n, v),
        torch.randn(n * v + 3 * (n - 1)).as_strided((n, v), (v + 3, 1)),
    )
    bias = torch.randn(v)
    if special is not None:
        student[:, -1], teacher[0, 0], bias[v // 2] = special, special, special
    return student, teacher, bias


def divergences(n: int, v: int, special: float | None) -> None:
    for name, clip, transform in itertools.product(DIVERGENCES, CLIPS, TRANSFORMS):
        rule, row_weight = Rule(Divergence(name, 0.3), transform, clip), torch.rand(n)
        for weight, biases in ((row_weight, 2), (None, 1), (row_weight, 0)):
            student, teacher, bias = tile(n, v, special)
            roles = (
                Logits(student, bias if biases > 0 else None),
                Logits(teacher, bias.clone() if biases > 1 else None),
            )
            cpp.rows(*roles, rule, states.new(n, student, student.dtype), weight)
            state = states.new(n, student, student.dtype)
            cpp.normalisers(*roles, rule, state)
            if weight is not None and rule.entry_clip is None:
                parts = [Logits(x.product.clone(), x.bias) for x in roles]
                cpp.gradient_(*parts, rule, state.clone(), weight, False)
            cpp.sums(*roles, rule, state)
            if weight is not None or rule.entry_clip is not None:
                cpp.gradient_(*roles, rule, state, weight)


def log_probs(n: int, v: int, special: float | None) -> None:
    for transform, biased in itertools.product(TRANSFORMS, (True, False)):
        product, _, bias = tile(n, v, special)
        bias = bias if biased else None
        # Targets in this tile, in others, and in none.
        for targets in ((0,), (v - 1,), (v // 2, v, -1), (-100, 2**62, -(2**62))):
            chosen = torch.tensor(targets).repeat(n)[:n]
            state = states.new_log_prob(n, product, product.dtype)
            cpp.log_prob_normalisers(Logits(product, bias), chosen, transform, state)
            changed = Logits(product.clone(), bias)
            cpp.log_prob_gradient_(changed, chosen, transform, state, torch.rand(n))


def decoded_attention() -> None:
    """Of groups of 1 to 5 rows, of which 4 run at once, over one block of tokens and more."""
    for rows, tokens, width, value_width, dtype, special in itertools.product(
        (1, 2, 3, 5),
        (1, 17, 129),
        (16, 80),
        (48, 512),
        (torch.float32, torch.bfloat16),
        SPECIAL[::3],
    ):
        query, key, value = (
            torch.randn(2, 2, n, w).to(dtype)
            for n, w in ((rows, width), (tokens, width), (tokens, value_width))
        )
        key[0, 0, 0, 0] = value[1, 1, -1, -1] = special or 0
        mask = (torch.rand(2, 1, 1, tokens) < 0.7) if special is None else None
        with torch.no_grad():
            attention.attention(query, key, value, mask)


def packed_products() -> None:
    """Of one panel of outputs and more, and all numbers of rows that run at once."""
    for rows, outputs, inputs, dtype in itertools.product(
        (1, 7, 8, 33), (1, 16, 47, 48, 99), (2, 34), (torch.float32, torch.bfloat16)
    ):
        layer = torch.nn.Linear(inputs, outputs, bias=rows > 1, dtype=dtype)
        with torch.no_grad(), packed.packed_weights([layer] * packed.packable(layer)):
            layer(torch.randn(rows, inputs, dtype=dtype))


def calls() -> None:
    """Call the public functions in each dtype, in one pass and in tiles."""
    for dtype, budget in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (None, 40_000)
    ):
        student, teacher, weight, bias = (
            torch.randn(*shape, dtype=dtype, requires_grad=True)
            for shape in ((7, 9), (7, 9), (301, 9), (301,))
        )
        given = {"bias": bias, "memory_budget": budget, "backend": "cpp"}
        for name, clip in itertools.product(DIVERGENCES, CLIPS):
            result = linear_divergence(
                student, teacher, weight, divergence=name, clip=clip, **given
            )
            result.loss.backward()
        targets = torch.randint(301, (7,))
        linear_log_prob(student, weight, targets, **given).log_prob.sum().backward()


def overrun() -> None:
    """Use a bias that is one entry too short, which the sanitizer must detect."""
    student, teacher, bias = tile(2, 17, None)
    state = states.new(2, student, student.dtype)
    cpp.normalisers(Logits(student, bias[:16].clone()), Logits(teacher, bias), Rule(), state)


def main() -> None:
    cpp.LIBRARY = Path(sys.argv[1])
    cpp._library.cache_clear()
    torch.manual_seed(0)
    if sys.argv[2:] == ["overrun"]:
        overrun()
        return
    assert not cpp._library().opsd_use_instruction_set(b"none")
    for name in ("baseline", "avx2", "avx512"):
        if not cpp._library().opsd_use_instruction_set(name.encode()):
            continue
        for n, v in itertools.product((1, 3), WIDTHS):
            divergences(n, v, None)
            log_probs(n, v, None)
        for special in SPECIAL[1:]:
            divergences(2, 21, special)
            log_probs(2, 21, special)
        assert attention._kernel() is not None
        decoded_attention()
        packed_products()
        torch.set_num_threads(2)
        decoded_attention()
        packed_products()
        divergences(5, 40, None)
        log_probs(5, 40, None)
        torch.set_num_threads(1)
        calls()
        print(cpp.instruction_set())


if __name__ == "__main__":
    main()
