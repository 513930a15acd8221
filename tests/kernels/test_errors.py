"""Every mistake a caller can make gets an error that names the argument."""

import pytest
import torch

from opsd_kernels import Clip, linear_divergence, linear_log_prob

S, T, W = torch.randn(3, 4), torch.randn(3, 4), torch.randn(7, 4)

MISTAKES = [
    (ValueError, r"student_hidden: got torch.int64", {"student_hidden": S.long()}),
    (ValueError, r"teacher_hidden: got .*\[2, 4\].*\[3\]", {"teacher_hidden": T[:2]}),
    (ValueError, r"teacher_hidden: got torch.float64.*float32", {"teacher_hidden": T.double()}),
    (
        ValueError,
        r"weight: got .*\[7, 4\] on cpu, must be \[V, 5\]",
        {"student_hidden": S.new_zeros(3, 5)},
    ),
    (ValueError, r"weight: got torch.bfloat16", {"weight": W.bfloat16()}),
    (ValueError, r"weight: got .*\[0, 4\]", {"weight": W[:0]}),
    (ValueError, r"weight: got .*meta", {"weight": W.to("meta")}),
    (ValueError, r"teacher_weight: got .*must be \[V, 4\]", {"teacher_weight": torch.randn(7, 6)}),
    (
        ValueError,
        r"teacher_weight: got .*must be \[7, D_t\]",
        {"teacher_weight": torch.randn(8, 4)},
    ),
    (ValueError, r"bias: got .*\[6\].*must be \[7\]", {"bias": torch.randn(6)}),
    (ValueError, r"teacher_bias: got .*\[6\].*must be \[7\]", {"teacher_bias": torch.randn(6)}),
    (ValueError, r"divergence: got 'kl'.*forward_kl, reverse_kl, jsd", {"divergence": "kl"}),
    (ValueError, r"beta: got 0.0.*between 0 and 1", {"divergence": "jsd", "beta": 0.0}),
    (ValueError, r"beta: got 1.0", {"divergence": "jsd", "beta": 1.0}),
    (ValueError, r"temperature: got 0.0", {"temperature": 0.0}),
    (ValueError, r"temperature: got nan", {"temperature": float("nan")}),
    (ValueError, r"logit_scale: got 0.0", {"logit_scale": 0.0}),
    (ValueError, r"logit_softcap: got -1", {"logit_softcap": -1.0}),
    (ValueError, r"temperature: got inf, must be a finite", {"temperature": float("inf")}),
    (ValueError, r"temperature: got '1', must be a finite number", {"temperature": "1"}),
    (ValueError, r"temperature: got tensor", {"temperature": torch.ones((), requires_grad=True)}),
    (ValueError, r"logit_softcap: got inf, must be a finite", {"logit_softcap": float("inf")}),
    (ValueError, r"beta: got None", {"beta": None}),
    (ValueError, r"student_hidden: got list, must be a tensor$", {"student_hidden": [[1.0]]}),
    (ValueError, r"weight: got NoneType, must be a tensor$", {"weight": None}),
    (ValueError, r"weight: got a tensor of layout torch.sparse", {"weight": W.to_sparse()}),
    (ValueError, r"bias: got list, must be a tensor, or None", {"bias": [0.0] * 7}),
    (ValueError, r"token_weight: got torch.complex64", {"token_weight": torch.ones(3) * 1j}),
    (ValueError, r"memory_budget: got 1000000000.0, must be a .* whole", {"memory_budget": 1e9}),
    (ValueError, r"memory_budget: got '64MB'", {"memory_budget": "64MB"}),
    (ValueError, r"token_weight: got .*\[2\]", {"token_weight": torch.ones(2)}),
    (ValueError, r"clip: got 0.05", {"clip": 0.05}),
    (ValueError, r"reduction: got 'batchmean'", {"reduction": "batchmean"}),
    (ValueError, r"memory_budget: got 0", {"memory_budget": 0}),
    (ValueError, r"memory_budget: got 40 bytes, must be at least \d+", {"memory_budget": 40}),
    (ValueError, r"backend: got 'gpu'.*auto, torch, cpp", {"backend": "gpu"}),
    (ValueError, r"gradient: got 'filtered'.*docs/filtered.md", {"gradient": "filtered"}),
    (ValueError, r"gradient: got 'fast'", {"gradient": "fast"}),
    (
        ValueError,
        r"process_group: got <object.*process group, or None",
        {"process_group": object()},
    ),
]


@pytest.mark.parametrize("error, message, wrong", MISTAKES, ids=[m[1] for m in MISTAKES])
def test_mistakes(error, message, wrong):
    arguments = {"student_hidden": S, "teacher_hidden": T, "weight": W, **wrong}
    with pytest.raises(error, match=message):
        linear_divergence(**arguments)


@pytest.mark.parametrize(
    "wrong", [("entry", 0.0), ("token", -1.0), ("token", "1"), ("entry", None), ("both", 1.0)]
)
def test_clips_that_are_none(wrong):
    with pytest.raises(ValueError, match="clip: got"):
        Clip(*wrong)


def test_cpp_refuses_double():
    with pytest.raises(ValueError, match="backend: got 'cpp' for float64"):
        linear_divergence(S.double(), T.double(), W.double(), backend="cpp")


def test_log_prob_names_its_own_arguments():
    with pytest.raises(ValueError, match="hidden: got"):
        linear_log_prob(S.long(), W, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="targets: got list, must be a tensor"):
        linear_log_prob(S, W, [0, 1, 2])
    with pytest.raises(ValueError, match="memory_budget: got 1000000000"):
        linear_log_prob(S, W, torch.zeros(3, dtype=torch.long), memory_budget=1e9)
    with pytest.raises(ValueError, match="process_group: got"):
        linear_log_prob(S, W, torch.zeros(3, dtype=torch.long), process_group=object())
