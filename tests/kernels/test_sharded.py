"""The vocabulary split over ranks: every rank sees what one process with the whole head sees."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.kernel_cases import DIVERGENCES, make

from opsd_kernels import Clip, LogitTransform, linear_divergence, linear_log_prob

N, V, D = 9, 77, 12
# Uneven, one smaller than a vector and one empty.
SIZES = {2: (50, 27), 3: (70, 0, 7)}
BUDGETS = (None, 6000)  # one pass; tiles
CLIPS = (None, Clip("entry", 0.02), Clip("token", 0.3))


def _start(rank: int, ranks: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        for work in WORK:
            torch.manual_seed(0)  # the same problem on every rank
            work(rank, ranks)
    finally:
        dist.destroy_process_group()


def close(got, want, what: object = "") -> None:
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-6, msg=lambda m: f"{what}: {m}")


def shard(x, rank: int, ranks: int):
    return None if x is None else x.split(SIZES[ranks])[rank].detach().requires_grad_()


def divergence_of_shards(rank: int, ranks: int) -> None:
    k = 0
    for divergence in DIVERGENCES:
        for clip in CLIPS:
            for budget in BUDGETS:
                for trainable in (True, False):
                    # The other options in turn, not in every combination.
                    k += 1
                    if ranks > 2 and k % 5:  # what more ranks change is seen in any case
                        continue
                    one_divergence(
                        rank,
                        ranks,
                        trainable,
                        backend=("cpp", "torch")[k // 2 % 2],
                        reduction=("mean", "none", "sum")[k % 3],
                        divergence=divergence,
                        clip=clip,
                        memory_budget=budget,
                    )


def one_divergence(rank: int, ranks: int, trainable: bool, **options) -> None:
    transform = LogitTransform(1.2, 0.9, 6.0)
    separate = options["reduction"] == "sum"
    case = make(N, V, D, bias=True, teacher_weight=torch.randn(V, D) if separate else None)
    options |= {"beta": 0.3, "temperature": 1.2, "logit_scale": 0.9, "logit_softcap": 6.0}
    options |= {"token_weight": torch.rand(N) * (torch.arange(N) != 3)}
    assert transform.softcap == options["logit_softcap"]
    if options["reduction"] == "sum":  # with a loss of the targets' log-probabilities beside it
        targets, advantage = torch.randint(V, (N,)), torch.randn(N)
        options["targets"] = targets
        options["token_loss"] = lambda log_prob, rows: advantage[rows] * log_prob
    whole, part = ([], [])
    for into, cut in ((whole, lambda x: x), (part, lambda x: shard(x, rank, ranks))):
        student = case.student.clone().requires_grad_()
        weight, bias = (cut(x).detach().requires_grad_(trainable) for x in (case.weight, case.bias))
        teacher_weight = None if not separate else cut(case.teacher_weight).detach()
        result = linear_divergence(
            student,
            case.teacher,
            weight,
            teacher_weight,
            bias=bias,
            teacher_bias=bias.detach() if separate else None,
            process_group=dist.group.WORLD if into is part else None,
            **(options if into is part else options | {"memory_budget": None}),
        )
        result.loss.sum().backward()
        into += [result, student.grad, weight.grad, bias.grad]
    for name in vars(whole[0]):
        close(getattr(part[0], name), getattr(whole[0], name), (name, options))
    close(part[1], whole[1], ("dh", options))
    if trainable:
        for got, want in zip(part[2:], whole[2:], strict=True):
            close(got, want.split(SIZES[ranks])[rank], ("head", options))


def log_prob_of_shards(rank: int, ranks: int) -> None:
    targets = torch.tensor([0, 49, 50, 76, 69, 70, 75, 3, 60])
    upstream = torch.rand(N)
    for trainable in (True, False):
        for budget in BUDGETS:
            case = make(N, V, D, bias=True)
            found = []
            for cut, group in ((lambda x: x, None), (lambda x: shard(x, rank, ranks), True)):
                student = case.student.clone().requires_grad_()
                weight = cut(case.weight).detach().requires_grad_(trainable)
                result = linear_log_prob(
                    student,
                    weight,
                    targets,
                    bias=cut(case.bias).detach(),
                    memory_budget=budget,
                    process_group=dist.group.WORLD if group else None,
                )
                result.log_prob.backward(upstream)
                found.append((result.log_prob, result.entropy, student.grad, weight.grad))
            (*want, want_head), (*got, got_head) = found
            for x, y in zip(got, want, strict=True):
                close(x, y)
            if trainable:
                close(got_head, want_head.split(SIZES[ranks])[rank])


def targets_outside(rank: int, ranks: int) -> None:
    """NaN for them alone, on every rank; -100 is ignored."""
    targets = torch.tensor([0, 49, V, 76, -1, 70, -100, 2**40, 60])
    case = make(N, V, D)
    weight = shard(case.weight, rank, ranks)
    student = case.student.clone().requires_grad_()
    result = linear_log_prob(student, weight, targets, process_group=dist.group.WORLD)
    outside, ignored = torch.tensor([2, 4, 7]), 6
    inside = torch.tensor([0, 1, 3, 5, 8])
    assert result.log_prob[outside].isnan().all() and result.log_prob[ignored] == 0
    log_p = (case.student @ case.weight.T).log_softmax(-1)
    close(result.log_prob[inside], log_p[inside, targets[inside]])
    close(result.per_token[inside], log_p[inside, targets[inside]])


def different_tokens(rank: int, ranks: int) -> None:
    case = make(N + rank, V, D)
    with pytest.raises(ValueError, match=r"process_group: its ranks came with \[9, 10"):
        linear_divergence(case.student, case.teacher, case.weight, process_group=dist.group.WORLD)


def nothing_to_do(rank: int, ranks: int) -> None:
    """No tokens, none that counts, and one that must not leak: zeros, and no rank waits."""
    targets, weight = torch.zeros(N, dtype=torch.long), shard(torch.randn(V, D), rank, ranks)
    for n, token_weight in ((0, None), (N, torch.zeros(N)), (N, (torch.arange(N) != 3).float())):
        student, teacher = torch.randn(n, D), torch.randn(n, D)
        student[3:4] = torch.nan
        student.requires_grad_()
        for clip in CLIPS:
            options = {"token_weight": token_weight, "process_group": dist.group.WORLD}
            result = linear_divergence(student, teacher, weight, clip=clip, **options)
            log_prob = linear_log_prob(student, weight, targets[:n], **options).log_prob
            (result.loss + log_prob.sum()).backward()
        counts = n > 0 and bool(token_weight.any())
        assert result.loss.isfinite() and bool(result.loss != 0) == counts
        for x in (student, weight):
            assert x.grad.isfinite().all() and bool(x.grad.any()) == (counts and x.numel() > 0)
            x.grad = None


# --- DTensor: FSDP2's shards, every rank with tokens of its own ---


def fsdp(rank: int, ranks: int) -> None:
    """A model under FSDP2 against the same model in one process, all ranks' losses averaged."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    tokens = [torch.randn((5, 0, 8)[r], D) for r in range(ranks)]  # one has none
    targets = [torch.randint(0, V, (len(x),)) for x in tokens]
    weights = [torch.rand(len(x)) * (torch.arange(len(x)) != 1) for x in tokens]

    def losses(body, head, r: int, trainable: bool):
        h = body(tokens[r])
        divergence = linear_divergence(
            h,
            tokens[r],
            head if trainable else head.detach(),
            divergence="jsd",
            token_weight=weights[r],
            clip=Clip("entry", 0.05),
        )
        log_prob = linear_log_prob(h, head if trainable else head.detach(), targets[r])
        numbers = (divergence.per_token, divergence.clipped_fraction, log_prob.entropy)
        return divergence.loss + (r + 1) * log_prob.log_prob.sum(), numbers

    for trainable in (True, False):
        torch.manual_seed(1)
        body, head = torch.nn.Linear(D, D), torch.nn.Linear(D, V, bias=False)
        whole_body, whole_head = (torch.nn.Linear(D, D), torch.nn.Linear(D, V, bias=False))
        whole_body.load_state_dict(body.state_dict())
        whole_head.load_state_dict(head.state_dict())
        for module in (body, head):
            fully_shard(module, mesh=mesh)
        assert isinstance(head.weight, dist.tensor.DTensor)
        loss, numbers = losses(body, head.weight, rank, trainable)
        loss.backward()

        want = [losses(whole_body, whole_head.weight, r, trainable) for r in range(ranks)]
        (sum(x for x, _ in want) / ranks).backward()
        close(loss, want[rank][0])
        for x, y in zip(numbers, want[rank][1], strict=True):
            close(x, y)
        close(body.weight.grad.full_tensor(), whole_body.weight.grad)
        if trainable:
            close(head.weight.grad.full_tensor(), whole_head.weight.grad)
        else:
            assert head.weight.grad is None


