"""TRL's trainers with the fused loss: steps of the real trainers, each against its own parent.

The models are tiny and random, the data a few worksheets; rollouts are sampled by the trainers.
"""

import copy
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from helpers.training_cases import ROWS, write_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.trainer import distillation_trainer

from opsd_kernels.adapters.trl import (
    FusedDistillation,
    FusedGKD,
    FusedSDFT,
    check_head,
    chunked_divergence_loss,
    head_inputs,
    logit_transform,
    output_head,
)


class SDFT(FusedSDFT, SDFTTrainer):
    kernel_options: ClassVar = {"memory_budget": 2**20}

    def _forward_logits(self, *arguments, **options):
        raise AssertionError("makes logits")


class GKD(FusedGKD, GKDTrainer):
    def generalized_jsd_loss(*arguments, **options):
        raise AssertionError("takes logits")


class Distillation(FusedDistillation, DistillationTrainer):
    kernel_options: ClassVar = {"backend": "torch"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model_path):
    return AutoTokenizer.from_pretrained(model_path)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def noisy(model):
    """A teacher whose distributions differ."""
    torch.manual_seed(5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.2 * p.std() * torch.randn_like(p)
    return other


def common(tmp_path, steps=2) -> dict:
    return {
        "output_dir": str(tmp_path),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 11,
    }


def assert_same(trainers, metrics=("loss", "grad_norm")):
    """Train them all; the logs and the weights that come out are the first's."""
    logs, weights = [], []
    for make in trainers:
        torch.manual_seed(0)
        trainer = make()
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        logs.append([[entry[name] for name in metrics] for entry in steps])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    theirs, ours = map(torch.tensor, logs)
    assert theirs.shape[0] == 2 and (theirs[:, 0].abs() > 1e-3).all()
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    "mode, alpha, iterations, lora",
    [
        ("full_logits", 0.5, 1, None),
        ("full_logits", 0.0, 2, None),
        ("full_logits", 1.0, 1, {}),
        ("full_logits", 0.5, 1, {"modules_to_save": ["lm_head"]}),
        ("sampled_token", 1.0, 2, None),
        ("sampled_token", 1.0, 1, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_sdft(model_path, tokenizer, tmp_path, mode, alpha, iterations, lora):
    """With 2 iterations a batch is used twice: the second time with importance ratios. With LoRA
    the teacher is the model without it, and without the copy of the head that it trains.
    """
    rows = [
        {"prompt": r.problem, "privileged_context": f"{r.problem} {r.solution}"} for r in ROWS[:4]
    ]
    config = SDFTConfig(
        **common(tmp_path),
        distillation_mode=mode,
        distillation_alpha=alpha,
        num_iterations=iterations,
        num_generations=1,
        max_completion_length=6,
        max_prompt_length=None,
        temperature=0.8,
        teacher_model_kind="live" if lora is None else "base",
        num_loss_tokens_to_skip=1,
    )
    adapter = None
    if lora is not None:
        adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **lora)

    def build(kind):
        return lambda: kind(
            model=load(model_path),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=adapter,
        )

    metric = "self_distillation/distillation_loss"
    assert_same([build(SDFTTrainer), build(SDFT)], ("loss", "grad_norm", metric))


def test_sdft_has_no_top_k(model_path, tokenizer, tmp_path):
    config = SDFTConfig(**common(tmp_path), teacher_model_kind="live", num_generations=1)
    rows = [{"prompt": "Q:1", "privileged_context": "Q:1"}]
    with pytest.raises(
        ValueError, match=r"'topk_logits', SDFTConfig's.*distillation_mode=\"full_logits\""
    ):
        SDFT(
            model=load(model_path),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd(model_path, tokenizer, tmp_path, beta):
    rows = [
        {
            "messages": [
                {"role": "user", "content": r.problem},
                {"role": "assistant", "content": r.solution},
            ]
        }
        for r in ROWS[:4]
    ]
    config = GKDConfig(
        **common(tmp_path), beta=beta, lmbda=0.5, max_new_tokens=6, max_length=120, temperature=0.7
    )

    def build(kind):
        model = load(model_path)
        return lambda: kind(
            model=model,
            teacher_model=noisy(model),
            args=copy.deepcopy(config),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    assert_same([build(GKDTrainer), build(GKD)])


def test_distillation(model_path, tokenizer, tmp_path):
    rows = [{"prompt": r.problem} for r in ROWS[:4]]
    config = DistillationConfig(
        **common(tmp_path), beta=0.5, temperature=0.8, max_completion_length=6
    )

    def build(kind):
        model = load(model_path)
        return lambda: kind(
            model=model,
            teacher_model=noisy(model),
            args=copy.deepcopy(config),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    assert_same([build(DistillationTrainer), build(Distillation)], ("loss", "grad_norm", "entropy"))


def test_inside_a_wrapper(model_path, tmp_path):
    """The whole loss is DDP's forward, so that its gradients are reduced: they come out."""

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = load(model_path)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        trainer = object.__new__(FusedGKD)
        trainer.accelerator = SimpleNamespace(unwrap_model=lambda m: getattr(m, "module", m))
        trainer.teacher_model, trainer.beta = noisy(model), 0.5
        ids = torch.randint(5, 20, (2, 9))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        gradients = []
        for student in (model, wrapped):
            model.zero_grad()
            trainer.compute_loss(student, inputs).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for plain, reduced in zip(*gradients, strict=True):
            assert plain.any()
            torch.testing.assert_close(reduced, plain)
    finally:
        torch.distributed.destroy_process_group()


# --- Heads ---

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def test_scales_and_soft_caps_are_the_models():
    ids = torch.randint(60, (2, 9))
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.01))
    scaled = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0))
    for model, expected in ((capped, (1.0, 0.01)), (scaled, (0.25, None))):
        assert tuple(logit_transform(model).values()) == expected
        check_head(model, model, ids)
        hidden = head_inputs(model, output_head(model), input_ids=ids)
        assert hidden.shape == (2, 9, 16) and hidden.requires_grad
        assert not output_head(model)._forward_pre_hooks
        model.config.final_logit_softcapping, model.config.logits_scaling = None, 1.0
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(hidden @ output_head(model).weight.T, logits)


def test_a_head_of_zeros():
    """Its logits tell nothing of scale and cap, which are checked all the same."""
    ids = torch.randint(60, (2, 9))
    model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0))
    with torch.no_grad():
        output_head(model).weight.zero_()
    check_head(model, model, ids)
    assert not output_head(model)._forward_hooks
    model.config.final_logit_softcapping = 0.01  # which Granite does not read
    with pytest.raises(ValueError, match="makes its logits otherwise"):
        check_head(model, model, ids)


