"""`opsd plan`: sizes that are published, tokens counted by hand, memory against measured peaks."""

import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
import yaml
from helpers.training_cases import short_values
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from opsd.cli.main import main
from opsd.cli.plan_arguments import _bytes, gpu_of, machine_of
from opsd.common.errors import UserError
from opsd.config.load import merge, parse_config
from opsd.config.sections import ModelSection
from opsd.plan.architectures import architecture
from opsd.plan.known_models import KNOWN
from opsd.plan.memory import RUNTIME, Planner, count_parameters
from opsd.plan.workload import Lengths, count_tokens, sample_groups
from opsd.quickstart import tiny_model as tiny

PUBLISHED = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
}
"""Parameters, as the models' safetensors on the hub have them."""


def test_known_models_have_their_published_sizes():
    assert len(PUBLISHED) == len(KNOWN)
    for name, parameters in PUBLISHED.items():
        assert count_parameters(architecture(ModelSection(path=name))) == parameters, name


def config_of(**sections):
    values = {"model": {"path": "Qwen/Qwen3-0.6B"}, "data": {"source": "none"}}
    return parse_config(merge(values, sections))


def test_tokens_of_a_step():
    lengths = Lengths(prompt=10, solution=100, rollout=20)
    rollout = {"group_size": 4, "max_new_tokens": 20}
    config = config_of(rollout=rollout, train={"problems_per_step": 3})
    tokens = count_tokens(config, sample_groups(config, lengths), lengths)
    assert tokens.generated == tokens.trained == 3 * 4 * 20
    # The last token of a rollout is only a target.
    assert tokens.alone == 3 * 4 * (10 + 19) + 3 * 4 * (110 + 19)
    assert tokens.student == 3 * (10 + 4 * 19) and tokens.teacher == 3 * (110 + 4 * 19)
    assert tokens.shared == tokens.student + tokens.teacher
    config = config_of(rollout=rollout, train={"problems_per_step": 3}, teacher={"policy": "live"})
    live = count_tokens(config, sample_groups(config, lengths), lengths)
    assert live.teacher == 3 * (100 + 4 * 19)
    config = config_of(method="sft", train={"problems_per_step": 3})
    sft = count_tokens(config, sample_groups(config, lengths), lengths)
    assert sft.generated == 0 and sft.trained == 3 * 100 and sft.shared == 3 * (10 + 99)
    config = config_of(method="grpo", rollout=rollout, train={"problems_per_step": 3})
    grpo = count_tokens(config, sample_groups(config, lengths), lengths)
    assert grpo.shared == 3 * (10 + 4 * 19) and grpo.teacher == 0


