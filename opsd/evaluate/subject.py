"""The model to evaluate: its tokenizer, config and digest, and later its weights."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from opsd.common.errors import UserError
from opsd.common.strict_json import MOST_BYTES
from opsd.config.sections import ModelSection
from opsd.models.images import ImageReader
from opsd.models.load import check_directory, load_config, load_model, load_tokenizer, stops_of
from opsd.models.weight_files import header

# The files that determine a model's output, unlike a checkpoint's optimizer or our own files.
_FILES = """
    config.json generation_config.json *.safetensors *.safetensors.index.json
    tokenizer* vocab.* merges.txt special_tokens_map.json added_tokens.json
    adapter_config.json *processor*.json *.jinja
""".split()


class Subject:
    """A model or an adapter at a path; its weights are not loaded yet. Raises UserError."""

    def __init__(self, path: str, local_rank: int = 0):
        self.path = path
        section = ModelSection(path=path)
        self.files = files = check_directory(section, "MODEL")
        self.tokenizer = load_tokenizer(section, "MODEL")
        self.config = load_config(files)
        for adapter in files.adapters:
            adapter.reshape(self.config)
        self.tokenizer.embedding_rows = self.config.get_text_config().vocab_size
        cuda = torch.cuda.is_available()
        self.device = f"cuda:{local_rank % torch.cuda.device_count()}" if cuda else "cpu"
        self.precision = "bf16" if cuda else "fp32"

    def read_images(self, wanted: bool) -> None:
        """Load the model's image processor if `wanted`, for rows with images. Raises UserError."""
        section = ModelSection(path=self.path)
        reader = ImageReader(section, self.config, self.tokenizer, "MODEL") if wanted else None
        self.tokenizer.images = reader

    @cached_property
    def digest(self) -> str:
        """A hash of the model's files, or a hub model's commit. It changes if the model is trained
        further under the same name."""
        parts = [part.section for part in reversed(self.files.adapters)] + [self.files.base]
        hashes = [self._hash(Path(part.path), part.revision) for part in parts]
        return hashes[0] if len(hashes) == 1 else _digest("\n".join(hashes))

    def _hash(self, directory: Path, revision: str | None) -> str:
        if not directory.is_dir():
            commit = getattr(self.config, "_commit_hash", None) or revision
            return f"{directory}@{commit}"
        lines = []
        found = sorted({path for pattern in _FILES for path in directory.glob(pattern)})
        for path in filter(_has_an_end, found):
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"MODEL: {str(path)!r} cannot be read ({error})") from None
            lines.append(f"{path.name} {content}\n")
        return _digest("".join(lines))

    @property
    def switches_thinking(self) -> bool:
        """Whether the chat template uses `enable_thinking`."""
        return "enable_thinking" in str(self.tokenizer.chat_template)

    @property
    def stops(self) -> frozenset[int]:
        """Ids of the tokens that end an answer, as `stop_ids` gives them for the loaded model."""
        owner = self.files.owner("generation_config.json")
        try:
            extra = GenerationConfig.from_pretrained(owner.path, revision=owner.revision)
        except OSError:
            extra = GenerationConfig.from_model_config(self.config)
        return stops_of(self.tokenizer, extra.eos_token_id)

    def load(self) -> PreTrainedModel:
        """Load the model, to `device` and in `precision`."""
        model, _ = load_model(ModelSection(path=self.path), self.device)
        return model.to(torch.bfloat16) if self.precision == "bf16" else model


def _has_an_end(path: Path) -> bool:
    """Whether the file can be hashed: not a pipe, nor a sparse file that is no weights."""
    if not path.is_file():
        return False
    if path.suffix != ".safetensors":
        return path.stat().st_size <= MOST_BYTES
    with suppress(UserError):
        return bool(header(path))  # which says how long the file is
    return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
