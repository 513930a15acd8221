"""Cases for tile functions."""

import torch

from opsd_kernels import Clip, Divergence, LogitTransform
from opsd_kernels.divergence import Rule
from opsd_kernels.resolve import load
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits

TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(1.3, -0.7),
    "capped": LogitTransform(0.9, 1.1, 4.0),
}


CLIPS = {"none": None, "entry": Clip("entry", 0.02)}


N, V = 3, 1043  # V is in three blocks of 512 and no multiple of a vector's length


def problem(biased: bool) -> tuple:
    """Products [N, V] and biases, with a padded entry and a token with equal roles."""
    student, teacher = 3 * torch.randn(2, N, V, dtype=torch.float64)
    student[1] = teacher[1]
    bias, teacher_bias = torch.randn(2, V, dtype=torch.float64)
    teacher_bias = bias if biased else None
    return student, teacher, bias if biased else None, teacher_bias


def sweep(backend, tensors, cuts, rule, row_weight, dtype, early):
    """The state and gradient after the three functions have processed the tiles between `cuts`."""
    backend = load(backend)
    # Memory wider than the tile, so that a row's stride differs from its length.
    wide = [torch.full((N, V + 3), torch.nan, dtype=dtype) for _ in range(2)]
    student, teacher = (w[:, 1 : V + 1].copy_(x) for w, x in zip(wide, tensors[:2], strict=True))
    biases = [x if x is None else x.to(dtype) for x in tensors[2:]]
    roles = list(zip((student, teacher), biases, strict=True))
    tiles = [
        [Logits(x[:, a:b], bias if bias is None else bias[a:b]) for x, bias in roles]
        for a, b in zip((0, *cuts), (*cuts, V), strict=True)
    ]
    state = states.new(N, student, dtype)
    for tile in tiles:
        backend.normalisers(*tile, rule, state)
    if early:
        for tile in tiles:
            backend.sums(*tile, rule, state)
    state[states.TARGET_WEIGHT] = torch.tensor([0.7, 0.0, -2.0])  # 0: without a target's loss
    before = student.clone(), teacher.clone()
    assert torch.equal(student, tensors[0].to(dtype))  # not overwritten so far
    row_weight = row_weight.to(dtype)
    for tile in tiles:
        backend.gradient_(*tile, rule, state, row_weight, early)
    if not early and rule.divergence.name != "forward_kl":
        sum_p = state[states.UNNORMALISED] + state[states.TARGET_WEIGHT]
        student = student - teacher * sum_p[:, None]
    else:
        assert torch.equal(teacher, before[1])
    assert wide[0][:, 0].isnan().all() and wide[0][:, -1].isnan().all()
    return state, student


def tile_results(backend: str, student: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
    """The states and gradients of all tile functions; overwrites the tiles."""
    functions, rule = load(backend), Rule(Divergence("jsd"))
    n = len(student)
    ones, targets = torch.ones(n), torch.arange(n)
    state, roles = states.new(n, student, torch.float32), (Logits(student), Logits(teacher))
    functions.normalisers(*roles, rule, state)
    functions.sums(*roles, rule, state)
    functions.gradient_(*roles, rule, state, ones)
    found = [state, student.clone()]
    state = states.new_log_prob(n, teacher, torch.float32)
    functions.log_prob_normalisers(roles[1], targets, rule.transform, state)
    functions.log_prob_gradient_(roles[1], targets, rule.transform, state, ones)
    return [*found, state, teacher.clone()]


def leaves_in_16_bits(backend: str) -> None:
    """Check gradients that are written to `out`, which is wider than the tile: they equal those
    that are written over the products, rounded as torch rounds; memory beside them is not changed.
    """
    functions, rule, row_weight = load(backend), Rule(Divergence("jsd")), torch.rand(N)
    targets = torch.arange(N)

    def written(out):
        tiles = [x.float() for x in problem(biased=False)[:2]]
        roles, state = [Logits(x) for x in tiles], states.new(N, tiles[0], torch.float32)
        functions.normalisers(*roles, rule, state)
        functions.sums(*roles, rule, state)
        functions.gradient_(*roles, rule, state, row_weight, True, out)
        return tiles[0]

    def log_prob(out):
        tile = problem(biased=False)[0].float()
        state, logits = states.new_log_prob(N, tile, torch.float32), Logits(tile)
        functions.log_prob_normalisers(logits, targets, LogitTransform(), state)
        functions.log_prob_gradient_(logits, targets, LogitTransform(), state, row_weight, out)
        return tile

    for gradient in (written, log_prob):
        torch.manual_seed(1)
        inside = gradient(None)
        # At 0 four entries are stored at once, at 1 they are stored one by one.
        for dtype, first in ((torch.bfloat16, 0), (torch.float16, 1), (torch.float32, 1)):
            wide = torch.full((N, V + 5), torch.nan, dtype=dtype)
            torch.manual_seed(1)
            gradient(wide[:, first : first + V])
            assert torch.equal(wide[:, first : first + V], _rounded(inside, dtype, backend))
            assert wide[:, first + V :].isnan().all() and wide[:, :first].isnan().all()


def _rounded(x: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    if dtype == torch.bfloat16 and backend == "triton" and x.device.type == "cpu":
        x = (x.view(torch.int32) >> 16 << 16).view(torch.float32)  # Triton's interpreter truncates
    return x.to(dtype)


def far_apart(backend: str, path) -> None:
    """Check rows whose offsets exceed 2^31 entries, in sparse files: N V is 2.1e9 for 8192 tokens
    and 262144 entries, and a 32-bit offset would overflow.
    """
    n, v, stride = 3, 611, 2**30 + 5
    close = [3 * torch.randn(n, v) for _ in range(2)]
    apart = []
    for k, x in enumerate(close):
        size = (n - 1) * stride + v
        memory = torch.from_file(str(path / f"tile{k}"), shared=True, size=size)
        apart.append(memory.as_strided((n, v), (stride, 1)).copy_(x))
    assert (n - 1) * stride > 2**31
    got, want = tile_results(backend, *apart), tile_results(backend, *close)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
