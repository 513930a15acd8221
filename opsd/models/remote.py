"""A teacher in another process, on this or another machine, served by `opsd serve-teacher`.

The server gets the token ids of contexts and rollouts and returns the hidden states that predict
the rollouts' tokens: D numbers a token. With the server's head, which is fetched once, they give
exactly its logits. Answers are checked against the request, as a vLLM server's are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from opsd.common import http
from opsd.common.errors import problem_said
from opsd.common.schema import FirstErrors

KEY = "OPSD_TEACHER_KEY"
"""The environment variable with the server's key, on both sides."""

SMALL = 1 << 16  # the most bytes of a description, or of safetensors' header
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
PADDING = 1 << 16  # the most rows that a head may have beyond the tokens


class Description(FirstErrors):
    """The answer to /teacher: which model a server has."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    weights: Digest
    vocabulary: Digest
    width: Annotated[int, Field(ge=1, le=1 << 15)]  # D
    entries: Annotated[int, Field(ge=1)]  # V, of the head
    bias: bool
    dtype: Literal["float32", "bfloat16", "float16"]  # of the head and of the states
    how: dict[Annotated[str, Field(max_length=100)], float | None]  # `head_arguments`

    @property
    def bytes_a_number(self) -> int:
        """Bytes of each number that the server sends."""
        return getattr(torch, self.dtype).itemsize


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all tokens with their ids."""
    known = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(known.encode()).hexdigest()


class RemoteTeacher(nn.Module, http.Server):
    """The teacher at `address`, with the attributes of a model that scoring needs.

    Raises ServerAnswerError if the server is not `opsd serve-teacher`, or has another vocabulary
    than `tokenizer`.
    """

    field, key, hint = "teacher.path", KEY, "it is to be `opsd serve-teacher MODEL`"

    def __init__(
        self,
        address: str,
        patience: float,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.address, self.patience = address.rstrip("/"), patience
        self.device, self.dtype = device, dtype
        try:
            self.about = Description.model_validate_json(self._ask("/teacher", None, SMALL))
        except ValidationError as error:
            raise self._error(f"answers /teacher with {problem_said(error.errors()[0])}") from None
        about = self.about
        if about.vocabulary != vocabulary_digest(tokenizer):
            raise self._error("has another vocabulary than model.path's tokenizer")
        if about.entries > len(tokenizer) + PADDING:
            raise self._error(f"has a head of {about.entries:,} rows for {len(tokenizer):,} tokens")
        shapes = {"weight": [about.entries, about.width]}
        shapes |= {"bias": [about.entries]} if about.bias else {}
        made = self._tensors("/head", {"weights": about.weights}, shapes)
        # The head gets no gradients and is in no optimizer.
        self.head = nn.Linear(about.width, about.entries, about.bias, device="meta", dtype=dtype)
        for name, tensor in made.items():
            setattr(self.head, name, nn.Parameter(tensor, requires_grad=False))
        how = {"logit_scale": "logit_scale", "final_logit_softcapping": "logit_softcap"}
        self.config = PreTrainedConfig.from_dict({k: about.how.get(v) for k, v in how.items()})

    def get_output_embeddings(self) -> nn.Linear:
        """The head, which is in this process."""
        return self.head

    def states(self, roles: Sequence[Sequence[tuple[Any, Sequence[Any]]]]) -> list[Tensor]:
        """Fetch the hidden states [Σ R, D] of each role's groups with one request."""
        asked = [
            [(_ids(prefix), [_ids(rollout) for rollout in rollouts]) for prefix, rollouts in groups]
            for groups in roles
        ]
        shapes = {
            str(n): [sum(len(ids) for _, rollouts in groups for ids in rollouts), self.about.width]
            for n, groups in enumerate(asked)
        }
        body = {"weights": self.about.weights, "roles": asked}
        found = self._tensors("/states", body, shapes)
        return [found[str(n)] for n in range(len(asked))]

    def _tensors(self, route: str, body: Any, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
        """Fetch the route's tensors, and check that they have these shapes."""
        numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
        content = self._ask(route, body, SMALL + numbers * self.about.bytes_a_number)
        try:
            found = load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise self._error(f"answers {route} with no tensors ({str(error)[:100]})") from None
        if {name: list(tensor.shape) for name, tensor in found.items()} != shapes:
            raise self._error(f"answers {route} with tensors of other names or shapes than asked")
        if {tensor.dtype for tensor in found.values()} != {getattr(torch, self.about.dtype)}:
            raise self._error(f"answers {route} with numbers of another kind than it said")
        made = {name: tensor.to(self.device, self.dtype) for name, tensor in found.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in made.values()):
            raise self._error(f"answers {route} with numbers that are not finite")
        return made

    def _ask(self, route: str, body: Any, longest: int) -> bytes:
        return self.persist(lambda: self.fetch(route, body, self.patience, longest))


def _ids(ids: Any) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else [int(number) for number in ids]
