"""The training step: what is packed, checked and logged, on one process, two, and with adapters."""

import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from helpers.lines import read_lines
from helpers.prefix_models import alone, assert_same, ids, make, make_groups
from helpers.step_cases import make_sample_groups, make_step
from helpers.training_cases import short_values, write_model, write_rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.config.load import merge
from opsd.config.loss import LossSection
from opsd.models.copies import full_tensor
from opsd.objectives import OPSD, SFT, Totals, samples_of
from opsd.prefix import (
    PrefixCache,
    attention,
    packed_forward,
    shared_prefix_hidden_states,
    states_by_role,
    unpackable,
    use_kernel,
)
from opsd.training.step import OPSDStep, idle, token_ratio

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def flat_gradient(step):
    return torch.cat([full_tensor(p.grad).flatten() for p in step.parameters()])


def one_process(share=True):
    step = make_step(share)
    step(make_sample_groups(), Totals()).backward()
    return flat_gradient(step)


def test_the_ratio_counts_the_tokens_that_are_not_run():
    groups = make_sample_groups()
    student, teacher, rollouts = 7, 19, len(samples_of(groups))
    run = 2 * (45 - rollouts)
    naive = rollouts * (student + teacher) + run
    assert token_ratio(groups) == naive / (4 * (student + teacher) + run)


def test_the_check_passes_and_sharing_is_refused_where_it_differs(monkeypatch):
    step = make_step()
    assert step.check_sharing(make_sample_groups()) < 1e-5
    right = attention.packed_attention

    def wrong(*arguments, **more):
        return 1.01 * right(*arguments, **more)

    monkeypatch.setattr(packed_forward, "packed_attention", wrong)
    with pytest.raises(UserError, match="--no-share"):
        step.check_sharing(make_sample_groups())


def test_the_check_is_made_without_dropout():
    model = make("OPT", {"dropout": 0.3})
    step = OPSDStep(model.train(), SFT(LossSection(backend="torch"), None))
    assert step.check_sharing(make_sample_groups()) < 1e-5
    assert model.training


def test_what_is_scored_is_what_sampled_without_dropout():
    model = make("OPT", {"dropout": 0.3})
    first, second = (
        OPSDStep(model.train(), OPSD(LossSection(backend="torch"), model), share)
        for share in (True, False)
    )
    values = [step(make_sample_groups(), Totals()).item() for step in (first, first, second)]
    assert values[0] == values[1] == pytest.approx(values[2], rel=1e-4)


def test_the_check_in_bf16_measures_by_what_bf16_costs_alone(monkeypatch):
    step, group = make_step(), make_sample_groups()[0].as_student()
    with torch.no_grad():
        alone = step._states(group, False, torch.float32)
        step._check_rounding(group, alone, torch.bfloat16)
        right = attention.packed_attention
        monkeypatch.setattr(
            packed_forward, "packed_attention", lambda *a, **more: 1.2 * right(*a, **more)
        )
        with pytest.raises(UserError, match=r"torch\.bfloat16 alone makes 0\.0"):
            step._check_rounding(group, alone, torch.bfloat16)


def test_the_check_lets_a_kernel_be_that_knows_16_bits_alone(monkeypatch):
    monkeypatch.setattr(attention, "missing", lambda name, device: None)
    use_kernel("flash")
    try:
        assert make_step().check_sharing(make_sample_groups(), torch.bfloat16) < 1e-5
        with pytest.raises(UserError, match="bf16 or fp16, not in float32"):  # a run in fp32
            make_step().check_sharing(make_sample_groups())
    finally:
        use_kernel("auto")


def test_the_check_looks_at_a_context_with_several_rollouts(monkeypatch):
    groups, seen = make_sample_groups(), []
    monkeypatch.setattr(
        "opsd.training.step.rollout_hidden_states",
        lambda model, groups, share: seen.append(groups) or torch.ones(1),
    )
    make_step().check_sharing([groups[2], *groups])
    assert seen and all(found == [groups[0].as_student()] for found in seen)


def test_sharing_does_not_change_the_steps_gradient():
    shared, separate = one_process(True), one_process(False)
    assert (shared - separate).norm() < 1e-5 * separate.norm()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    """DDP and FSDP2 average, so each rank's gradient is half the sum of both."""
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    wanted = one_process()
    for kind in ("ddp", "fsdp2"):
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}-{rank}.pt")
            assert (2 * found - wanted).norm() < 1e-5 * wanted.norm(), kind


