"""The ways to do one OPSD step's forward and backward that `benchmarks.step` compares.

- shared: `opsd.prefix`, each context once, no padding; on a GPU with each kernel that can run.
- compiled: the first of these, with torch.compile for layers' feed-forward and norms; on request.
- naive: each rollout with its own copy of the context, in a padded batch, torch's fused attention.
- grouper: contexts once, with our own minimal version of PrefixGrouper's attention (arXiv
  2506.05433): causal attention of the prefix, and of each rollout over a copy of [prefix ; own],
  both with torch's fused attention.
- trl: our own version of the forward of TRL's SDFT trainer (padded batches, an attention mask, the
  logits of all rollout tokens), and TRL's own function for the loss over full logits.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.loss import LossSection
from opsd.objectives import OPSD, SampleGroup, Totals
from opsd.prefix import Ids, use_kernel
from opsd.prefix import attention as kernels
from opsd.prefix import packed_forward as stream
from opsd.prefix.layout import Layout, Scores
from opsd.training.step import OPSDStep

Step = Callable[[list[SampleGroup]], None]
"""One step's forward and backward; gradients are in the model's parameters."""

TRL_BATCH = 8
"""Sequences in a forward; TRL's default."""


@dataclass(frozen=True)
class Setting:
    """What all ways share. `teacher`: a copy of the weights, without gradient."""

    model: PreTrainedModel
    teacher: PreTrainedModel
    bf16: bool
    max_tokens: int
    compiled: bool = False

    def autocast(self):
        kind = self.model.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.bf16)

    def backward(self, loss: Tensor) -> None:
        with phase("backward"), torch.autocast(self.model.device.type, enabled=False):
            loss.backward()


def ways(setting: Setting) -> dict[str, Step]:
    """The ways that can run here, by name."""
    found = {}
    for kernel in shared_kernels(setting):
        name = "shared" if kernel == "tiles" else f"shared, {kernel}"
        found[name] = _packed(setting, share=True, kernel=kernel)
    if setting.compiled:
        found["compiled"] = _compiled(setting, next(iter(found.values())))
    found["naive"] = _packed(setting, share=False)
    grouper = _packed(setting, share=True)

    def by_grouper(groups: list[SampleGroup]) -> None:
        with _attending(grouper_attention):
            grouper(groups)

    found["grouper"] = by_grouper
    if importlib.util.find_spec("trl"):
        found["trl"] = _trl(setting)
    return found


def shared_kernels(setting: Setting) -> list[str]:
    """The kernels that can compute this model's attention: tiles on a CPU, the fast ones on a
    GPU.
    """
    device = setting.model.device
    if device.type == "cpu":
        return ["tiles"]
    config = setting.model.get_decoder().config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inputs = kernels.Inputs(device, torch.bfloat16, width, width, softcap=False)
    fast = ("flash", "flash_3", "flash_attn", "flex")
    return [name for name in fast if kernels.obstacle(name, inputs) is None]


def _packed(setting: Setting, *, share: bool, kernel: str = "auto") -> Step:
    step = OPSDStep(setting.model, OPSD(LossSection(), setting.teacher), share=share)

    def run(groups: list[SampleGroup]) -> None:
        setting.model.zero_grad()
        use_kernel(kernel)
        batches = step.micro_batches(groups, setting.max_tokens)
        batches, cache = step.cache_prefixes(batches, setting.max_tokens)
        with setting.autocast():
            for batch in batches:
                setting.backward(step(batch, Totals()))
                cache.batch_done()

    return run


def _compiled(setting: Setting, step: Step) -> Step:
    modules = [
        module
        for model in (setting.model, setting.teacher)
        for layer in model.get_decoder().layers
        for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
    ]
    calls = [torch.compile(module._call_impl, dynamic=True) for module in modules]

    def run(groups: list[SampleGroup]) -> None:
        for module, call in zip(modules, calls, strict=True):
            module._compiled_call_impl = call
        try:
            step(groups)
        finally:
            for module in modules:
                module._compiled_call_impl = None

    return run


@contextmanager
def _attending(attention: Callable[..., Tensor]) -> Iterator[None]:
    ours, stream.packed_attention = stream.packed_attention, attention
    try:
        yield
    finally:
        stream.packed_attention = ours


def grouper_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    """Full attention in PrefixGrouper's form: [T, H, d], [T, K, d] twice → [T, H, d]."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    def rows(states: Tensor, span) -> Tensor:
        return states[span.start : span.start + span.length].transpose(0, 1)[None]

    parts = []
    for segment in layout.segments:
        q = rows(query, segment.queries)
        spans = (*segment.before, layout.key_rows(segment.queries))
        k, v = (torch.cat([rows(x, span) for span in spans], 2) for x in (key, value))
        mask = None
        if segment.before:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(k.shape[2] - q.shape[2])
        parts.append(
            scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scores.scale, enable_gqa=True
            )
        )
    return torch.cat(parts, 2)[0].transpose(0, 1)


def _trl(setting: Setting) -> Step:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    def run(groups: list[SampleGroup]) -> None:
        setting.model.zero_grad()
        samples = [(group, sample) for group in groups for sample in group.samples]
        with setting.autocast():
            for start in range(0, len(samples), TRL_BATCH):
                some = samples[start : start + TRL_BATCH]
                student = _rollout_logits(setting.model, [(g.student, s.rollout) for g, s in some])
                with torch.no_grad():
                    teacher = _rollout_logits(
                        setting.teacher, [(g.teachers[s.teacher], s.rollout) for g, s in some]
                    )
                # 0: forward KL
                per_token = compute_full_logit_self_distillation_loss(
                    student, teacher, distillation_alpha=0.0
                )
                weights = torch.zeros_like(per_token)
                for row, (_, sample) in zip(weights, some, strict=True):
                    row[: sample.tokens] = sample.weight
                setting.backward((per_token * weights).sum())

    return run


def _rollout_logits(model: PreTrainedModel, sequences: Sequence[tuple[Ids, Ids]]) -> Tensor:
    """[B, R, V]: contexts are padded on the left, rollouts on the right, as in TRL's trainer."""
    before = max(len(context) for context, _ in sequences)
    after = max(len(rollout) for _, rollout in sequences)
    ids = torch.zeros(len(sequences), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (context, rollout) in enumerate(sequences):
        begin, end = before - len(context), before + len(rollout)
        ids[row, begin:end] = torch.tensor([*context, *rollout])
        mask[row, begin:end] = 1
    device = model.device
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        use_cache=False,
        logits_to_keep=after + 1,
    )
    return output.logits[:, :-1]
