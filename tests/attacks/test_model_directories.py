"""Model directories as they come: damaged, of parts that do not fit, of another's files. What is
loaded is what the files hold, by safetensors and by peft; all else is refused in one line."""

import json
import os
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from helpers.model_attacks import attack, edit
from helpers.mutations import LFS, Clock, one_line
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opsd.common.errors import UserError
from opsd.config.sections import ModelSection, PromptsSection
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.evaluate.subject import Subject
from opsd.models.load import load_model, load_tokenizer, stop_ids, window
from opsd.plan.architectures import architecture
from opsd.quickstart.tiny_model import STUDENT_PROMPT, TEACHER_PROMPT, make_tokenizer
from opsd.rollout import GenerateSampler, Sampling

ROW = Row("12+7;5*8", "19=12+7,40=5*8", "19;40", {})


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Directories by name: a tied model, an untied one in shards, an adapter of the first."""
    place, tokenizer = tmp_path_factory.mktemp("good"), make_tokenizer()
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {**SIZES, **ids, "vocab_size": len(tokenizer), "bos_token_id": None}
    tied = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    tied.save_pretrained(place / "tied")
    untied = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    untied.to(torch.bfloat16).save_pretrained(place / "sharded", max_shard_size="4KB")
    for name in ("tied", "sharded"):
        tokenizer.save_pretrained(place / name)
    lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    adapted = peft.get_peft_model(tied, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(place / "adapter")
    config = place / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_model_name_or_path": str(place / "tied")}))
    return {path.name: path for path in place.iterdir()}


def used(directory: Path) -> ModelSection:
    """The model as `opsd train` and `opsd eval` take it in. Raises UserError."""
    section = ModelSection(path=str(directory))
    config = architecture(section)
    tokenizer = load_tokenizer(section)
    subject = Subject(str(directory))
    assert subject.digest
    model, tokenizer = load_model(section)
    prompts = Prompts(PromptsSection(student=STUDENT_PROMPT, teacher=TEACHER_PROMPT), tokenizer)
    context = prompts.context(ROW)
    longest = window(config)
    if longest is not None and longest < 200:
        raise UserError(f"{directory}: the window")
    if longest is not None and len(context.student) > longest:
        raise UserError(f"{directory}: a problem is longer than the window, as a run says too")
    written = directory / "tokenizer.json"
    if written.is_file():
        theirs = Tokenizer.from_file(str(written))
        theirs.no_padding()  # to 10^9 tokens, it may say; who asks for none gets none
        theirs.no_truncation()
        # The config's special tokens are made where they are not there.
        theirs.add_special_tokens([*tokenizer.all_special_tokens])
        text = prompts.chats["student"].context(prompts.render(ROW, "student"))
        assert theirs.encode(text, add_special_tokens=False).ids == context.student
    stops = stop_ids(model, tokenizer)
    assert subject.stops == stops
    torch.manual_seed(0)
    sampler = GenerateSampler(model, stops)
    (rollout,) = sampler.sample([context.student], Sampling(3))
    assert rollout.ids and max(rollout.ids) < model.get_output_embeddings().weight.shape[0]
    return model


def held(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's one file, or of those that its index names."""
    index, files = directory / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        files = {*json.loads(index.read_text())["weight_map"].values()}
    return {name: t for file in sorted(files) for name, t in load_file(directory / file).items()}


def same_weights(model, directory: Path) -> None:
    """Asserts that the model has the tensors of the files, all of them and none other."""
    has, stored = model.state_dict(), held(directory)
    for name, tensor in has.items():
        if name == "lm_head.weight" and name not in stored:
            name = "model.embed_tokens.weight"
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
    for name in stored:
        assert name in has or name.split(".")[0] not in ("model", "lm_head"), name


