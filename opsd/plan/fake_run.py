"""Measure the memory of a training step and of sampling by running them on tensors without data.

The training step itself (packed streams, the fused loss, backward under autocast) and a sampler's
forward passes run on fake tensors, which have shapes and dtypes but no storage; the bytes of live
tensors are counted. Every layer adds the same amount, so it is measured with one and two layers.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import moe

from opsd.common.errors import UserError, in_short
from opsd.models.load import best_attention
from opsd.models.multimodal import auto_class
from opsd.prefix import packed_forward as stream
from opsd.rollout import Sampling
from opsd.rollout.decoding import decodes_fast
from opsd.rollout.logits_sampling import Draw


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of live tensors that were made inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = self.at_kernel = self.base = 0
        self._seen: set[int] = set()

    def start(self) -> None:
        """Start to measure: later peaks are relative to the bytes alive now."""
        self.base = self.most = self.at_kernel = self.live

    @property
    def peaks(self) -> Peaks:
        """The peaks since `start`, minus the bytes that were alive then."""
        return Peaks(self.most - self.base, self.at_kernel - self.base)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.prim.device.default and isinstance(arguments[0], FakeTensor):
            return arguments[0].fake_device  # half of all calls, and slow if left to torch
        result, before = function(*arguments, **(keywords or {})), self.most
        if isinstance(result, Tensor):
            self._enter(result)
        else:
            tree_map_only(Tensor, self._enter, result)
        if function is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1:
            # The sum of two gradients of one tensor: with real tensors backward adds in place.
            self.most = before
        if function.namespace == "opsd":  # the kernel: `with_scratch` adds its scratch memory
            self.at_kernel = max(self.at_kernel, self.live)
        return result

    def _enter(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self._leave, key, size)
        return tensor

    def _leave(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Peaks:
    """Peaks in bytes: the most alive at any time, and the most when the fused kernel runs, whose
    own scratch memory is not included."""

    most: int
    at_kernel: int

    def with_scratch(self, scratch: int) -> int:
        """The peak if the kernel needs `scratch` bytes."""
        return max(self.most, self.at_kernel + scratch)


def over_layers(
    architecture: PreTrainedConfig, measure: Callable[[PreTrainedConfig], Peaks]
) -> Peaks:
    """measure(architecture), extrapolated from models with one and with two layers of each kind.

    A model whose layers cannot be selected one by one is measured as a whole. Raises UserError for
    a model that does not run without data.
    """
    kinds = _layer_kinds(architecture)
    with _running(architecture):
        if kinds is not None:
            with suppress(IndexError, KeyError, UserError):  # if a layer needs other layers
                return _by_kinds(architecture, kinds, measure)
        return measure(architecture)


def _by_kinds(
    architecture: PreTrainedConfig,
    kinds: list[list[int]],
    measure: Callable[[PreTrainedConfig], Peaks],
) -> Peaks:
    firsts = [places[0] for places in kinds]
    least = measure(_with_layers(architecture, firsts))
    most, at_kernel = least.most, least.at_kernel
    for places in kinds:
        if len(places) > 1:
            more = measure(_with_layers(architecture, sorted([*firsts, places[1]])))
            most += (len(places) - 1) * (more.most - least.most)
            at_kernel += (len(places) - 1) * (more.at_kernel - least.at_kernel)
    return Peaks(most, at_kernel)


@contextmanager
def _running(architecture: PreTrainedConfig) -> Iterator[None]:
    """Turns any exception of the model's own code, which may need values, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model.path: a plan cannot run {architecture.model_type} without data "
            f"({in_short(error)}); a short run says what it takes"
        ) from error


def unshared_because(architecture: PreTrainedConfig) -> str | None:
    """The reason why a model of this architecture cannot share prefixes; None if it can."""
    kinds = _layer_kinds(architecture)
    with _running(architecture):
        try:
            assert kinds is not None
            short = _with_layers(architecture, [places[0] for places in kinds])
            model = meta_model(short, torch.float32)
        except Exception:  # its layers cannot be selected one by one
            model = meta_model(architecture, torch.float32)
        with _without_data(), torch.no_grad():
            _make_fake(model)
            return stream.unpackable(model)


