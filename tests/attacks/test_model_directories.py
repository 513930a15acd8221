"""Model directories as they come: damaged, of parts that do not fit, of another's files. What is
loaded is what the files hold, by safetensors and by peft; all else is refused in one line."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from helpers.mutations import LFS, Clock, as_json, changed, damaged, misplace, one_line
from safetensors.torch import load_file, save, save_file
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
TEMPLATES = [
    "{{ 1 / 0 }}", "{% if %}", "{{ x.y }}", "{% for", "{{ raise_exception('no') }}", "}}", "{#",
    "{{ messages }}", "{{ '' * 9**99 }}", "{% break %}", "\u202e", "{{ bos_token }}",
]  # fmt: skip


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


def other_weights(draw, file: Path) -> None:
    """Tensors that are missing, renamed, of another shape or dtype, not finite, or too many."""
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = draw.randrange(11)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[draw.choice([name + "s", "module." + name, "base_model.model." + name])] = tensor
        del tensors[name]
    elif kind == 2:
        tensors[name] = draw.choice([tensor[:-1], tensor.T, tensor[None], tensor.flatten()])
    elif kind == 3:
        tensors[name] = tensor.to(
            draw.choice([torch.int8, torch.float64, torch.float16, torch.bool, torch.float8_e4m3fn])
        )
    elif kind == 4:
        tensor.view(-1)[0] = draw.choice([torch.nan, torch.inf, 3e38])
        tensors[name] = tensor
    elif kind == 5:
        tensors[name] = draw.choice([tensor[:0], torch.tensor(1.0), torch.zeros_like(tensor)])
    elif kind == 6:
        other = name.replace(".0.", ".7.")
        tensors[other if other != name else "model.layers.9.mlp.up_proj.weight"] = tensor
    elif kind == 7:
        extra = ["lm_head.weight", "v_head.weight", "model.layers.0.self_attn.q_proj.bias"]
        extra += ["model.layers.0.self_attn.q_norm.weight", "model.embed_tokens.weight"]
        tensors[draw.choice(extra)] = tensor + 1
    elif kind == 8:
        other = draw.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensor
    elif kind == 9:
        tensors = {name: tensors[name].double() * 10.0 ** draw.choice([200, 40, -50, -300])
                   for name in tensors}  # fmt: skip
    else:
        rows = torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor
        tensors[name] = rows
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})


def other_header(draw, file: Path) -> None:
    """A safetensors file whose header says something else."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    one, other = header[draw.choice(names)], header[draw.choice(names)]
    kind = draw.randrange(10)
    if kind == 0:  # two tensors in one place
        one["data_offsets"] = other["data_offsets"]
    elif kind == 1:  # a hole, or bytes of the next one
        start, end = one["data_offsets"]
        odd = [[start + 4, end + 4], [end, start], [start, end + 4], [start, 2**63], [-4, end]]
        odd += [[start, end - 4], [start + 1, end + 1], [2**64 - 8, 2**64 - 4], [10**30, 10**30]]
        odd += [[start, len(rest)], [len(rest), len(rest) + end - start], [start, str(end)], None]
        one["data_offsets"] = draw.choice([*odd, [start, end, end], [start], [0, 0], {"0": 0}])
    elif kind == 2:
        shapes = [[2**32, 2**32, 0], [2**63, 2], [], [-1], [0], [[1]], one["shape"] * 2, [10**30]]
        one["shape"] = draw.choice(shapes)
    elif kind == 3:
        one["dtype"] = draw.choice(["F4", "F6_E2M3", "C64", "I32", "U64", "F8_E8M0", "bf16", "", 7])
    elif kind == 4:
        odd = [{"format": "tf"}, {"format": 5}, {}, {"format": "pt", "a": "b" * 10**6}, None, []]
        header["__metadata__"] = draw.choice(odd)
    elif kind == 5:
        header["__metadata__"] = {"format": "pt", "a": " " * draw.choice([10**5, 101 * 10**6])}
    elif kind == 6:  # names beyond counting, or that are no name
        nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header |= {f"{draw.choice(['x', names[0]])}.{n}": nothing for n in range(20_000)}
    elif kind == 7:
        odd = ["", "\0", "\x1b[2J", "a" * 10**5, "\u202e", "../x", "model", "__metadata__.x", "\n"]
        header[draw.choice(odd)] = header.pop(names[-1])
    header = header if kind < 8 else changed(draw, header)
    text = as_json(draw, header) + b" " * draw.choice([0, 0, 0, 1, 7])
    odd = [0, 1, 8, len(text) - 1, len(text) + 9, len(text) + len(rest), 10**8, 2**40, 2**63]
    length = draw.choice([len(text)] * 9 + [*odd, 2**64 - 1])
    file.write_bytes(length.to_bytes(8, "little") + text + rest)


