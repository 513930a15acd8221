"""`python -m benchmarks.filtered`: measures the gain and the cost of leaving out small entries of
the gradient. The figures are in docs/kernel.md.

Logits have a given mean entropy: a Zipf-like prior over the vocabulary, and hidden states of
varying length near one row of the head; the teacher's differ from the student's by 15 %. The
filtered gradient keeps the entries with S or T above a threshold and multiplies only them.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

N, V, D = 512, 32768, 512
ENTROPIES = (0.3, 0.8, 1.5)
EXPONENTS = (-6, -8, -10, -12, -14)


def problem(entropy: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student [N, D], teacher [N, D], weight [V, D], bias [V]) with that mean entropy in nats."""
    weight = torch.randn(V, D) / D**0.5
    bias = -1.1 * torch.log(torch.randperm(V).float() + 1)
    towards = weight[torch.randint(0, V, (N,))] + 0.35 * torch.randn(N, D) / D**0.5
    towards = towards * (torch.rand(N, 1) * 1.2 + 0.4)
    low, high = 0.0, 200.0
    for _ in range(14):
        length = (low + high) / 2
        log_p = (length * towards @ weight.T + bias).log_softmax(-1)
        found = float(-(log_p.exp() * log_p).sum(-1).mean())
        low, high = (length, high) if found > entropy else (low, length)
    student = length * towards
    noise = torch.randn(N, D) / D**0.5
    return student, student + 0.15 * student.norm(dim=-1, keepdim=True) * noise, weight, bias


def seconds(call: Callable[[], object]) -> float:
    """Processor time, the least of three calls."""
    times = []
    for _ in range(3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def filtered_hidden(s: Tensor, t: Tensor, g: Tensor, weight: Tensor, threshold: float):
    """(dh [N, D], (rows, columns, values) of the entries that are kept)."""
    keep = (s > threshold) | (t > threshold)
    rows, columns = keep.nonzero(as_tuple=True)
    values = g[rows, columns]
    offsets = keep.sum(1).cumsum(0).roll(1)
    offsets[0] = 0
    d_hidden = embedding_bag(columns, weight, offsets, mode="sum", per_sample_weights=values)
    return d_hidden, (rows, columns, values)


def filtered_weight(student: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """dW [V, D]."""
    return torch.zeros(V, D).index_add_(0, columns, student[rows] * values[:, None])


def report(entropy: float) -> None:
    student, teacher, weight, bias = problem(entropy)
    s = (student @ weight.T + bias).softmax(-1)
    t = (teacher @ weight.T + bias).softmax(-1)
    g = s - t
    d_hidden, d_weight = g @ weight, g.T @ student
    forward = 2 * seconds(lambda: student @ weight.T)
    exact = seconds(lambda: g @ weight), seconds(lambda: g.T @ student)
    for exponent in EXPONENTS:
        arguments = (s, t, g, weight, 2.0**exponent)
        approximate, kept = filtered_hidden(*arguments)
        pairs = (approximate, d_hidden), (filtered_weight(student, *kept), d_weight)
        errors = [float((x - y).norm() / y.norm()) for x, y in pairs]
        sparse = (
            seconds(partial(filtered_hidden, *arguments)),
            seconds(partial(filtered_weight, student, *kept)),
        )
        gains = [(forward + sum(exact[:k])) / (forward + sum(sparse[:k])) for k in (1, 2)]
        dropped = 1 - float(t[kept[0], kept[1]].sum()) / N
        print(
            f"{entropy:7.1f}  2^{exponent:<8} {len(kept[0]) / N:9.0f}  {dropped:9.1%}  "
            f"{errors[0]:9.1%}  {errors[1]:9.1%}  {gains[0]:7.2f}  {gains[1]:9.2f}"
        )


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("entropy  threshold  kept/token  dropped T   dh error   dW error   frozen  trainable")
    for entropy in ENTROPIES:
        report(entropy)


if __name__ == "__main__":
    main()
