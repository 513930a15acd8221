"""Adapters as people have them: each family of files, and all that is done with a model.

The families are made by peft (helpers/adapters.py), and what they compute is peft's own word.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers.adapters import (
    FAMILIES,
    IDS,
    REFUSED,
    adapt,
    edited,
    in_hub_cache,
    make_adapter,
    make_base,
)
from helpers.training_cases import ROWS, prompts_of, quiet, short_config
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.config.load import save_config
from opsd.config.sections import ModelSection
from opsd.data.length_filter import fitting_rows
from opsd.evaluate.subject import Subject
from opsd.models.load import load_model, stop_ids
from opsd.models.teacher import check_teacher, make_teacher
from opsd.plan.architectures import architecture
from opsd.training import checkpoints, run

pytestmark = pytest.mark.usefixtures("no_report")


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_pefts(name, tmp_path):
    """Loaded, copied, saved and loaded by plain transformers; and it trains, whole."""
    wanted = make_adapter(FAMILIES[name], tmp_path)
    path = tmp_path / "adapter"
    model, tokenizer = load_model(ModelSection(path=str(path)))
    scale = wanted.std()
    assert logits_of(model).shape == wanted.shape
    assert (logits_of(model) - wanted).abs().max() < 1e-5 * scale
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits_of(plain) - wanted).abs().max() < 1e-5 * scale
    known = architecture(ModelSection(path=str(path)))
    assert known.vocab_size == wanted.shape[-1]
    assert known.num_hidden_layers == len(model.model.layers)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert known.tie_word_embeddings == model.config.tie_word_embeddings == tied
    own = path if (path / "tokenizer.json").exists() else tmp_path / "base"
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(own).chat_template
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(own))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line(name, tmp_path):
    make_adapter(REFUSED[name], tmp_path)
    with pytest.raises(UserError) as error:
        load_model(ModelSection(path=str(tmp_path / "adapter")))
    said = str(error.value)
    assert REFUSED[name].refused in said and str(tmp_path / "adapter") in said and "\n" not in said


def test_adapters_on_adapters(tmp_path):
    """Three of them, each of another family: the base is resized, then its head saved, then LoRA.
    What is loaded, evaluated and planned is what peft makes step by step."""
    base = make_adapter(FAMILIES["resized, tied"], tmp_path / "1")
    path = tmp_path / "1" / "adapter"
    for number, name in enumerate(["saved head, tied", "DoRA"], start=2):
        model = load_model(ModelSection(path=str(path)))[0]
        place = tmp_path / str(number)
        wanted = adapt(model, FAMILIES[name], place / "adapter", path)
        path = place / "adapter"
    assert (wanted - base).abs().max() > 0.1
    section = ModelSection(path=str(path))
    model, tokenizer = load_model(section)
    assert (logits_of(model) - wanted).abs().max() < 1e-5 * wanted.std()
    assert "<step>" in tokenizer.get_vocab()  # the nearest that brings a tokenizer
    subject = Subject(str(path))
    assert (logits_of(subject.load()) - wanted).abs().max() < 1e-5 * wanted.std()
    assert subject.config.vocab_size == len(tokenizer) == architecture(section).vocab_size
    before = subject.digest
    make_base(tmp_path / "1" / "base", initializer_range=0.5)
    assert Subject(str(path)).digest != before  # another base is another model


def test_each_file_is_the_nearest_adapters(tmp_path):
    make_adapter(FAMILIES["own template"], tmp_path)
    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    section = ModelSection(path=str(tmp_path / "adapter"))
    model, tokenizer = load_model(section)
    assert tokenizer.chat_template == FAMILIES["own template"].template
    assert stop_ids(model, tokenizer) == Subject(section.path).stops
    assert stop_ids(model, tokenizer) >= {2, 7}
    (tmp_path / "adapter/generation_config.json").write_text('{"eos_token_id": 9}')
    model, tokenizer = load_model(section)
    assert stop_ids(model, tokenizer) == Subject(section.path).stops
    assert stop_ids(model, tokenizer) & {2, 7, 9} == {9} | {tokenizer.eos_token_id} & {2, 7}
    (tmp_path / "adapter/generation_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_model(section)


@pytest.mark.parametrize("name", ["own template", "resized, tied"])
def test_on_the_hub(name, tmp_path, monkeypatch):
    """An adapter and its base in the hub's cache, offline; the base by its revision."""
    wanted = make_adapter(FAMILIES[name], tmp_path)
    edited(base_model_name_or_path="some/base", revision="main")(tmp_path / "adapter")
    for place in ("base", "adapter"):
        in_hub_cache(tmp_path / place, tmp_path / "cache", f"some/{place}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    section = ModelSection(path="some/adapter")
    model, tokenizer = load_model(section)
    assert (logits_of(model) - wanted).abs().max() < 1e-5 * wanted.std()
    subject = Subject("some/adapter")
    assert subject.tokenizer.chat_template == tokenizer.chat_template
    assert (logits_of(subject.load()) - wanted).abs().max() < 1e-5 * wanted.std()
    assert subject.digest != Subject("some/base").digest
    assert architecture(section).vocab_size == wanted.shape[-1]
    edited(base_model_name_or_path="some/base", revision="gone")(tmp_path / "adapter")
    with pytest.raises(UserError, match="an adapter of 'some/base'"):
        load_model(ModelSection(path=str(tmp_path / "adapter")))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, 1e-300])