def _rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    groups = make_sample_groups()
    for kind in ("ddp", "fsdp2"):
        plain = make_step()
        own, other = (plain.micro_batches(groups[n::2], 40) for n in (rank, 1 - rank))
        own += [idle(groups)] * (len(other) - len(own))  # FSDP2 gathers weights in step
        *first, last = own
        assert first, "a step of one micro-batch would not test accumulation"
        step = DistributedDataParallel(plain) if kind == "ddp" else split(plain)
        with step.no_sync() if kind == "ddp" else nullcontext():
            for batch in first:
                step(batch, Totals()).backward()
        step(last, Totals()).backward()
        torch.save(flat_gradient(step), os.path.join(directory, f"{kind}-{rank}.pt"))
    dist.destroy_process_group()


def split(step):
    """Each layer's weights over both processes, and the rest, the head's among them."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in step.model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(step, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in step.parameters())
    return step


@pytest.mark.parametrize("share", [True, False])
def test_a_run_logs_what_sharing_saves_and_can_do_without(share, tmp_path, capsys):
    values = short_values(
        write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    )
    values = merge(values, {"train": {"steps": 2, "save_every": 0}, "eval": {"problems": 0}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(merge(values, {"rollout": {"group_size": 3}})))
    assert main(["train", str(path), *([] if share else ["--no-share"])]) == 0
    first, second = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert ("token_ratio" in first) == ("sharing_difference" in first) == share
    assert "sharing_difference" not in second
    if share:
        assert "(tiles instead of sdpa)" in capsys.readouterr().out
        assert second["token_ratio"] > 1.5 and first["sharing_difference"] < 1e-5


@pytest.fixture
def adapted():
    import peft  # seconds, which the ranks below need not spend

    model = peft.get_peft_model(
        make("Llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_get_the_same_gradients(adapted, checkpointing):
    adapted.train()
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    groups = make_groups()
    assert_same(adapted, shared_prefix_hidden_states(adapted, groups), groups)


def test_adapters_are_off_for_the_whole_stream_or_on_for_it(adapted):
    groups = make_groups()
    with torch.no_grad():
        on = shared_prefix_hidden_states(adapted, groups)
        with adapted.disable_adapter():
            off = shared_prefix_hidden_states(adapted, groups)
            assert (off - alone(adapted, groups)).abs().max() < 2e-5
        assert (on - off).abs().max() > 0.1
        base = make("Llama")
        assert (off - alone(base, groups)).abs().max() < 2e-5


def test_adapters_that_change_between_the_roles_are_refused(adapted):
    groups = make_groups()
    others = [(torch.cat([prefix_ids, ids(4)[0]]), rollouts) for prefix_ids, rollouts in groups]
    unpackable(adapted)  # which runs two tokens the first time
    with torch.no_grad():
        _, teacher = states_by_role(adapted, [groups, others])
        assert (teacher - alone(adapted, others)).abs().max() < 2e-5
        adapted.get_decoder().register_forward_hook(
            lambda *_: adapted.base_model.disable_adapter_layers()
        )
        with pytest.raises(ValueError, match=r"6 of 6 adapted layers .* switch adapters"):
            states_by_role(adapted, [groups, others])


def test_what_is_cached_with_adapters_on_is_not_read_with_them_off(adapted):
    prefix_ids, rollouts = ids(20)[0], ids(5, 4, seed=2)
    cached = PrefixCache().add(prefix_ids.tolist(), trains=False, last_batch=1)
    with torch.no_grad():
        for rollout in rollouts:
            for off in (False, True):
                with adapted.disable_adapter() if off else nullcontext():
                    states = shared_prefix_hidden_states(adapted, [(cached, [rollout])])
                    wanted = alone(adapted, [(prefix_ids, [rollout])])
                    assert (states - wanted).abs().max() < 2e-5


def test_batches_of_a_step_are_groups_in_order():
    step, groups = make_step(), make_sample_groups()
    for batch in step.micro_batches(groups, 1000):
        assert all(group in groups for group in batch)
        assert len({id(group.student) for group in batch}) == len(batch)