TOKEN = {"special": False, "single_word": False, "lstrip": False, "rstrip": False}
TOKEN["normalized"] = False


def other_tokenizer(draw, file: Path) -> None:
    """A tokenizer with tokens beyond the vocabulary, twice, or that nothing makes."""
    values = json.loads(file.read_text())
    kind = draw.randrange(9)
    ids = [10**6, 2**31, 2**32 - 1, 2**32, -1, 0, 27, 28]
    if kind == 0:
        odd = {"id": draw.choice(ids), "content": draw.choice(["<new>", "1", "", "\0"]), **TOKEN}
        values["added_tokens"].append(odd)
    elif kind == 1:
        vocabulary = values["model"]["vocab"]
        vocabulary[draw.choice(["<new>", *vocabulary])] = draw.choice(ids)
    elif kind == 2:
        names = ["BPE", "Unigram", "WordLevel", "WordPiece", "Nobody", None]
        values["model"]["type"] = draw.choice(names)
    elif kind == 3:
        part = draw.choice(["normalizer", "pre_tokenizer", "post_processor", "decoder"])
        odd = [{"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}, {"type": "x"}]
        odd += [
            {"type": "Prepend", "prepend": "a" * 10**6},
            {"type": "Sequence", "normalizers": []},
        ]
        values[part] = draw.choice([*odd, {"type": "Lowercase"}, {"type": "ByteLevel"}, None])
    elif kind == 4:  # pieces that are huge, many, or none
        piece = draw.choice(["a" * 10**6, "\u0301" * 1000, "\0", "\U000e0041" * 9, " " * 10**5])
        values["model"]["vocab"] |= dict.fromkeys([piece] * draw.choice([1, 1, 0]), 27)
        if draw.random() < 0.5:
            more = {f"<{n}>": 27 + n for n in range(50_000)}
            values["model"]["vocab"] |= more
    elif kind == 5:  # byte pairs of pieces that are not there, and a cycle of them
        pairs = [["1", "2"], ["12", "3"], "1 2", "1", ["1", "2", "3"], ["", ""], [1, 2], None]
        made = draw.choice([["12"], ["12", "123"], []])
        values["model"] = {"type": "BPE", "vocab": values["model"]["vocab"], "merges": []}
        values["model"]["vocab"] |= {one: 27 + n for n, one in enumerate(made)}
        values["model"]["merges"] = draw.choices(pairs, k=draw.choice([1, 2, 2000]))
        odd = {"dropout": [0.5, 2.0, -1], "byte_fallback": [True, "a"], "unk_token": ["nobody", 7]}
        name = draw.choice(sorted(odd))
        values["model"][name] = draw.choice(odd[name])
    elif kind == 6:  # scores that are no numbers, and a vocabulary without its end
        scores = [-1.0, 1e308, -1e308, "a", None]
        pieces = [[piece, draw.choice(scores)] for piece in values["model"]["vocab"]]
        unknown = draw.choice([0, None, 99, -1])
        values["model"] = {"type": "Unigram", "unk_id": unknown, "vocab": pieces}
        if draw.random() < 0.3:
            values["model"]["vocab"] = draw.choice([[], [["1"]], [["1", 0.0]] * 9, {"1": 0.0}])
    elif kind == 7:  # patterns that a text takes long for, and parts inside of parts
        pattern = draw.choice(["(a|a)*b", "(.*)*;", "(?<=(1+)+)x", "\\p{L}{1000}{1000}", "(", ""])
        part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        part["invert"] = False
        for _ in range(draw.choice([0, 1, 100, 900])):
            part = {"type": "Sequence", "pretokenizers": [part]}
        values["pre_tokenizer"] = part
    else:
        for part in ("truncation", "padding"):
            values[part] = {"direction": "Right", "max_length": draw.choice([0, 1, 2**63])}
            values[part] |= {"strategy": draw.choice(["LongestFirst", {"Fixed": 10**9}])}
            values[part] |= {"stride": 9, "pad_id": 99, "pad_type_id": 0, "pad_token": "x"}
    file.write_text(json.dumps(values))


FIELDS = {
    "generation_config.json": {
        "eos_token_id": [[], [[2]], "2", [2, "2"], 2.0, True, -1, 10**6, [2**63], {}, [None]],
        "pad_token_id": [-1, 10**6, "a", [0], 2**70],
        "temperature": ["hot", None, 0, -1, 1e308, []],
        "stop_strings": ["a", [""], 7],
        "max_length": ["20", -1, 0],
        "do_sample": ["yes", 3],
    },
    "adapter_config.json": {
        "base_model_name_or_path": [
            "nobody/nothing", "hf://a/b", "../tied", "/", "", ".", "a" * 5000, "~/x", "a\0b", 7, [],
            "https://h/m", "\\\\h\\m",
        ],
        "r": [0, -1, 2**40, 2.0, "2", None, True],
        "lora_alpha": [0, -8, 1e300, "8", None, float("nan")],
        "target_modules": ["(a+)+$", "all-linear", [], ["nobody"], {"q_proj": 1}, ".*(", None, 7],
        "rank_pattern": [{"q_proj": 4}, {"(": 4}, {"q_proj": "4"}, [1], {"q_proj": 0}],
        "layers_to_transform": [[0], [9], -1, "0"],
        "modules_to_save": [["lm_head"], "lm_head", ["nobody"], [7]],
        "layer_replication": [[[0, 2], [0, 2]], [[0, 10**6]], [[2, 0]], [[0]], "a"],
        "peft_type": ["LORA", "lora", "XLORA", "PREFIX_TUNING", 7, None],
        "auto_mapping": [{"base_model_class": "os", "parent_library": "os"}],
    },
    "config.json": {
        "model_type": ["llama", "nobody", "", 7, None, "../x", "t5", "clip"],
        "architectures": [["Nobody"], [], "Qwen3ForCausalLM", [7], ["T5ForConditionalGeneration"]],
        "auto_map": [{"AutoModelForCausalLM": "nobody/nothing--m.M"}, {"AutoConfig": "m.M"}, 7],
        "rope_parameters": [{"rope_type": "x"}, {"rope_type": "yarn", "factor": "a"}, [], None],
        "rms_norm_eps": [0, -1, "a", float("nan"), 1e300],
        "quantization_config": [{"quant_method": "gptq"}, {}, {"quant_method": "x"}, 7, "bnb"],
        "hidden_act": ["x", 7, "", "silu()"],
        "torch_dtype": ["float8", "int8", "os.system", 7],
        "sliding_window": [0, -1, 2**40, "a"],
        "layer_types": [["x"] * 2, [], ["full_attention"], "full"],
        "tie_word_embeddings": ["no", 0, None, []],
        "vocab_size": [0, 1, 26, "27", 27.0, 2**40],
    },
    "tokenizer_config.json": {
        "tokenizer_class": ["Nobody", "os.system", 7, "LlamaTokenizer", "BertTokenizer"],
        "chat_template": ["{{ 1 / 0 }}", [], [{"name": "a"}], {"a": 1}, 7, "{% for"],
        "added_tokens_decoder": [{"a": {}}, {"999999": {"content": "x"}}, [], {"0": 7}],
        "model_max_length": [0, -1, 1e30, "9", None],
        "eos_token": ["nobody", 7, {"content": "x"}, None, "", ["a"]],
        "auto_map": [{"AutoTokenizer": ["m.T", None]}, 7],
    },
}  # fmt: skip


NUMBERS = [
    0, 1, -1, 2, 3, 7, 2**15, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400,
    0.0, 1.0, 0.5, -0.5, 1e-300, 1e300, -1e300, 5e-324, math.nan, math.inf, -math.inf, "16", "",
    True,
    None, [16], [], {}, "1e400",
]  # fmt: skip


def other_field(draw, file: Path) -> None:
    """A field of a config that libraries read, of a wrong type, or beyond what there is."""
    values = json.loads(file.read_text())
    numeric = [name for name, one in values.items() if type(one) in (int, float)]
    if draw.random() < 0.5 and numeric:
        text = json.dumps(values | {draw.choice(numeric): draw.choice(NUMBERS)})
        file.write_text(text.replace('"1e400"', "1e400"))
        return
    name = draw.choice(sorted(FIELDS[file.name]))
    file.write_text(json.dumps(values | {name: draw.choice(FIELDS[file.name][name])}))


def beside(draw, directory: Path) -> None:
    """Files that a directory has too many: of another model, of another format, in pieces."""
    kind = draw.randrange(5)
    if kind == 0:  # the whole beside shards, or shards beside the whole
        one = {"model.embed_tokens.weight": torch.ones(27, 16)}
        (directory / "model-00001-of-00009.safetensors").write_bytes(save(one))
        index = {
            "metadata": {},
            "weight_map": dict.fromkeys(one, "model-00001-of-00009.safetensors"),
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == 1:
        (directory / "model.safetensors").write_bytes(save({"a": torch.ones(2)}))
    elif kind == 2:
        (directory / "pytorch_model.bin").write_bytes(b"\x80\x02c")
    elif kind == 3:
        (directory / "config.json").write_text('{"model_type": "llama"}')
    else:
        name = draw.choice(["added_tokens.json", "special_tokens_map.json", "vocab.json"])
        odd = [
            '{"<x>": 9}',
            '{"<x>": "a"}',
            "[]",
            '{"eos_token": null}',
            '{"eos_token": "<|user|>"}',
        ]
        (directory / name).write_text(draw.choice(odd))


def attack(draw, directory: Path) -> str:
    """Change the directory; returns what was done."""
    files = sorted(file for file in directory.iterdir() if file.is_file())
    file = draw.choice(files)
    if draw.random() < 0.12:
        beside(draw, directory)
        return "beside"
    if draw.random() < 0.15:
        misplace(draw, file)
        return f"misplace {file.name}"
    if file.suffix == ".safetensors":
        how = draw.choice([other_weights, other_weights, other_header])
        if draw.random() < 0.8:
            how(draw, file)
            return f"{how.__name__} {file.name}"
    elif file.name == "tokenizer.json" and draw.random() < 0.4:
        other_tokenizer(draw, file)
        return "tokenizer"
    elif file.name in FIELDS and draw.random() < 0.5:
        other_field(draw, file)
        return f"field of {file.name}"
    elif file.suffix == ".json" and draw.random() < 0.8:
        file.write_bytes(as_json(draw, changed(draw, json.loads(file.read_text()))))
        return f"changed {file.name}"
    elif file.suffix == ".jinja" and draw.random() < 0.6:
        text = file.read_text()
        at = draw.randrange(len(text))
        if draw.random() < 0.2:
            file.write_bytes(
                draw.choice([b"\x80\x04\x95", b"\0" * 99, b"\xff\xfea\0", b"{{ '\xff' }}"])
            )
            return "binary template"
        file.write_text(
            draw.choice([text[:at] + draw.choice(TEMPLATES) + text[at:], text[:at], "{{ 1 }}"])
        )
        return "template"
    file.write_bytes(damaged(draw, file.read_bytes()))
    return f"damaged {file.name}"


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


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))


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
