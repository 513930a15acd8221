"""Changes of a model directory, drawn by a seed: weights, headers, tokenizers, configs, others."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file

from helpers.mutations import as_json, changed, damaged, misplace

TEMPLATES = [
    "{{ 1 / 0 }}", "{% if %}", "{{ x.y }}", "{% for", "{{ raise_exception('no') }}", "}}", "{#",
    "{{ messages }}", "{{ '' * 9**99 }}", "{% break %}", "\u202e", "{{ bos_token }}",
]  # fmt: skip


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
        for _ in range(draw.choice([0, 1, 100, 400])):  # json writes no deeper nests
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


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))