def test_a_damaged_adapter_is_found_when_it_is_loaded(value, tmp_path):
    make_adapter(FAMILIES["plain"], tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    damage(file, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", value)
    with pytest.raises(UserError, match=f"q_proj.lora_A.weight in '{file}'"):
        load_model(ModelSection(path=str(tmp_path / "adapter")))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300, 1e-300])
def test_a_damaged_model_is_found_when_it_is_loaded(value, tmp_path):
    make_base(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    damage(file, "model.layers.1.input_layernorm.weight", value)
    with pytest.raises(UserError, match=f"layers.1.input_layernorm.weight in '{file}'"):
        load_model(ModelSection(path=str(tmp_path / "base")))


def damage(file, name, value):
    """All numbers of a tensor are `value`, in fp64."""
    state = load_file(file)
    state[name] = torch.full_like(state[name], value, dtype=torch.float64)
    save_file(state, file, metadata={"format": "pt"})


RUN = {"eval": {"problems": 2, "samples": 1}, "train": {"learning_rate": 1e-2, "save_every": 2}}


@pytest.mark.parametrize(("name", "lora"), [("resized, tied", None), ("tied head", {"rank": 2})])
def test_a_run_from_an_adapter(name, lora, files, tmp_path, capsys):
    """Planned, trained (whole, or by another adapter), resumed, evaluated; what is saved loads by
    peft and by us to the logits of the trained model."""
    start = make_adapter(FAMILIES[name], tmp_path)
    model = {"path": str(tmp_path / "adapter"), "lora": lora}
    config = short_config("", files[1], tmp_path / "run", **RUN | {"model": model})
    save_config(config, tmp_path / "c.yaml")
    assert main(["train", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    trained = []
    save = checkpoints.save_model

    def record(model, tokenizer, directory, name="model", *rest, **more):
        if name == "model":
            trained.append(logits_of(model.eval()))
        return save(model, tokenizer, directory, name, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save_model", record)
        assert main(["train", str(tmp_path / "c.yaml")]) == 0
    saved = tmp_path / "run" / "model"
    assert (trained[0] - start).abs().max() > 0.01
    loader = AutoModelForCausalLM if lora is None else AutoPeftModelForCausalLM
    for again in (loader.from_pretrained(saved), load_model(ModelSection(path=str(saved)))[0]):
        assert (logits_of(again.eval()) - trained[0]).abs().max() < 1e-5 * start.std()
    weights = next(saved.glob("*model.safetensors"))
    first = load_file(weights)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["train", str(tmp_path / "c.yaml"), "--resume"]) == 0
    assert all(torch.equal(first[key], tensor) for key, tensor in load_file(weights).items())
    arguments = ["--benchmark", str(files[1]), "--problems", "2", "--samples", "1"]
    arguments += ["--temperature", "0", "--max-new-tokens", "4", "--output", str(tmp_path / "e")]
    assert main(["eval", str(saved), *arguments]) == 0
    lengths = ["--prompt-tokens", "9", "--solution-tokens", "9", "rollout.max_new_tokens=9"]
    assert main(["plan", str(saved), *lengths]) == 0
    capsys.readouterr()


def test_an_adapter_teaches(files, tmp_path):
    make_adapter(FAMILIES["resized, tied"], tmp_path)  # with tokens of its own
    base = {"path": str(tmp_path / "base")}
    teacher = {"policy": "model", "path": str(tmp_path / "adapter")}
    config = short_config("", files[1], tmp_path / "run", model=base, teacher=teacher)
    student, tokenizer = load_model(config.model)
    what = config.teacher, config.model, student.config, tokenizer
    assert check_teacher(*what) == ["</step>", "<step>"]
    made, _ = make_teacher(config.teacher, config.model, torch.float32, student, tokenizer, student)
    alone = load_model(ModelSection(path=teacher["path"]))[0]
    assert torch.equal(logits_of(made), logits_of(alone))


def test_no_new_adapter_on_the_hub_without_its_base(files, tmp_path):
    make_adapter(FAMILIES["plain"], tmp_path)
    model = {"path": str(tmp_path / "adapter"), "lora": {"rank": 2}}
    output = {"push_to_hub": "me/new"}
    config = short_config("", files[1], tmp_path / "run", model=model, output=output)
    with pytest.raises(UserError, match=r"set output\.merge: true"):
        run.run(config, *load_model(config.model), ROWS, [], None, quiet())


@pytest.mark.parametrize("window", [256, None])
def test_a_tokenizer_with_more_tokens_than_rows(window, tmp_path):
    """Gemma 3 1B's shape: an image token without a row. Only a text that has it is an error."""
    model = make_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    rows = len(model.get_input_embeddings().weight)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "base")
    _, tokenizer = load_model(ModelSection(path=str(tmp_path / "base")))
    assert len(tokenizer) == rows + 1 == tokenizer.embedding_rows + 1
    prompts, said = prompts_of(tokenizer), []
    asked = (prompts, ["student", "teacher"], 4, window, said.append)
    assert fitting_rows(ROWS, *asked) == ROWS
    bad = replace(ROWS[2], problem="1 <image> 2")
    with pytest.raises(UserError, match=r"data.source: row 3 \('1 <image> 2'\): its text has '<im"):
        fitting_rows([*ROWS[:2], bad, *ROWS[3:]], *asked)
