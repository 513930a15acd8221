"""The training step: what is packed, checked and logged, on one process, two, and with adapters."""

import os
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from helpers.prefix_models import alone, assert_same, ids, make, make_groups
from helpers.step_cases import make_samples, make_step
from helpers.training_cases import short_values, write_model, write_rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.files import read_lines
from opsd.config.load import merge
from opsd.config.loss import LossSection
from opsd.models.copies import whole
from opsd.objectives import OPSD, Totals
from opsd.prefix import (
    PrefixCache,
    attention,
    live_hidden_states,
    packed_forward,
    shared_prefix_hidden_states,
    unpackable,
    using_cache,
)
from opsd.training.step import OPSDStep, idle, token_ratio

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def flat_gradient(step):
    return torch.cat([whole(p.grad).flatten() for p in step.parameters()])


def one_process(share=True):
    step = make_step(share)
    step(make_samples(), Totals()).backward()
    return flat_gradient(step)


def test_the_ratio_counts_the_tokens_that_are_not_run():
    samples = make_samples()
    student, teacher = 7, 19
    rollouts = 45 - len(samples)
    naive = len(samples) * (student + teacher) + 2 * rollouts
    shared = 4 * (student + teacher) + 2 * rollouts
    assert token_ratio(samples) == naive / shared


def test_the_check_passes_and_sharing_is_refused_where_it_differs(monkeypatch):
    step = make_step()
    assert step.check_sharing(make_samples()) < 1e-5
    right = attention.packed_attention

    def wrong(*arguments, **more):
        return 1.01 * right(*arguments, **more)

    monkeypatch.setattr(packed_forward, "packed_attention", wrong)
    with pytest.raises(UserError, match="--no-share"):
        step.check_sharing(make_samples())


def test_the_check_is_made_without_dropout():
    model = make("OPT", {"dropout": 0.3})
    step = OPSDStep(model.train(), OPSD(LossSection(backend="torch"), model))
    assert step.check_sharing(make_samples()) < 1e-5
    assert model.training


def test_the_check_in_bf16_measures_by_what_bf16_costs_alone(monkeypatch):
    step, samples = make_step(), make_samples()
    sequences = [sample.roles[0] for sample in samples[:2]]
    with torch.no_grad():
        alone = step._states(sequences, False, torch.float32)
        step._check_rounding(sequences, alone, torch.bfloat16)
        right = attention.packed_attention
        monkeypatch.setattr(
            packed_forward, "packed_attention", lambda *a, **more: 1.2 * right(*a, **more)
        )
        with pytest.raises(UserError, match=r"torch\.bfloat16 alone makes 0\.0"):
            step._check_rounding(sequences, alone, torch.bfloat16)


def test_the_check_looks_at_a_context_with_several_rollouts(monkeypatch):
    samples = make_samples()
    seen = []
    monkeypatch.setattr(
        "opsd.training.step.rollout_hidden_states",
        lambda model, sequences, share: seen.append(sequences) or torch.ones(1),
    )
    make_step().check_sharing([samples[5], *samples])
    assert all(len(s) > 1 and len({tuple(x.context) for x in s}) == 1 for s in seen)


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
    samples = make_samples()
    for kind in ("ddp", "fsdp2"):
        plain = make_step()
        own, other = (plain.micro_batches(samples[n::2], 60) for n in (rank, 1 - rank))
        own += [idle(samples)] * (len(other) - len(own))  # FSDP2 gathers weights in step
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
        _, teacher = live_hidden_states(adapted, groups, others)
        assert (teacher - alone(adapted, others)).abs().max() < 2e-5
        adapted.get_decoder().register_forward_hook(
            lambda *_: adapted.base_model.disable_adapter_layers()
        )
        with pytest.raises(ValueError, match=r"6 of 6 adapted layers .* switch adapters"):
            live_hidden_states(adapted, groups, others)


def test_what_is_kept_with_adapters_on_is_not_read_with_them_off(adapted):
    prefix_ids, rollouts = ids(20)[0], ids(5, 4, seed=2)
    batches = [[(prefix_ids, [rollout])] for rollout in rollouts]
    contexts = [{tuple(prefix_ids.tolist())}] * 2
    with torch.no_grad(), using_cache(PrefixCache(contexts, [])):
        for batch in batches:
            for off in (False, True):
                with adapted.disable_adapter() if off else nullcontext():
                    states = shared_prefix_hidden_states(adapted, batch)
                    assert (states - alone(adapted, batch)).abs().max() < 2e-5


def test_batches_of_a_step_are_groups_in_order():
    step, samples = make_step(), make_samples()
    for batch in step.micro_batches(samples, 1000):
        places = [samples.index(sample) for sample in batch]
        contexts = [tuple(sample.roles[0].context) for sample in batch]
        changes = sum(a != b for a, b in pairwise(contexts))
        assert changes == len(set(contexts)) - 1 and len(places) == len(set(places))
