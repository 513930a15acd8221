"""Samples by transformers' continuous batching: a new sequence replaces each finished one."""

import torch
from transformers import GenerationConfig

from opsd.common.errors import UserError
from opsd.rollout.base import Contexts, OwnSampler, Progress, Rollout, Sampling, cut
from opsd.rollout.decoding import decodes_fast

# Tokens in a cache's block: the default of `page_size` (`block_size` before transformers 5.18).
PAGE = 256
MIN_BATCH_TOKENS = 256  # the least limit of tokens in one forward, for prefill


class ContinuousSampler(OwnSampler):
    """Samples with `generate_batch`, for rollouts of very different lengths on a GPU. On a CPU it
    is slower than `generate`: tokens are scored against the keys of all sequences, then masked."""

    engine = "continuous"

    @torch.no_grad()
    def sample(
        self, contexts: Contexts, sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """One rollout for each context, in order; see `Sampler.sample`."""
        from transformers import ContinuousBatchingConfig  # not in the first releases of 5

        drawn = ("temperature", "top_p", "top_k")
        config = GenerationConfig(
            do_sample=sampling.temperature > 0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.stops),
            pad_token_id=min(self.stops),
            **({name: getattr(sampling, name) for name in drawn} if sampling.temperature else {}),
        )
        # By default the cache would take most of the machine's free memory.
        longest = max(map(len, contexts)) + sampling.max_new_tokens
        at_once = min(sampling.batch_size, len(contexts))
        cache = ContinuousBatchingConfig(
            num_blocks=at_once * -(-longest // PAGE),
            max_batch_tokens=max(longest, at_once, MIN_BATCH_TOKENS),
        )
        # generate_batch leaves the model in eval mode and with another attention: restore both.
        was_training = self.model.training
        attention = self.model.config._attn_implementation
        try:
            with decodes_fast(self.model, sampling.max_new_tokens, at_once):
                outputs = self.model.generate_batch(
                    inputs=[list(context) for context in contexts],
                    generation_config=config,
                    continuous_batching_config=cache,
                    progress_bar=False,
                )
        finally:
            if self.model.config._attn_implementation != attention:
                self.model.set_attn_implementation(attention)
            self.model.train(was_training)
        # The keys are request ids, which are numbered in the contexts' order.
        ordered = sorted(outputs.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
        # If its thread dies, it only logs that, and returns the rollouts that are done.
        failed = [output.error for _, output in ordered if output.error is not None]
        if failed or len(ordered) != len(contexts):
            said = failed[0] if failed else "its thread has ended"
            raise UserError(
                f"rollout.engine is 'continuous': {len(contexts) - len(ordered) + len(failed)} of "
                f"{len(contexts)} rollouts failed ({said}); what was saved is kept, and "
                "rollout.engine=generate samples without it"
            )
        rollouts = [cut(output.generated_tokens, self.stops) for _, output in ordered]
        if progress:
            progress(len(rollouts), sum(len(rollout.ids) for rollout in rollouts))
        return rollouts