def test_a_plan_shows_the_blocks_of_the_loss(capsys):
    """In 16 bits two levels: fp32 logits of 256 tokens, and one product with the gradients of as
    many as the budget holds; in little memory, tiles of the vocabulary."""
    width, vocabulary, tokens = 4096, 151_936, 3 * 1024
    model = ("Qwen/Qwen3-8B", "--gpu", "h200")

    def loss(budget: int) -> dict:
        return planned(*model, f"loss.memory_budget={budget}", capsys=capsys)["loss"]

    default = planned(*model, capsys=capsys)["loss"]
    assert (default["rows"], default["group"], default["groups"]) == (256, tokens, 1)
    small, tiles = loss(1_000_000_000), loss(64_000_000)
    most = (1_000_000_000 - 256 * 2 * 4 * vocabulary) // (2 * vocabulary + 4 * width)
    assert small["rows"] <= 256 and small["groups"] == -(-tokens // most) > 1
    assert small["group"] == -(-tokens // small["groups"])
    assert not tiles["one_pass"] and tiles["columns"] < vocabulary

    def shown(*arguments: str) -> str:
        assert main(["plan", *model, *arguments]) == 0
        return capsys.readouterr().out

    assert re.search(r"the loss: a block of logits +256\n.*head's gradient +3,072\n", shown())
    columns = f"the loss: a block of logits, {tiles['columns']:,} entries at a time"
    assert columns in shown("loss.memory_budget=64000000")
    assert "head's gradient" not in shown("model.lora={}")


def test_a_mixture_is_planned_by_its_members():
    """A copy of each member's weights, the same ones once; contexts that start alike run once."""
    lengths, own = Lengths(prompt=10, solution=100, rollout=20), {"context": "student"}
    one, two, three = (
        config_of(train={"problems_per_step": 3}, teacher={"mix": mix})
        for mix in ([{}], [{}, own], [{}, own, {"policy": "ema"}])
    )
    configs = one, two, three
    plans = [Planner(SHAPES["wide"], lengths, None).memory(config) for config in configs]
    first, second, third = (plan.always["teacher"] for plan in plans)
    assert first == second and third == first + plans[0].always["weights"]
    # The kernel sweeps heads that differ as one of their widths together.
    kernel = [plan.step["logits (kernel)"] for plan in plans]
    assert kernel[0] == kernel[1] <= kernel[2]
    tokens = [count_tokens(c, sample_groups(c, lengths), lengths).teacher for c in configs]
    assert tokens == [3 * (110 + 19), 3 * (110 + 19 + 19), 3 * (110 + 19 + 19 + 110 + 19)]
    for method, loss, context in (("grpo", {"distil": 1}, 110), ("distill", {}, 10)):
        size, steps = {"group_size": 2}, {"problems_per_step": 3}
        mix = {"mix": [{"policy": "ema"}, own]}
        config = config_of(method=method, loss=loss, rollout=size, train=steps, teacher=mix)
        assert Planner(SHAPES["wide"], lengths, None).memory(config).always["teacher"]
        tokens = count_tokens(config, sample_groups(config, lengths), lengths).teacher
        assert tokens == 3 * (context + 10 + 4 * 19)


# Peaks, measured on processes of their own.


def _qwen3(layers: int, vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )


SHAPES = {
    "wide": _qwen3(layers=4, vocabulary=32768),
    "adapters": _qwen3(layers=8, vocabulary=16384),
    "deep": LlamaConfig(
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=24,
        num_attention_heads=5,
        num_key_value_heads=5,
        vocab_size=8192,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    ),
}
RUNS = {
    "wide": {
        "rollout": {"group_size": 2, "max_new_tokens": 30, "batch_size": 8},
        "train": {"precision": "bf16", "micro_batch_tokens": 1000, "problems_per_step": 2},
    },
    "adapters": {
        "model": {"lora": {"rank": 32}},
        "rollout": {"group_size": 4, "max_new_tokens": 60, "batch_size": 8},
        "train": {"precision": "fp32", "micro_batch_tokens": 2000, "problems_per_step": 2},
    },
    "deep": {
        "method": "sft",
        "train": {"precision": "fp32", "micro_batch_tokens": 1500, "problems_per_step": 2},
    },
}
PROBLEM, SOLUTION = 60, 400  # characters, which are tokens here


@pytest.mark.parametrize("name", ["wide", "deep"])
def test_a_sampler_on_a_cpu_holds_packed_weights(name, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16)
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    config = write_run(SHAPES[name], RUNS["wide"], tmp_path)

    def sampling(device_memory):
        planner = Planner(architecture(config.model), Lengths(60, 400, 30), device_memory)
        return planner.memory(config).sampling["rollouts"]

    held, on_a_gpu = sampling(None), sampling(24e9)
    monkeypatch.setattr("opsd.rollout.decoding.MOST_PACKED", 0)
    assert held - sampling(None) == sum(layer.weight.nbytes for layer in layers)
    assert sampling(24e9) == on_a_gpu


@pytest.mark.parametrize("name", ["wide", "adapters"])
def test_planned_peaks_are_the_measured_ones(name, tmp_path):
    config = write_run(SHAPES[name], RUNS[name], tmp_path)
    _, usage = run_opsd("train", str(tmp_path / "config.yaml"))
    measured = usage["bytes"]
    # Three special tokens around a message, one that ends a turn.
    lengths = Lengths(PROBLEM + 3, SOLUTION + 1, config.rollout.max_new_tokens)
    planned = Planner(architecture(config.model), lengths, None).memory(config)
    assert planned.peak == pytest.approx(measured, rel=0.15), planned
    # And without what is the same for all: Python, torch and other libraries.
    assert planned.peak - RUNTIME == pytest.approx(measured - RUNTIME, rel=0.25), planned


def test_adapters_are_planned_as_they_are_trained():
    """Frozen weights in bf16, no second teacher, and gradients and moments of adapters alone."""
    student = architecture(ModelSection(path="Qwen/Qwen3-8B"))
    planner = Planner(student, Lengths(), int(80e9))
    whole = config_of(model={"path": "Qwen/Qwen3-8B"})
    lora = config_of(model={"path": "Qwen/Qwen3-8B", "lora": {"rank": 64}})
    # Seven linear layers a block, each with rank · (in + out).
    ends = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *[(4096, 12288)] * 3]
    adapters = 36 * 64 * sum(a + b for a, b in ends)
    assert planner.sizes(lora).train == adapters
    memory = planner.memory(lora)
    assert memory.always["weights, frozen"] == 2 * 8_190_735_360
    assert memory.always["adapters"] == memory.step["gradients"] == 4 * adapters
    assert memory.always["optimizer"] == 8 * adapters
    assert "teacher" not in memory.always and "weights that decode" not in memory.always
    assert memory.peak < 0.4 * planner.memory(whole).peak
    four_bits = config_of(model={"path": "Qwen/Qwen3-8B", "lora": {"quantize": "nf4"}})
    saved = memory.always["weights, frozen"] - planner.memory(four_bits).always["weights, frozen"]
    in_blocks = 8_190_735_360 - 2 * 151936 * 4096
    assert saved == pytest.approx((2 - 0.516) * in_blocks, rel=1e-3)


def test_split_weights_are_planned_a_process():
    student, lengths = architecture(ModelSection(path="Qwen3-0.6B")), Lengths()
    config = config_of(train={"sharding": "fsdp2"})
    one = Planner(student, lengths, int(80e9)).memory(config_of())
    four = Planner(student, lengths, int(80e9), 4).memory(config)
    for name in ("weights", "optimizer"):
        assert four.always[name] == one.always[name] // 4
    assert four.step["gradients"] == one.step["gradients"] // 4
    assert four.always["teacher"] == one.always["teacher"]


def test_zero_splits_the_optimizer_and_gradients():
    """DeepSpeed's optimizer has fp32 weights of its own."""
    student = architecture(ModelSection(path="Qwen3-0.6B"))
    one = Planner(student, Lengths(), int(80e9)).memory(config_of())
    for sharding, gradients, weights in (("zero1", 1, 1), ("zero2", 4, 1), ("zero3", 4, 4)):
        four = Planner(student, Lengths(), int(80e9), 4)
        memory = four.memory(config_of(train={"sharding": sharding}))
        assert memory.always["weights"] == one.always["weights"] // weights
        optimizer = one.always["optimizer"] + 4 * four.sizes(config_of()).train
        assert memory.always["optimizer"] == optimizer // 4
        assert memory.step["gradients"] == one.step["gradients"] // gradients


def write_run(shape, sections, directory):
    """A random model of this shape, rows of known lengths and a config of two steps; the config."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    shape.eos_token_id = tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(shape).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    rows = [
        {"problem": f"{n:0{PROBLEM}}", "solution": f"{n:0{SOLUTION}}", "answer": str(n)}
        for n in range(8)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "prompts": {"student": "{{ problem }}", "teacher": "{{ problem }}{{ solution }}"},
        "train": {"steps": 2, "save_every": 0},
        "eval": {"problems": 0},
    }
    values = short_values(directory / "model", directory / "rows.jsonl", directory / "run")
    values = merge(merge(values, common), sections)
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    return parse_config(values)


OPSD = """
import json, sys, time
start = time.process_time()
from opsd.cli.main import main
from opsd.cli.plan_arguments import _bytes, gpu_of
from opsd.common.errors import UserError
from transformers import PreTrainedModel  # takes most of a short command's time
imported = time.process_time()
assert main(sys.argv[1:]) == 0
from opsd.common.system import peak_memory
usage = {"imports": imported - start, "seconds": time.process_time() - imported}
print(json.dumps({"bytes": peak_memory(), **usage}))
"""


def run_opsd(*arguments: str) -> tuple[str, dict[str, float]]:
    """What `opsd …` prints, the most memory, and the processor time of its imports and its work."""
    command = [sys.executable, "-P", "-c", OPSD, *arguments]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    *lines, usage = printed.splitlines()
    return "\n".join(lines), json.loads(usage)


# The command.


@pytest.fixture(autouse=True, scope="module")
def share_measurements():
    """Planners of one model and workload measure a config once, whichever test asks first."""
    known: dict[tuple, dict] = defaultdict(dict)

    def made(self, student, lengths, device_memory, processes=1):
        initialise(self, student, lengths, device_memory, processes)
        model = student.to_json_string(use_diff=False)
        self._known = known[model, lengths, device_memory, processes]

    initialise = Planner.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "__init__", made)
        yield


def planned(*arguments: str, capsys) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "Plan a step" in printed.err  # what takes long says so, beside the JSON
    assert ("Search for what fits" in printed.err) == ("to_fit" in found)
    return found


@pytest.mark.parametrize(
    "text, name, count",
    [
        ("h100x8", "H100", 8),
        ("8xH100", "H100", 8),
        ("2 x 24G", "GPU of 24 GB", 2),
        ("4090", "4090", 1),
        ("H100:4", "H100", 4),
        ("4090x2", "4090", 2),
        ("2x4090,", "4090", 2),
        ("24Gx2", "GPU of 24 GB", 2),
    ],
)
def test_several_gpus_in_one_word(text, name, count):
    gpu, counted = machine_of(text, "--gpu")
    assert (gpu.name, counted) == (name, count)


def test_the_paper_8b_model_is_planned_in_seconds_and_without_weights():
    """Against the imports of torch and transformers, 3 to 10 s: a busy machine slows both."""
    printed, usage = run_opsd("plan", "Qwen/Qwen3-8B", "--json")
    found = json.loads(printed)
    assert found["parameters"] == 8_190_735_360
    assert found["memory"]["always"]["weights"] == 4 * 8_190_735_360
    assert usage["seconds"] < 0.75 * usage["imports"]
    assert usage["bytes"] < 2e9  # of 33 GB of weights


def test_changes_that_fit_a_memory(capsys):
    model = "Qwen/Qwen3-0.6B"
    whole = planned(model, "--gpu", "h100", capsys=capsys)
    assert whole["fits"] and "to_fit" not in whole
    room = 0.75 * whole["memory"]["peak"]
    small = planned(model, "--memory", f"{room / 1e6:.0f}MB", "--gpu", "h100", capsys=capsys)
    fitting = small["to_fit"]
    assert not small["fits"] and fitting["fits"] and fitting["changes"]
    again = planned(model, *fitting["overrides"], "--gpu", "h100", capsys=capsys)
    assert again["memory"]["peak"] == fitting["peak"] <= room
    for left_out in fitting["overrides"]:
        rest = [o for o in fitting["overrides"] if o != left_out]
        fewer = planned(model, *rest, "--gpu", "h100", capsys=capsys)
        # Both batch sizes are one change.
        assert fewer["memory"]["peak"] > room or "batch_size" in left_out, left_out
    never = planned(model, "--memory", "2GB", capsys=capsys)
    assert not never["to_fit"]["fits"] and never["to_fit"]["peak"] > 2e9


@pytest.mark.parametrize(
    "text, name, memory",
    [
        *[(text, "4090", 24e9) for text in ("4090", "rtx4090", "RTX 4090", "GeForce RTX-4090")],
        *[(text, "A100", 80e9) for text in ("a100", "A100-80GB", "a100-sxm4-80gb", "A100 80G")],
        *[(text, "A100-40", 40e9) for text in ("a100-40", "A100-40GB", "a100 pcie 40gb")],
        *[(text, "GPU of 24 GB", 24e9) for text in ("24", "24G", "24GB", "24 gb", "24.0G")],
        ("NVIDIA H100-SXM5-80GB", "H100", 80e9),
        ("H200", "H200", 141e9),
        *[(text, "A10G", 24e9) for text in ("a10g", "NVIDIA A10G", "A10G-24GB")],
        *[(text, "A10", 24e9) for text in ("a10", "A10 24G")],
        ("RTX 6000 Ada", "6000-ADA", 48e9),
        ("RTX A6000", "A6000", 48e9),
        ("Tesla T4", "T4", 16e9),
        *[(text, "4070-TI", 12e9) for text in ("RTX 4070 Ti", "4070ti", "rtx4070-ti-12gb")],
        ("GeForce RTX 3060", "3060", 12e9),
        ("V100-SXM2-16GB", "V100-16", 16e9),
        ("4090-48GB", None, None),
        ("tpu", None, None),
        ("2080", None, None),
        ("0", None, None),
    ],
)
def test_gpus_by_the_names_that_people_type(text, name, memory):
    if name is None:
        with pytest.raises(UserError, match=f"--gpu is '{text}': it must be one of b200"):
            gpu_of(text)
    else:
        found = gpu_of(text)
        assert (found.name, found.memory) == (name, memory)
        assert bool(found.operations) == (not name.startswith(("GPU", "T4", "V100")))
    if name and name.startswith("GPU"):
        assert _bytes(text) == memory


def test_the_readmes_model_on_a_small_gpu_without_peft(monkeypatch, capsys):
    """What a plan needs is in the documented install; what it advises can be pasted."""
    monkeypatch.setitem(sys.modules, "peft", None)
    command = ["plan", "Qwen/Qwen3-8B", "--gpu", "rtx4090"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Memory" in shown and "Tokens a step" in shown and "Time on one 4090" in shown
    assert "Search for what fits into 24 GB" in shown
    advice, pasted = shown.rstrip().splitlines()[-2:]
    assert advice.startswith("To fit into 24 GB (peak ") and "steps in" in advice
    assert main([*command, *shlex.split(pasted)]) == 0
    assert "It fits into 24 GB." in capsys.readouterr().out


def test_trials_that_are_refused_are_left_out(capsys):
    """vLLM takes no weights in 4 bits: QLoRA is no advice there."""
    vllm = ("rollout.engine=vllm", "rollout.gpu_memory=0.2")
    found = planned("Qwen/Qwen3-8B", *vllm, "--gpu", "24G", capsys=capsys)
    assert "LoRA" in found["to_fit"]["changes"] and "estimate" not in found
    assert main(["plan", "Qwen/Qwen3-32B", *vllm, "--gpu", "4090"]) == 0
    shown = capsys.readouterr().out
    assert "Memory" in shown and "It does not fit into 24 GB: even with" in shown


def test_time_is_arithmetic_on_what_the_gpu_is_said_to_do(capsys):
    fast, slow = (
        planned("Qwen3-0.6B", "--gpu", gpu, capsys=capsys)["estimate"] for gpu in ("h100", "3090")
    )
    assert fast["student_flops"] == slow["student_flops"]
    ratio = slow["training_seconds"] / fast["training_seconds"]
    assert ratio == pytest.approx(989 / 71)
    # 6 operations a parameter and token, 2 of them forward; attention's come on top.
    tokens = planned("Qwen3-0.6B", capsys=capsys)["tokens"]
    body, head = 596_049_920 - 151936 * 1024, 151936 * 1024
    least = 6 * body * tokens["student"] + 6 * head * tokens["trained"]
    assert least < fast["student_flops"] < 1.5 * least


def test_a_config_and_a_local_model_are_planned(tmp_path, monkeypatch, capsys):
    write_run(SHAPES["deep"], RUNS["deep"], tmp_path)
    capsys.readouterr()  # deepspeed's words, where writing the model imports it first
    from_config = planned(str(tmp_path / "config.yaml"), capsys=capsys)
    assert from_config["tokens"]["generated"] == 0  # sft
    directory = planned(str(tmp_path / "model"), "method=sft", capsys=capsys)
    file = planned(str(tmp_path / "model" / "config.json"), "method=sft", capsys=capsys)
    assert directory["parameters"] == file["parameters"] == from_config["parameters"]
    assert directory["memory"] == file["memory"] != from_config["memory"]
    monkeypatch.setattr("opsd.cli.plan.installed", lambda: (10**8, 10**8))
    assert main(["plan", str(tmp_path / "config.yaml")]) == 0
    assert "This machine has 100 MB: `opsd plan … --memory SIZE`" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "config.yaml"), "--gpu", "4090"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "Memory",
        "peak",
        "Tokens a step",
        "Time on one 4090",
        "not a measurement",
        "fits",
    ):
        assert word in shown, word


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nobody/nothing"], "model.path is 'nobody/nothing': neither a model directory"),
        (["/tmp"], "model.path is '/tmp': a directory without config.json"),
        (["no.yaml"], "CONFIG is 'no.yaml': no such file"),
        (["Qwen3-8B", "--gpu", "tpu"], "--gpu is 'tpu': it must be one of b200, h200"),
        (
            ["Qwen3-8B", "--memory", "24 cows"],
            "--memory is '24 cows': it must be a size such as 24GB",
        ),
        (["Qwen3-8B", "--memory", "0GB"], "--memory is '0GB'"),
        (["Qwen3-8B", "--prompt-tokens", "0"], "--prompt-tokens is 0"),
        (["Qwen3-8B", "train.stps=3"], "did you mean 'steps'?"),
        (["Qwen3-8B", "rollout.engine=vllm"], "rollout.engine is 'vllm': name the GPU with --gpu"),
        (
            ["Qwen3-8B", "train.sharding=fsdp2"],
            "train.sharding is 'fsdp2': give the number of GPUs with --gpus",
        ),
        (["Qwen3-8B", "--gpus", "0"], "--gpus is 0"),
        (["Qwen3-8B", "--prompt-tokens", "40000"], "42024 together: the model's window is 40960"),
        (["Qwen3-8B", "--solution-tokens", "40000"], "40960; --solution-tokens 39736 fits"),
    ],
)
def test_what_cannot_be_planned(arguments, said, capsys):
    assert main(["plan", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_a_plan_does_not_touch_the_training_code():
    """What the trace puts in place of attention is gone after it."""
    from opsd.prefix import attention, packed_forward

    assert packed_forward.packed_attention is attention.packed_attention
