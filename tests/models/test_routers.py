"""Mixtures of experts: routers that stay as they are, and the loss that evens the experts out."""

import copy
import shutil

import pytest
import torch
from helpers.prefix_models import make_groups
from helpers.tiny_models import tiny_model
from helpers.training_cases import quiet, short_config, write_rows
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from opsd.common.errors import UserError
from opsd.config.load import parse_config
from opsd.config.loss import LossSection
from opsd.config.sections import ModelSection
from opsd.models.experts import check_router_loss
from opsd.models.head import keeping_router_logits
from opsd.models.load import checkpoint_activations
from opsd.models.lora import add_adapters
from opsd.models.routers import freeze_routers, router_loss, routers
from opsd.objectives import OPSD, Sample, SampleGroup, Totals
from opsd.prefix import student_and_teacher_states
from opsd.quickstart import tiny_model as tiny
from opsd.training.run import train
from opsd.training.step import OPSDStep

pytestmark = pytest.mark.usefixtures("no_report")

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module")
def vocabulary():
    return len(tiny.make_tokenizer())


def trained(model, directory, section, **sections):
    """A run of one step with these fields of `model`. Returns the lines that it says."""
    model.save_pretrained(directory / "model")
    tiny.make_tokenizer().save_pretrained(directory / "model")
    short = {
        "rollout": {"group_size": 2, "max_new_tokens": 4},
        "train": {"steps": 1, "problems_per_step": 2, "save_every": 0},
        "eval": {"problems": 0},
        "model": section,
        **sections,
    }
    rows = write_rows(directory / "rows.jsonl")
    said = quiet()
    lines = said.lines = []
    said.note = lines.append
    shutil.rmtree(directory / "run", ignore_errors=True)
    train(short_config(directory / "model", rows, directory / "run", **short), said)
    return lines


@pytest.mark.parametrize("model_type", FAMILIES)
def test_frozen_routers_keep_their_weights(model_type, vocabulary, tmp_path):
    model = tiny_model(model_type, vocab_size=vocabulary)
    own = {f"{name}.{p}" for name, r in routers(model).items() for p, _ in r.named_parameters()}
    for frozen in (True, False):
        said = trained(model, tmp_path, {"freeze_router": frozen})
        assert any("model.freeze_router" in line for line in said) is frozen
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, after[n])}
        assert own and changed
        assert not changed & own if frozen else changed & own


@pytest.mark.parametrize("model_type", FAMILIES)
def test_frozen_routers_get_no_adapters(model_type, vocabulary, tmp_path):
    model = tiny_model(model_type, vocab_size=vocabulary)
    names = [*routers(model)]
    section = {"lora": {"rank": 2, "alpha": 4}, "freeze_router": True}
    assert any("no adapters" in line for line in trained(model, tmp_path, section))
    after = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert after and not [n for n in after for router in names if f".{router}." in n]


@pytest.mark.parametrize("model_type", ["mixtral", "afmoe", "hunyuan_v1_moe", "dbrx"])
def test_adapters_stand_beside_routers_unless_frozen(model_type):
    for frozen in (False, True):
        section = ModelSection(path="x", freeze_router=frozen, lora={"rank": 2})
        model = tiny_model(model_type)
        inside = tuple(routers(model))
        adapted = add_adapters(model, section)
        found = [n for n, m in adapted.named_modules() if hasattr(m, "lora_A")]
        assert found and any(name in n for n in found for name in inside) is not frozen
        if not frozen:
            continue
        # What is saved names no router either: peft would make its adapters anew.
        config, plain = adapted.peft_config["default"], tiny_model(model_type)
        again = get_peft_model(plain, copy.deepcopy(config))
        assert [n for n, m in again.named_modules() if hasattr(m, "lora_A")] == found


def test_a_model_without_routers_cannot_freeze_them():
    with pytest.raises(UserError, match="freeze_router is true: LlamaForCausalLM has no router"):
        freeze_routers(tiny_model("llama"))


def roles(groups):
    """The same rollouts after other contexts, for a teacher."""
    return [(prefix.flip(0), rollouts) for prefix, rollouts in groups]


