"""Samples by transformers' `generate`, in batches of contexts of similar length."""

from itertools import groupby

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from opsd.common.errors import UserError
from opsd.models.generation_config import generating_by
from opsd.models.images import ImageIds, generation_inputs
from opsd.rollout.base import Contexts, OwnSampler, Progress, Rollout, Sampling, cut
from opsd.rollout.decoding import decodes_fast
from opsd.rollout.logits_sampling import Draw
from opsd.rollout.read_once import reads_once

PADDING_CHANGES = 0.05  # relative to the largest logit; rounding to bf16 changes a tenth of this


class GenerateSampler(OwnSampler):
    """Samples in left-padded batches, longest contexts first.

    On two CPU cores this is faster than continuous batching for short rollouts of a small model.
    `vocabulary`: sample no token with this id or a larger one.
    """

    engine = "generate"

    def __init__(
        self, model: PreTrainedModel, stops: frozenset[int], vocabulary: int | None = None
    ):
        super().__init__(model, stops)
        self.vocabulary = vocabulary
        self._padding_is_read: bool | None = None  # not tried yet

    @torch.no_grad()
    def sample(
        self, contexts: Contexts, sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """One rollout for each context, in order; see `Sampler.sample`."""
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]), reverse=True)
        rollouts: list[Rollout | None] = [None] * len(contexts)
        alike = [order]
        if len(set(map(len, contexts))) > 1 and self._reads_padding():
            alike = [list(some) for _, some in groupby(order, lambda i: len(contexts[i]))]
        size = min(sampling.batch_size, max(1, len(contexts)))
        batches = [some[n : n + size] for some in alike for n in range(0, len(some), size)]
        with decodes_fast(self.model, sampling.max_new_tokens * len(batches), size):
            for chosen in batches:
                batch = self._batch([contexts[i] for i in chosen], sampling, progress)
                for i, rollout in zip(chosen, batch, strict=True):
                    rollouts[i] = rollout
                if progress:
                    progress(len(chosen), 0)
        return rollouts

    def _reads_padding(self) -> bool:
        """Whether padding changes the logits, as in RWKV, which takes no mask: then contexts of
        different lengths cannot be in the same batch."""
        if self._padding_is_read is None:
            ids = torch.tensor([[0, 0, 0, 1, 2]], device=self.model.device)
            was_training = self.model.training
            self.model.eval()
            with generating_by(self.model, GenerationConfig()):
                padded, alone = (
                    self.model.generate(
                        input_ids=some,
                        attention_mask=(some > 0).long(),
                        max_new_tokens=1,
                        do_sample=False,
                        output_logits=True,
                        return_dict_in_generate=True,
                        synced_gpus=False,
                    ).logits[0]
                    for some in (ids, ids[:, 3:])
                )
            self.model.train(was_training)
            largest = alone[alone.isfinite()].abs().max()
            apart = (padded - alone).nan_to_num().abs().max()
            self._padding_is_read = bool(apart > PADDING_CHANGES * largest)
        return self._padding_is_read

    def _batch(
        self, contexts: Contexts, sampling: Sampling, progress: Progress | None
    ) -> list[Rollout]:
        width = max(map(len, contexts))
        device = self.model.device
        ids = torch.zeros(len(contexts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, context in enumerate(contexts):
            ids[row, width - len(context) :] = torch.tensor(context)
            mask[row, width - len(context) :] = 1
        counted = 0

        def count(ids: Tensor, scores: Tensor) -> Tensor:  # called for each token
            nonlocal counted
            if not counted and not scores.amax(-1).isfinite().all():  # `draw` would not fail
                raise UserError(
                    "the model's logits are not finite: its weights are damaged, or too large for "
                    f"{str(self.model.dtype).removeprefix('torch.')}"
                )
            counted += len(contexts)
            if progress:
                progress(0, len(contexts))
            if self.vocabulary is not None:  # a teacher's head may have more padding
                scores[:, self.vocabulary :] = -torch.inf
            return scores

        # A sampled image token would have no image, and later forwards of the rollout would fail.
        suppressed = [c.reader.token_id for c in contexts if isinstance(c, ImageIds)][:1] or None
        draw = LogitsProcessorList([count])
        if sampling.temperature:
            draw.append(Draw(sampling))
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.stops),
            pad_token_id=min(self.stops),
            do_sample=False,  # `draw` samples
            use_cache=True,
            suppress_tokens=suppressed,
        )
        was_training = self.model.training
        self.model.eval()
        images = generation_inputs(self.model, contexts, width)
        once = reads_once(self.model, contexts)
        with generating_by(self.model, GenerationConfig()), once:
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=draw,
                synced_gpus=False,  # these weights are complete, even if the trained ones are split
                **images,
            )
        self.model.train(was_training)
        rollouts = [cut(row, self.stops) for row in output[:, width:].tolist()]
        if progress:  # subtract what was counted after the ends of rollouts
            progress(0, sum(len(rollout.ids) for rollout in rollouts) - counted)
        return rollouts