def tensor_parallel(rank: int, ranks: int) -> None:
    """DTensors and their group: the same tokens on every rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    case = make(N, V, D, divergence="reverse_kl", teacher_weight=torch.randn(V, D))
    whole = case.require_grad()
    expected = whole.fused("cpp").loss
    expected.backward()
    student = case.student.clone().requires_grad_()
    weight, teacher = (
        distribute_tensor(x, mesh, [Shard(0)]) for x in (case.weight, case.teacher_weight)
    )
    weight.requires_grad_()
    call = {"divergence": "reverse_kl", "process_group": mesh.get_group()}
    loss = linear_divergence(student, case.teacher, weight, teacher, **call).loss
    loss.backward()
    close(loss, expected)
    close(student.grad, whole.student.grad)
    close(weight.grad.full_tensor(), whole.weight.grad)

    for wrong, message in (
        ((weight, case.teacher_weight), "teacher_weight: got a plain tensor"),
        ((case.weight, teacher), "weight: got a plain tensor"),
        ((weight, distribute_tensor(case.teacher_weight, mesh, [Replicate()])), "full_tensor"),
        ((distribute_tensor(case.weight, mesh, [Shard(1)]), None), "weight: got a DTensor placed"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_divergence(student, case.teacher, *wrong)


WORK = (
    divergence_of_shards,
    log_prob_of_shards,
    targets_outside,
    different_tokens,
    nothing_to_do,
    fsdp,
    tensor_parallel,
)


@pytest.mark.parametrize("ranks", SIZES)
def test_ranks(ranks, tmp_path):
    """All of the above, in one start of the processes: that takes longer than the work."""
    mp.spawn(_start, args=(ranks, str(tmp_path / "store")), nprocs=ranks)
