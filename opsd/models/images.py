"""Prepares a context's images for the model, with the model's own processor, at each use.

A context with images is an `ImageIds`: its ids, which include the images' placeholders and are used
like other contexts' ids, and its images. Pixels are large, so they are read and cut into patches
only for a forward, and are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from opsd.common.errors import UserError, in_short
from opsd.common.files import write_file
from opsd.common.strict_json import read_object
from opsd.config.sections import ModelSection
from opsd.models.adapter_files import model_files
from opsd.models.weight_files import find_file

if TYPE_CHECKING:
    from opsd.data.images import RowImage

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Model types that are tested: shared prefixes are exact, and `generate` works in batches."""

FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""The files of a processor, beside the tokenizer's."""

PATCHES = ("patch_size", "temporal_patch_size", "spatial_merge_size")
"""Fields of a vision tower's config that decide an image's patches and tokens."""

KINDS = "mm_token_type_ids"
"""The processor's name for the tokens' kinds: 0 for text, 1 for an image."""

GRID = "image_grid_thw"
"""The processor's name for the images' numbers of patches in time, height and width: [N, 3]."""


class ImageReader:
    """A model's processor for images only: for videos it would need torchvision.

    Raises UserError for a model of a type that is not tested, or without a processor.
    """

    def __init__(
        self,
        section: ModelSection,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "model",
    ):
        where = f"{name}.path is {section.path!r}"
        section = model_files(section, name).owner(*FILES)
        if config.model_type not in FAMILIES:
            raise UserError(
                f"{where}: rows with images (columns.images) work with "
                f"{', '.join(FAMILIES)}, not with {config.model_type}"
            )
        found = {file: find_file(section.path, file, section.revision) for file in FILES}
        own = find_file(section.path, "chat_template.json", section.revision)
        if own and not find_file(section.path, "chat_template.jinja", section.revision):
            tokenizer.chat_template = read_object(own, where).get("chat_template")
        self.files = {file: path.read_bytes() for file, path in found.items() if path is not None}
        try:
            from transformers import AutoImageProcessor
            from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

            whole = cast(type, PROCESSOR_MAPPING[type(config)])
            # The class would require a processor of videos.
            unchecked = {"check_argument_for_proper_class": lambda self, name, argument: None}
            kind = type(whole.__name__, (whole,), unchecked)
            pixels = AutoImageProcessor.from_pretrained(
                section.path, revision=section.revision, trust_remote_code=False
            )
            self.processor = kind(pixels, tokenizer, None, chat_template=tokenizer.chat_template)
        except Exception as error:  # missing, damaged, or of another release
            raise UserError(f"{where}: it has no processor of images ({in_short(error)})") from None
        self.token, self.token_id = self.processor.image_token, config.image_token_id
        self.config = config

    def check_teacher(self, config: PreTrainedConfig, path: str) -> None:
        """Raise UserError unless another model processes images as this one does."""
        ours, its = (getattr(c, "vision_config", None) for c in (self.config, config))
        for name in PATCHES:
            one, other = getattr(ours, name, None), getattr(its, name, None)
            if config.model_type not in FAMILIES or one != other:
                raise UserError(
                    f"teacher.path is {path!r}: it takes other images than the student "
                    f"({config.model_type}, {name} {other!r} and not {one!r})"
                )

    def context(self, text: str, images: Sequence[RowImage]) -> ImageIds:
        """The ids of a text in which each image has one placeholder, which the processor repeats as
        often as the image needs. Raises ValueError for an image that cannot be read."""
        pixels = [image.pixels() for image in images]
        made = self.processor(text=[text], images=pixels, add_special_tokens=False)
        return ImageIds(made["input_ids"][0], made[KINDS][0], images, self)

    def patches(self, images: Sequence[RowImage]) -> dict[str, Tensor]:
        """The model's inputs for the images: their patches, and the number of patches of each."""
        pixels = [image.pixels() for image in images]
        return dict(self.processor.image_processor(images=pixels, return_tensors="pt"))


class ImageIds(list[int]):
    """The ids of a context with images.

    Attributes:
        images: in the order of their places.
        positions: [3, P], each token's in time, height and width, once a model has computed them.
    """

    def __init__(
        self, ids: Sequence[int], kinds: Sequence[int], images: Sequence[Any], reader: ImageReader
    ):
        super().__init__(ids)
        self.kinds, self.images, self.reader = list(kinds), tuple(images), reader
        self.positions: Tensor | None = None

    def inputs(self, more: int = 0) -> dict[str, Tensor]:
        """The arguments of the model's forward beside the ids, for these and `more` ids of text."""
        kinds = torch.tensor([[*self.kinds, *[0] * more]])
        return {KINDS: kinds, **self.reader.patches(self.images)}


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its vision tower and adapters but without its head."""
    return getattr(model, "get_base_model", lambda: model)().model


def generation_inputs(
    model: PreTrainedModel, contexts: Sequence[Sequence[int]], width: int
) -> dict[str, Any]:
    """The arguments of `generate` for contexts, some of which have images, padded on the left to
    `width`; {} if none has. The vision tower runs once for all rollouts of a context."""
    seen = {id(context): context for context in contexts if isinstance(context, ImageIds)}
    if not seen:
        return {}
    kinds = torch.zeros(len(contexts), width, dtype=torch.long)
    first: dict[int, int] = {}  # the number of each context's first image
    images: list[RowImage] = []
    for key, context in seen.items():
        first[key] = len(images)
        images += context.images
    order = []
    for row, ids in enumerate(contexts):
        if isinstance(ids, ImageIds):
            kinds[row, width - len(ids) :] = torch.tensor(ids.kinds)
            order += [first[id(ids)] + n for n in range(len(ids.images))]
    patches = next(iter(seen.values())).reader.patches(images)
    patches = {name: tensor.to(model.device) for name, tensor in patches.items()}
    made: Any = cast(Any, whole_model(model)).get_image_features(**patches, return_dict=True)
    made.pooler_output = [made.pooler_output[n] for n in order]
    if deep := getattr(made, "deepstack_features", None):
        made.deepstack_features = [[layer[n] for n in order] for layer in deep]
    return {
        KINDS: kinds.to(model.device),
        GRID: patches[GRID][order],
        "mm_encoder_outputs": {"image": made},
    }


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save the tokenizer, and the image processor's files unchanged."""
    tokenizer.save_pretrained(directory)
    reader = getattr(tokenizer, "images", None)
    for name, content in (reader.files if reader is not None else {}).items():
        write_file(Path(directory) / name, content)
