"""What vLLM's `LLM.generate` returns, as far as we read it, from a real model's own draws."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from helpers.training_cases import logits
from opsd.rollout import GenerateSampler, Sampling


def outputs(model, prompts: Sequence, parameters: Sequence, temperature: float) -> list:
    """An output for each prompt: tokens, and the log-probability of each under the model."""
    made = []
    for prompt, asked in zip(prompts, parameters, strict=True):
        context = prompt["prompt_token_ids"]
        sampler = GenerateSampler(model, frozenset(asked.stop_token_ids))
        (rollout,) = sampler.sample([context], Sampling(asked.max_tokens, temperature=temperature))
        with torch.no_grad():
            own = logits(model, context, rollout.ids).log_softmax(-1)
        log_probs = [
            {token: SimpleNamespace(logprob=float(own[n, token]))}
            for n, token in enumerate(rollout.ids)
        ]
        output = SimpleNamespace(token_ids=rollout.ids, logprobs=log_probs)
        made.append(SimpleNamespace(outputs=[output]))
    return made
