"""Tiny models of families that see images, with a processor's files, as hub models have them."""

import json
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers.tiny_models import SECTIONS, tiny_model
from opsd.quickstart import tiny_model as tiny

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PATCH = 4

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Qwen3-VL's, without tools and videos."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The quickstart's, with the tokens of images."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": VISION})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    return tokenizer


def make_image_model(family: str = "qwen3_vl") -> PreTrainedModel:
    """Random weights, with this tokenizer's tokens of images. The vision tower's are large: with
    the usual ones it would make the same of all images."""
    tokenizer = make_tokenizer()
    start, end, image, video = tokenizer.convert_tokens_to_ids(VISION)
    ids = {"image_token_id": image, "video_token_id": video}
    ids |= {"vision_start_token_id": start, "vision_end_token_id": end}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {"vocab_size": len(tokenizer), "rope_parameters": SECTIONS, **ends}
    text["max_position_embeddings"] = 512
    vision = {"patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2}
    vision |= {"hidden_size": 32, "num_heads": 4, "depth": 2}
    own = {
        "qwen3_vl": {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        "qwen3_vl_moe": {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        "qwen2_5_vl": {"window_size": 16, "fullatt_block_indexes": [1]},
        "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 2},
    }
    vision |= own[family]
    config = {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}
    model = tiny_model(family, **config, **ids, **ends)
    for parameter in model.model.visual.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def write_processor(directory: Path) -> Path:
    """Tokenizer, chat template and image processor: patches of 4 x 4 pixels, joined 2 x 2."""
    make_tokenizer().save_pretrained(directory)
    size = {"shortest_edge": 64, "longest_edge": 1024}
    Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=size).save_pretrained(directory)
    return directory


def write_image_model(directory: Path, family: str = "qwen3_vl") -> Path:
    """All of a model's files."""
    make_image_model(family).save_pretrained(directory)
    return write_processor(directory)


def picture(width: int, height: int, seed: int = 0, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded image of random pixels."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=draw, dtype=torch.uint8).numpy()
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def write_image_rows(directory: Path, rows: list[dict], images: list[list[bytes]]) -> Path:
    """Rows as JSON lines, their images as files beside."""
    (directory / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (row, its) in enumerate(zip(rows, images, strict=True)):
        names = [f"images/{number}-{n}.png" for n in range(len(its))]
        for name, content in zip(names, its, strict=True):
            (directory / name).write_bytes(content)
        lines.append(json.dumps({**row, "pictures": names}) + "\n")
    (directory / "rows.jsonl").write_text("".join(lines))
    return directory / "rows.jsonl"