def own_loss(model, groups, live, share):
    with keeping_router_logits(True) as routed:
        teachers = [(model, roles(groups))] if live else []
        student_and_teacher_states(model, groups, teachers, share)
    ((logits, counted),) = routed
    return router_loss(model, logits, counted)


def wanted_loss(model, groups):
    """transformers' function on the logits of its own forward of each rollout, a prefix's once."""
    kept = []
    for prefix, rollouts in groups:
        for number, ids in enumerate(rollouts):
            row = torch.cat([prefix, ids[:-1]])[None]
            found = model(input_ids=row, use_cache=False, output_router_logits=True).router_logits
            start = len(prefix) if number else 0
            kept.append([layer.reshape(-1, layer.shape[-1])[start:] for layer in found])
    layers = tuple(torch.cat(layer) for layer in zip(*kept, strict=True))
    return load_balancing_loss_func(layers, layers[0].shape[-1], 2)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe", "olmoe", "granitemoe", "jamba"]
)
def test_the_routers_loss_is_transformers_own_with_each_token_once(
    model_type, checkpointing, share
):
    groups = make_groups()
    model = tiny_model(model_type)
    wanted = wanted_loss(model, groups)
    wanted.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    checkpoint_activations(model, checkpointing)
    found = own_loss(model.train(), groups, True, share)
    found.backward()
    assert abs(found - wanted) <= 2e-6 * wanted
    whole = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert (parameter.grad - gradients[name]).norm() <= 1e-5 * whole, name


def test_the_weight_of_the_routers_loss_scales_it_and_0_is_off():
    groups = [
        SampleGroup(prefix.tolist(), [Sample(r.tolist(), 1 / 30) for r in rollouts], [[3, 4, 5]])
        for prefix, rollouts in make_groups()
    ]
    model, teacher = tiny_model("mixtral"), tiny_model("mixtral", hidden_act="relu")

    def gradient(weight, budget=10_000):
        section = LossSection(backend="torch", router_aux=weight)
        step, totals = OPSDStep(model, OPSD(section, teacher)), Totals()
        model.zero_grad()
        batches, cache = step.cache_prefixes(step.micro_batches(groups, budget), budget)
        assert not any(prefix.trains for prefix in cache.prefixes) or not weight
        step.objective.tokens = sum(s.tokens for group in groups for s in group.samples)
        loss = sum(step(batch, totals) for batch in batches)
        loss.backward()
        cache.batch_done()
        return loss, totals.means(), torch.cat([p.grad.flatten() for p in model.parameters()])

    plain, means, without = gradient(0.0)
    assert "router_aux_loss" not in means
    (one, means, first), (_, _, third) = gradient(0.1), gradient(0.3)
    aux = own_loss(model, [g.as_student() for g in groups], False, True)
    assert means["router_aux_loss"] == pytest.approx(float(aux), rel=1e-6)
    assert float(one - plain) == pytest.approx(0.1 * float(aux), rel=1e-4)
    assert ((third - without) - 3 * (first - without)).norm() <= 1e-4 * (first - without).norm()
    # Micro-batches: the mean of each one's loss, by its share of the tokens.
    few, means, _ = gradient(0.1, budget=24)
    assert float(few - plain) == pytest.approx(0.1 * means["router_aux_loss"], rel=1e-3)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama4_text", "llama"])
def test_a_model_without_the_loss_is_refused(model_type):
    model = tiny_model(model_type)
    check_router_loss(model, 0.0)
    with pytest.raises(UserError, match=r"router_aux is 0\.01: transformers computes no load-bal"):
        check_router_loss(model, 0.01)


def test_a_run_trains_by_the_routers_loss(vocabulary, tmp_path):
    model = tiny_model("qwen3_moe", vocab_size=vocabulary)
    model.config.output_router_logits = True
    lora = {"lora": {"rank": 2, "alpha": 4}}
    said = trained(model, tmp_path, lora, loss={"router_aux": 0.01})
    assert not [line for line in said if "without the loss that evens" in line]
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"router_aux_loss": ' in metrics


def test_what_does_not_go_with_the_routers_loss():
    values = {"model": {"path": "x"}, "data": {"source": "rows.jsonl"}}
    more = {"loss": {"router_aux": 0.1}, "train": {"gradient_checkpointing": "reentrant"}}
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing is 'reentrant'"):
        parse_config({**values, **more})