def test_a_model_directory_is_taken_as_it_is_or_refused(draw, good, tmp_path):
    name = draw.choice(sorted(good))
    directory = shutil.copytree(good[name], tmp_path / "model")
    what = attack(draw, directory)
    print(name, what)  # shown where it fails
    try:
        with Clock():
            model = used(directory)
    except UserError as error:
        one_line(
            str(error), str(directory), "MODEL", "model.path", "model.", "eos_token_id", "embedding"
        )
        return
    if name != "adapter":
        same_weights(model, directory)
        return
    plain = AutoModelForCausalLM.from_pretrained(good["tied"], dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, directory).merge_and_unload()
    for (key, ours), tensor in zip(
        model.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.allclose(ours, tensor, atol=1e-5), key


WRONG = {
    "the pointers of Git LFS": (
        lambda place: (place / "model.safetensors").write_bytes(LFS),
        "git lfs pull",
    ),
    "fewer layers than the weights have": (
        lambda place: edit(place / "config.json", num_hidden_layers=1, layer_types=None),
        "no place for model.layers.1.",
    ),
    "a far larger model": (
        lambda place: edit(place / "config.json", vocab_size=10**8),
        "asks for 1,6",
    ),
    "endless layers": (
        lambda place: edit(place / "config.json", num_hidden_layers=10**9, layer_types=None),
        "num_hidden_layers is 1000000000",
    ),
    "weights twice": (lambda place: shards_too(place), "there twice"),
    "whole numbers": (
        lambda place: save_file(
            {k: t.char() for k, t in load_file(place / "model.safetensors").items()},
            place / "model.safetensors",
            {"format": "pt"},
        ),
        "whole numbers (I8)",
    ),
    "a config of a gigabyte": (
        lambda place: os.truncate(place / "config.json", 1 << 30),
        "it has 1,073,741,824 bytes, at most",
    ),
    "a window that is text": (
        lambda place: edit(place / "config.json", sliding_window="a"),
        "sliding_window is 'a', and must be a whole number",
    ),
    "a config without an end": (
        lambda place: os.truncate(place / "config.json", 10**12),
        "1,000,000,000,000 bytes, at most",
    ),
    "a tokenizer without an end": (
        lambda place: os.truncate(place / "tokenizer.json", 10**12),
        "1,000,000,000,000 bytes, at most",
    ),
    "a key twice": (
        lambda place: (place / "generation_config.json").write_text(
            '{"eos_token_id": 1, "eos_token_id": 2}'
        ),
        "'eos_token_id' is in it twice",
    ),
    "a stop that is none": (
        lambda place: edit(place / "generation_config.json", eos_token_id="</s>"),
        "eos_token_id",
    ),
    "a pipe": (lambda place: os.mkfifo(place / "vocab.txt"), "is a pipe or a device"),
    "links of a cache without its blobs": (
        lambda place: misdirect(place / "chat_template.jinja"),
        "a link that leads nowhere",
    ),
}
"""Faults that people have reported of others' loaders, which went on with them."""


def misdirect(file: Path) -> None:
    file.unlink()
    file.symlink_to("../../blobs/0a1b")


def shards_too(place: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "other.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", WRONG)
def test_what_others_load_in_silence_is_refused(name, good, tmp_path):
    damage, said = WRONG[name]
    directory = shutil.copytree(good["tied"], tmp_path / "model")
    damage(directory)
    with pytest.raises(UserError) as raised:
        used(directory)
    assert said in str(raised.value), raised.value


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lora_alpha", float("nan"), "numbers that are NaN, infinite or too large"),
        ("lora_alpha", 1e300, "numbers that are NaN, infinite or too large"),
        ("base_model_name_or_path", "a" * 5000, "does not say which model it adapts"),
        ("target_modules", r"([\w.]+)+!", "patterns that take too much to match (time)"),
        ("exclude_modules", r"([\w.]+)+!", "patterns that take too much to match (time)"),
        ("rank_pattern", {r"([\w.]+)+!": 4}, "patterns that take too much to match (time)"),
    ],
)
def test_an_adapters_config_of_nonsense_is_refused(name, value, said, good, tmp_path):
    directory = shutil.copytree(good["adapter"], tmp_path / "model")
    edit(directory / "adapter_config.json", **{name: value})
    with Clock(), pytest.raises(UserError, match=re.escape(said)):
        used(directory)


def test_patterns_that_end_are_taken(good, tmp_path):
    directory = shutil.copytree(good["adapter"], tmp_path / "model")
    whole = used(directory).state_dict()
    pattern = r"^(?!.*lm_head).*\.(q_proj|up_proj)"
    edit(directory / "adapter_config.json", target_modules=pattern)
    for key, tensor in used(directory).state_dict().items():
        assert torch.equal(tensor, whole[key])


def test_pipes_that_no_library_reads_are_left_alone(good, tmp_path):
    directory = shutil.copytree(good["tied"], tmp_path / "model")
    digest = Subject(str(directory)).digest
    for name in ("vocab.bpe", "tokenizer.pipe"):
        os.mkfifo(directory / name)
    (directory / "tokenizers").mkdir()
    with Clock():
        assert Subject(str(directory)).digest == digest


def test_a_tokenizer_that_fails_on_a_character_is_one_line(good, tmp_path):
    directory = shutil.copytree(good["tied"], tmp_path / "model")
    file = directory / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"] |= {"type": "WordPiece", "unk_token": "[UNK]"}
    values["model"] |= {"continuing_subword_prefix": "", "max_input_chars_per_word": 100}
    values["pre_tokenizer"] = None
    values["model"]["vocab"].pop(";")
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"^model\.path has a tokenizer that fails|no token of"):
        used(directory)


def test_a_name_of_megabytes_is_not_quoted_in_whole(good, tmp_path):
    directory = shutil.copytree(good["adapter"], tmp_path / "model")
    edit(directory / "adapter_config.json", **{"qalora" + " " * 10**6: 1})
    with pytest.raises(UserError, match="install the peft that wrote it") as raised:
        used(directory)
    one_line(str(raised.value), str(directory))


def test_a_token_beyond_the_embedding_is_named_where_ids_have_holes(good, tmp_path):
    """There are as many tokens as rows, and one has the id after the last."""
    directory = shutil.copytree(good["tied"], tmp_path / "model")
    file = directory / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"]["+"] = len(values["model"]["vocab"])
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"'\+', token 27, for which the model has no embedding"):
        used(directory)
