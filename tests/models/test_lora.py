"""Adapters: what trains, which weights teach, what is saved and found again, what is refused."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.lines import read_lines
from helpers.tiny_models import tiny_config, tiny_model
from helpers.training_cases import ROWS, logits, quiet, short_config, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.compare.flops import multiplying_parameters
from opsd.config.load import parse_config, save_config
from opsd.config.loss import LossSection
from opsd.config.sections import ModelSection, PromptsSection
from opsd.data.prompts import Prompts
from opsd.evaluate.subject import Subject
from opsd.models.copies import copy_model, named_weights, update_copy
from opsd.models.load import checkpoint_activations, load_model, quiet_transformers
from opsd.models.lora import add_adapters, without_adapters
from opsd.models.moving_average import FILE, MovingAverage
from opsd.objectives import OPSD, Problem, Totals
from opsd.plan.memory import Planner
from opsd.plan.workload import Lengths
from opsd.prefix import rollout_hidden_states
from opsd.prefix.packed_forward import adapter_state
from opsd.quickstart import tiny_model as tiny
from opsd.quickstart.worksheet import WorksheetGrader
from opsd.rollout import Rollout
from opsd.runs.directory import claim_directory
from opsd.training.run import run as run_training

pytestmark = pytest.mark.usefixtures("no_report")

LORA = {"rank": 4, "alpha": 8}


def section(files, **lora):
    return ModelSection(path=str(files[0]), lora={**LORA, **lora})


@pytest.fixture
def adapted(files):
    """A model whose adapters do something."""
    model, _ = load_model(section(files))
    model = add_adapters(model, section(files))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=draw)
    return model


def execute(config, **more):
    claim_directory(Path(config.output.dir), config, bool(more.get("checkpoint")))
    model, tokenizer = load_model(config.model)
    torch.manual_seed(config.train.seed)
    rows, held_out = ROWS[:12], ROWS[12:]
    run_training(config, model, tokenizer, rows, held_out, WorksheetGrader(), quiet(), **more)
    return Path(config.output.dir)


GROUPS = [([5, 6, 7, 8], [[9, 10, 11], [4, 3]])]


def test_new_adapters_change_nothing_and_train_alone(files):
    base, _ = load_model(section(files))
    model = add_adapters(copy.deepcopy(base), section(files))
    with torch.no_grad():
        states = rollout_hidden_states(model, GROUPS)
        assert torch.equal(states, rollout_hidden_states(base, GROUPS))
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains and all("lora_" in name for name in trains)
    # All linear layers of both blocks, each with A and B; not the head.
    assert len(trains) == 2 * 7 * base.config.num_hidden_layers


def test_the_weights_of_step_0_are_the_model_without_adapters(files, adapted):
    base, _ = load_model(section(files))
    plain = without_adapters(adapted)
    with torch.no_grad():
        wanted = rollout_hidden_states(base, GROUPS)
        assert torch.equal(rollout_hidden_states(plain, GROUPS), wanted)
        assert (rollout_hidden_states(adapted, GROUPS) - wanted).abs().max() > 0.01
    shared = {parameter.data_ptr() for parameter in adapted.parameters()}
    assert all(parameter.data_ptr() in shared for parameter in plain.parameters())
    assert adapter_state(plain) == () and all(adapter_state(adapted))
    adapted.train()
    assert not any(module.training for module in plain.modules())


@pytest.mark.parametrize("policy", ["initial", "live", "ema"])
@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_gradients_equal_those_of_a_dense_model(policy, checkpointing, files, adapted):
    """W + (alpha / rank) B A written out as a matrix, full logits, autograd through A and B."""
    tokenizer = AutoTokenizer.from_pretrained(files[0])
    prompts = Prompts(
        PromptsSection(student=tiny.STUDENT_PROMPT, teacher=tiny.TEACHER_PROMPT), tokenizer
    )
    rollouts = [[5, 6, 7, 8], [9, 4]]
    problems = [
        Problem(row, prompts.context(row), [Rollout(ids, True)])
        for row, ids in zip(ROWS, rollouts, strict=False)
    ]
    base, _ = load_model(section(files))
    teachers = {
        "initial": without_adapters(adapted),
        "live": adapted,
        "ema": MovingAverage(adapted, 0.5, torch.device("cpu")).model,
    }
    config = short_config(*files, Path("unused"), train={"gradient_checkpointing": checkpointing})
    config = config.model_copy(update={"model": section(files)})
    checkpoint_activations(adapted, config.train.gradient_checkpointing)
    adapted.train()
    objective = OPSD(LossSection(backend="torch"), teachers[policy])
    groups, _ = objective.sample_groups(problems)
    objective.loss(adapted, groups, Totals()).backward()
    ours = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}

    weights, leaves = {}, {}
    for name, _ in adapted.named_parameters():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            pair = [name, name.replace("lora_A", "lora_B")]
            a, b = (
                leaves.setdefault(n, adapted.get_parameter(n).detach().clone().requires_grad_())
                for n in pair
            )
            frozen = base.get_parameter(f"{module}.weight").detach()
            weights[f"{module}.weight"] = frozen + LORA["alpha"] / LORA["rank"] * (b @ a)

    def dense(context, ids, detached=False):
        state = {n: w.detach() if detached else w for n, w in weights.items()}
        call = torch.func.functional_call
        inputs = torch.tensor([[*context, *ids]])
        out = call(base, state, (), {"input_ids": inputs, "use_cache": False}).logits
        return out[0, len(context) - 1 : -1].log_softmax(-1)

    loss = 0.0
    for problem, ids in zip(problems, rollouts, strict=True):
        log_s = dense(problem.context.student, ids)
        if policy == "initial":
            log_t = logits(base, problem.context.teacher, ids).log_softmax(-1).detach()
        else:
            log_t = dense(problem.context.teacher, ids, detached=True).detach()
        loss = loss + (log_t.exp() * (log_t - log_s)).sum() / 6
    loss.backward()
    assert ours.keys() == leaves.keys()
    mine, wanted = (
        torch.cat([g.flatten() for g in grads])
        for grads in zip(*((ours[name], leaf.grad) for name, leaf in leaves.items()), strict=True)
    )
    assert wanted.norm() > 1e-3
    assert (mine - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("merge", [False, True])
def test_a_run_saves_its_adapter_and_resumes_bit_for_bit(merge, files, tmp_path, capsys, recwarn):
    quiet_transformers()  # as every command does
    precision = "bf16" if merge else "fp32"
    values = {
        "model": {"lora": LORA},
        "train": {"precision": precision, "learning_rate": 1e-2, "gradient_checkpointing": True},
        "output": {"merge": merge},
    }
    config = short_config(*files, tmp_path / "run", **values)
    directory = execute(config)
    name = "adapter" if merge else "model"
    first = load_file(directory / name / "adapter_model.safetensors")
    losses = [line["loss"] for line in read_lines(directory / "metrics.jsonl")]
    execute(config, checkpoint=directory / "checkpoint-2")
    again = load_file(directory / name / "adapter_model.safetensors")
    assert (
        all(torch.equal(first[key], again[key]) for key in first) and first.keys() == again.keys()
    )
    assert losses == [line["loss"] for line in read_lines(directory / "metrics.jsonl")]
    checkpoint = {path.name for path in (directory / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in checkpoint and "model.safetensors" not in checkpoint
    base = load_file(files[0] / "model.safetensors")
    if merge:
        merged = load_file(directory / "model" / "model.safetensors")
        assert merged.keys() == base.keys()
        assert any(not torch.equal(merged[key].float(), base[key]) for key in base)
    # Plain transformers loads it, and so do `opsd eval` and a next run.
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    subject = Subject(str(directory / "model"))
    with torch.no_grad():
        plain = logits(model, [5, 6, 7], [8, 9])
        assert torch.allclose(plain, logits(subject.load(), [5, 6, 7], [8, 9]), atol=1e-4)
        assert not torch.allclose(plain, logits(load_model(section(files))[0], [5, 6, 7], [8, 9]))
    assert subject.digest != Subject(str(files[0])).digest
    size = sum(tensor.numel() for tensor in base.values())
    own = 0 if merge else sum(tensor.numel() for tensor in first.values())
    assert multiplying_parameters(directory / "model") == size + own
    problems = tmp_path / "bench.jsonl"
    write_rows(problems, ROWS[:2])
    arguments = ["--benchmark", str(problems), "--samples", "1", "--temperature", "0"]
    arguments += ["--max-new-tokens", "4", "--output", str(tmp_path / "eval")]
    assert main(["eval", str(directory / "model"), *arguments]) == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "eval" / "result.json").read_text())["problems"] == 2
    # Nor do libraries warn of their old names, or of ends that are tied again.
    theirs = [one for one in recwarn if re.search("/(transformers|peft)/", one.filename)]
    assert not [str(one.message) for one in theirs]


def test_an_average_of_adapters_follows_them_over_the_same_weights(files, tmp_path):
    config = short_config(
        *files,
        tmp_path / "run",
        model={"lora": LORA},
        teacher={"policy": "ema", "ema_decay": 0.75},
        train={"steps": 2, "save_every": 1, "learning_rate": 1e-2},
        eval={"problems": 0},
    )
    directory = execute(config)
    saved = [load_file(directory / f"checkpoint-{step}" / FILE) for step in (1, 2)]
    student = load_file(directory / "checkpoint-2" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved[0])
    moved = 0
    for name, before in saved[0].items():
        after = student[name.replace(".default", "")]
        wanted = 0.75 * before + 0.25 * after
        assert torch.allclose(saved[1][name], wanted, rtol=0, atol=1e-7)
        moved += not torch.equal(saved[1][name], before)
    assert moved


def test_a_copy_follows_the_adapters(files, adapted):
    inference_copy = copy_model(adapted, torch.float32)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    update_copy(inference_copy, adapted)
    with torch.no_grad():
        states = [rollout_hidden_states(model, GROUPS) for model in (inference_copy, adapted)]
    assert torch.equal(*states) and not any(p.requires_grad for p in inference_copy.parameters())


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["model.lora.rank=0"], "model.lora.rank is 0"),
        (["model.lora.rnak=8"], "unknown key 'rnak' in section 'model.lora'; did you mean 'rank'"),
        (["model.lora.targets=[]"], "model.lora.targets is []"),
        (["model.lora.targets=[all-linear, q_proj]"], "all-linear alone"),
        (["model.lora.targets=[q_prj]"], "model.lora.targets has 'q_prj': this model has down_pro"),
        (["model.lora.targets=[lm_head]"], "'lm_head': the embedding and the output head"),
        (["model.lora.quantize=nf4"], "model.lora.quantize is 'nf4': weights in 4 bits (QLoRA)"),
        (["model.lora={}", "model.gguf_file=m.gguf"], "model.gguf_file is 'm.gguf': an adapter"),
        (["model.lora={}", "teacher.quantize=int8"], "teacher.quantize is 'int8': with model.lora"),
        (["output.merge=true"], "output.merge is true: without model.lora"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(overrides, wanted, files, tmp_path, capsys):
    save_config(short_config(*files, tmp_path / "run"), tmp_path / "config.yaml")
    assert main(["train", str(tmp_path / "config.yaml"), *overrides]) == 1
    assert wanted in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "model_type, without",
    [("falcon_h1", "out_proj"), ("deepseek_v4", "o_a_proj"), ("llama4_text", "router")],
)
def test_all_linear_leaves_out_what_is_no_product_or_is_read_past_an_adapter(model_type, without):
    """Mamba's kernels read out_proj's weight, and peft refuses it; the others make something else
    than W x. The plan counts as many as peft makes."""
    config = parse_config({"model": {"path": "x", "lora": LORA}, "data": {"source": "none"}})
    model = add_adapters(tiny_model(model_type), config.model)
    names = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert names and not any(name.endswith(f".{without}") for name in names)
    assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    planned = Planner(tiny_config(model_type), Lengths(5, 9, 8), None)
    assert planned.sizes(config).train == trains
    named = ModelSection(path="x", lora={"targets": [without]})
    with pytest.raises(UserError, match=f"targets has '{without}': this model has"):
        add_adapters(tiny_model(model_type), named)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_adapters_of_experts_are_left_out_and_added_whole(model_type, tmp_path):
    """peft stands an adapter beside each tensor of the experts, one around the other, and beside
    the router's weight."""
    plain, ids = tiny_model(model_type), torch.arange(3, 12)[None]
    plain.config.save_pretrained(tmp_path)
    model = add_adapters(tiny_model(model_type), ModelSection(path="x", lora=LORA)).eval()
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=draw)
    before = plain(input_ids=ids).logits
    assert torch.equal(without_adapters(model)(input_ids=ids).logits, before)
    weights = {name: w.contiguous() for name, w in named_weights(model, torch.float32)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    after = model(input_ids=ids).logits
    assert (after - before).abs().max() > 0.01
    copied = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (copied(input_ids=ids).logits - after).abs().max() < 1e-6
