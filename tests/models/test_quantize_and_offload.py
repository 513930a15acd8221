"""Teachers in less memory: 8 bits, or layers that the CPU keeps; and larger padded vocabularies."""

import pytest
import torch
from helpers.lines import read_lines
from helpers.prefix_models import make
from helpers.training_cases import short_config, write_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.precision import compute_dtype
from opsd.config.load import save_config
from opsd.models.load import load_model
from opsd.models.offload import decoder_layers, offload
from opsd.models.quantize import Int8Linear, quantize
from opsd.models.teacher import make_teacher
from opsd.prefix import rollout_hidden_states

GROUPS = [([5, 6, 7, 8], [[9, 10, 11], [4, 3]])]


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_eight_bits_round_to_half_a_step(dtype, bias):
    torch.manual_seed(0)
    layer = nn.Linear(33, 17, bias=bias).to(dtype)
    layer.weight.data[3] = 0  # a row of zeros stays one
    rounded = Int8Linear(layer)
    states = torch.randn(5, 33, dtype=dtype)
    step = layer.weight.float().abs().amax(1) / 127
    # The rounding, and what the scale and the products round in this dtype.
    eps = torch.finfo(dtype).eps
    bound = (step / 2 + 2 * eps * 127 * step) * states.float().abs().sum(1, keepdim=True)
    exact = layer.float()(states.float())
    assert ((rounded(states).float() - exact).abs() <= bound + 2 * eps * exact.abs() + 1e-6).all()
    assert rounded.weight.dtype == torch.int8 and rounded.weight.abs().max() == 127


def test_a_model_in_eight_bits_is_close_and_small():
    model, plain = make("Qwen3"), make("Qwen3")
    before = sum(p.numel() * p.element_size() for p in model.get_decoder().layers.parameters())
    quantize(model)
    layers = model.get_decoder().layers
    after = sum(t.numel() * t.element_size() for t in [*layers.parameters(), *layers.buffers()])
    assert after < 0.35 * before
    with torch.no_grad():
        states = [rollout_hidden_states(m, GROUPS) for m in (model, plain)]
    difference = (states[0] - states[1]).abs().max() / states[1].abs().max()
    assert 0 < difference < 0.05


def test_experts_that_are_not_linear_layers_are_not_quantized():
    """transformers holds all experts of a layer in one tensor."""
    with pytest.raises(
        UserError,
        match=r"is 'int8': it is for plain linear layers, and only \d+% ",
    ):
        quantize(make("Qwen3Moe"))


def test_a_layer_is_on_the_device_only_while_it_runs():
    """On the meta device, which computes shapes: a layer that were left behind would raise."""
    model = make("Qwen3")
    before = [p.clone() for layer in decoder_layers(model) for p in layer.parameters()]
    offload(model, "meta")
    seen = []
    for layer in decoder_layers(model):
        layer.mlp.register_forward_hook(
            lambda module, inputs, output: seen.append(
                [all(p.is_meta for p in other.parameters()) for other in decoder_layers(model)]
            )
        )
    with torch.no_grad():
        ids = torch.ones(1, 4, dtype=torch.long, device="meta")
        # Without a mask to make, which looks at values.
        places = {"position_ids": ids, "attention_mask": {"full_attention": None}}
        assert model(ids, use_cache=False, **places).logits.is_meta
    count = len(decoder_layers(model))
    assert seen == [[i == j for j in range(count)] for i in range(count)]
    after = [p for layer in decoder_layers(model) for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.lm_head.weight.is_meta and model.get_decoder().norm.weight.is_meta


@pytest.mark.parametrize("policy", ["initial", "model"])
def test_a_teacher_in_eight_bits_teaches(policy, files, tmp_path):
    teacher = {"policy": policy, "quantize": "int8"}
    if policy == "model":
        teacher["path"] = str(files[0])
    config = short_config(
        *files,
        tmp_path / "run",
        teacher=teacher,
        train={"steps": 2, "save_every": 0, "precision": "bf16"},
        eval={"problems": 1, "every": 0, "samples": 1},
    )
    model, tokenizer = load_model(config.model)
    made, _ = make_teacher(
        config.teacher, config.model, compute_dtype(config.train.precision), model, tokenizer, model
    )
    assert any(isinstance(m, Int8Linear) for m in made.modules())
    assert not any(isinstance(m, Int8Linear) for m in model.modules())
    save_config(config, tmp_path / "config.yaml")
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["divergence"] > 0 for line in lines)


def test_a_teacher_with_a_larger_padded_vocabulary_teaches_alike(files, tmp_path):
    """The same weights, with rows of noise behind those of the vocabulary: the same losses."""
    base = AutoModelForCausalLM.from_pretrained(files[0], dtype=torch.float32)
    config = Qwen3Config(**{**base.config.to_dict(), "vocab_size": base.config.vocab_size + 70})
    config.tie_word_embeddings = False
    torch.manual_seed(3)
    padded = Qwen3ForCausalLM(config)
    state = padded.state_dict()
    for name, value in base.state_dict().items():
        state[name][: len(value)] = value
    padded.load_state_dict(state)
    write_model(tmp_path / "wider")
    padded.save_pretrained(tmp_path / "wider")
    losses = []
    for name, path in (("plain", files[0]), ("padded", tmp_path / "wider")):
        run = short_config(
            *files,
            tmp_path / name,
            teacher={"policy": "model", "path": str(path)},
            train={"steps": 2, "save_every": 0},
            eval={"problems": 1, "every": 0, "samples": 1},
        )
        save_config(run, tmp_path / f"{name}.yaml")
        assert main(["train", str(tmp_path / f"{name}.yaml")]) == 0
        losses.append([line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][0] > 0


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["teacher.policy=live", "teacher.quantize=int8"], "teacher.quantize is 'int8': it is for"),
        (["teacher.policy=ema", "teacher.offload=true"], "teacher.offload is true: it is for"),
        (["teacher.offload=true"], "teacher.offload is true: there is no GPU"),
    ],
)
def test_what_saves_nothing_is_one_line(overrides, wanted, files, tmp_path, capsys):
    save_config(short_config(*files, tmp_path / "run"), tmp_path / "config.yaml")
    assert main(["train", str(tmp_path / "config.yaml"), *overrides]) == 1
    assert wanted in capsys.readouterr().err.splitlines()[-1]


def test_a_quantised_base_does_not_train_whole(tmp_path, monkeypatch):
    write_model(tmp_path)
    monkeypatch.setattr(Qwen3ForCausalLM, "is_quantized", True, raising=False)
    config = short_config(tmp_path, tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"its weights are quantised.*set model\.lora"):
        load_model(config.model)
    load_model(config.model, name="teacher")
    load_model(short_config(tmp_path, tmp_path, tmp_path, model={"lora": {"rank": 2}}).model)