def meta_model(architecture: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make the model on torch's meta device. Raises UserError if transformers cannot."""
    try:
        with torch.device("meta"):
            return auto_class(architecture).from_config(
                copy.deepcopy(architecture),
                dtype=dtype,
                attn_implementation=best_attention(architecture),
            )
    except Exception as error:  # raised by the model's own code
        raise UserError(
            f"model.path: {architecture.model_type} cannot be made ({in_short(error)})"
        ) from error


def _make_fake(model: nn.Module) -> None:
    """Replace a model's tensors on the meta device by fake ones on the CPU; tied ones stay tied."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in cast(tuple[dict, ...], (module._parameters, module._buffers)):
            for name, old in tensors.items():
                if old is not None and old not in made:
                    made[old] = torch.empty(old.shape, dtype=old.dtype)
                    if tensors is module._parameters:
                        made[old] = nn.Parameter(made[old], requires_grad=old.requires_grad)
                tensors[name] = made.get(old)


MakeStep = Callable[[PreTrainedConfig], tuple[Sequence[PreTrainedModel], Callable[[], Tensor]]]
"""Architecture → (models on the meta device, the student first; a function giving the loss)."""


def step_peaks(
    architecture: PreTrainedConfig,
    make_step: MakeStep,
    *,
    autocast: bool,
    flash: bool,
    packable: bool,
) -> Peaks:
    """The peaks of a micro-batch's forward and backward, without weights and gradients.

    From the second micro-batch on, each gradient is added to an earlier one and freed.
    autocast: run matrix products in bf16. flash: a flash kernel computes attention.
    packable: `unshared_because` returned None, and is not called again.
    """
    models, loss = make_step(architecture)
    with _without_data(), _bare_attention(flash), LiveBytes() as count:
        for model in models:
            _make_fake(model)
            if packable:
                stream.take_as_packable(model)
        student = models[0].train()
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        count.start()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            part = loss()
            with torch.autocast("cpu", enabled=False):
                part.backward()
        return count.peaks


def sampling_peaks(
    architecture: PreTrainedConfig, dtype: torch.dtype, prompt: int, longest: int
) -> Peaks:
    """The peak of `generate` for one sequence, reached in its prompt or at its last token."""
    model = meta_model(architecture, dtype).eval()
    with _without_data(), torch.no_grad(), decodes_fast(model, 0), LiveBytes() as count:
        _make_fake(model)
        draw = Draw(Sampling(longest, top_p=0.9, top_k=20))
        count.start()

        def forward(length: int, past=None, before: int = 0):
            width = before + length
            output = model(
                input_ids=torch.zeros(1, length, dtype=torch.long),
                attention_mask=torch.ones(1, width, dtype=torch.long),
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
            draw(None, output.logits[:, -1, :].to(torch.float32, copy=True))
            return getattr(output, "past_key_values", None)

        cache = forward(prompt)
        reading = count.peaks.most
        del cache
        cache = forward(prompt + longest - 1)  # all tokens but the last, in one pass
        if cache is None:  # a model without a cache runs all tokens again for the last one
            return count.peaks
        count.most = count.live
        forward(1, cache, prompt + longest - 1)
        return Peaks(max(reading, count.peaks.most), 0)


def _layer_kinds(architecture: PreTrainedConfig) -> list[list[int]] | None:
    """Groups the numbers of equal layers, in order; None if the config has settings that do not
    allow to select some of the layers."""
    text = architecture.get_text_config()
    count, kinds = text.num_hidden_layers, defaultdict(list)
    computed = any(
        isinstance(getattr(type(text), name, None), property) and len(set(getattr(text, name))) > 1
        for name in ("layer_types", "layers_block_type")
    )
    if computed or getattr(text, "num_kv_shared_layers", False):
        return None
    own: Any = getattr(text, "per_layer_config", None) if _differs(text) else [None] * count
    for layer in range(count):
        lists = {name: values[layer] for name, values in _by_layer(text).items()}
        kinds[repr((lists, own[layer] and own[layer].to_dict()))].append(layer)
    return list(kinds.values())


def _by_layer(text: PreTrainedConfig) -> dict[str, list]:
    """The config's lists with an entry per layer, except lists of floats, such as [low, high]."""
    count = text.num_hidden_layers
    lists = {name: x for name, x in vars(text).items() if isinstance(x, list) and len(x) == count}
    own = {name: x for name, x in lists.items() if not name.startswith(("_", "architectures"))}
    return {name: x for name, x in own.items() if not isinstance(x[0], float)}


def _differs(text: PreTrainedConfig) -> bool:
    """Whether settings such as the width of a head differ by layer (transformers 5.2x)."""
    return getattr(text, "is_heterogeneous", False)


def _with_layers(architecture: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """The architecture reduced to these layers."""
    short = copy.deepcopy(architecture)
    text = short.get_text_config()
    lists, own = _by_layer(text), None
    if _differs(text):
        spec = text._heterogeneity_spec
        names = spec.explicit_per_layer_attributes
        own = {
            new: {name: getattr(text.per_layer_config[old], name) for name in names}
            for new, old in enumerate(layers)
        }
        text.per_layer_config = None
    text.num_hidden_layers = len(layers)
    if hasattr(text, "decoder_layers"):  # in BART num_hidden_layers counts the encoder's
        text.decoder_layers = len(layers)
    for name, values in lists.items():
        setattr(text, name, [values[layer] for layer in layers])
    if own is not None:
        text.per_layer_config = cast(Any, own)
    return short


@contextmanager
def _without_data() -> Iterator[None]:
    """A context in which tensors are fake. Experts use transformers' own product, since torch's
    grouped one supports fake tensors in bf16 only (torch 2.13, transformers 5.24)."""
    never = patch.object(moe, "_can_use_grouped_mm", lambda *arguments: False, create=True)
    with FakeTensorMode(), never:
        yield


class _Attention(torch.autograd.Function):
    """Makes the tensors that `packed_attention` returns and saves for backward, without running its
    kernels: their tiles take only some megabytes, but most of a plan's time.

    flash: save the result and the log-sum-exps as well.
    """

    @staticmethod
    def forward(ctx, query, key, value, flash):
        out = query.new_empty(*query.shape[:2], value.shape[2])
        saved = (out, query.new_empty(query.shape[:2], dtype=torch.float32)) if flash else ()
        ctx.save_for_backward(query, key, value, *saved)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *_ = ctx.saved_tensors
        wide = [torch.zeros_like(x, dtype=torch.float32) for x in (key, value)]
        narrow = [x.to(key.dtype) for x in wide]
        return torch.empty_like(query), *narrow, None


@contextmanager
def _bare_attention(flash: bool) -> Iterator[None]:
    def without_kernels(query, key, value, layout, scores):
        enabled = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if enabled else value.dtype
        query, key, value = (query * scores.scale).to(dtype), key.to(dtype), value.to(dtype)
        return _Attention.apply(query, key, value, flash)

    own, stream.packed_attention = stream.packed_attention, without_kernels
    try:
        yield
    finally:
        stream.packed_attention = own