def test_a_head_in_modules_to_save():
    """The adapter's copy of it, and without the adapter the original."""
    base = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    with torch.no_grad():
        output_head(model).weight.mul_(-2.0)
    ids = torch.randint(60, (2, 9))
    check_head(model, model, ids)
    trained = output_head(model)
    assert trained.weight.requires_grad
    with model.disable_adapter():
        check_head(model, model, ids)
        original = output_head(model)
    torch.testing.assert_close(trained.weight, -2.0 * original.weight)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_scales_and_caps_of_each_role(beta):
    """TRL's own function with scales and soft caps that differ, and with one role's missing."""
    student, teacher, head, teacher_head = (torch.randn(n, 5, 8) for n in (2, 2, 4, 4))
    student.requires_grad_()
    head, teacher_head = (x.reshape(20, 8) for x in (head, teacher_head))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    for caps in ((None, 3.0), (2.0, None), (2.0, 3.0), (2.0, 2.0)):
        found = []
        for function in (distillation_trainer._chunked_divergence_loss, chunked_divergence_loss):
            loss, *_ = function(
                student,
                teacher,
                head,
                teacher_head,
                mask,
                beta,
                student_logit_scale=0.7,
                teacher_logit_scale=1.3,
                student_final_logit_softcapping=caps[0],
                teacher_final_logit_softcapping=caps[1],
                temperature=0.9,
            )
            found.append((loss, *torch.autograd.grad(loss, student)))
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_logits_made_otherwise_are_refused(model_path):
    class Doubled(type(load(model_path))):
        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            out.logits = 2 * out.logits
            return out

    model = Doubled.from_pretrained(model_path)
    with pytest.raises(ValueError, match="Doubled makes its logits otherwise"):
        check_head(model, model, torch.ones(1, 5, dtype=torch.long))


def test_an_adapted_head_is_refused(model_path):
    class Adapted(nn.Module):
        weight = None

    model = load(model_path)
    model.set_output_embeddings(Adapted())
    with pytest.raises(ValueError, match=r"its head is a Adapted, must be a torch\.nn\.Linear"):
        output_head(model)


def test_a_trainer_without_the_methods_is_refused():
    with pytest.raises(TypeError, match=r"has no _compute_rollout_logps.*trl 1\.16"):
        type("Wrong", (FusedSDFT, GKDTrainer), {})
