"""The outputs of vLLM's `LLM.generate` that we read, sampled from a real model."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from helpers.training_cases import logits
from opsd.rollout import GenerateSampler, Sampling
from opsd.rollout.vllm_colocated import ColocatedSampler


def colocated(model, stops) -> ColocatedSampler:
    """The sampler of vLLM in this process, without a GPU or vLLM."""
    sampler = ColocatedSampler.__new__(ColocatedSampler)
    sampler.stops, sampler.trains, sampler._sleeps, sampler._awake = stops, False, False, True
    sampler.llm = SimpleNamespace(generate=lambda *asked, use_tqdm: outputs(model, *asked))
    sampler._vllm = SimpleNamespace(SamplingParams=lambda **asked: SimpleNamespace(**asked))
    return sampler


def outputs(model, prompts: Sequence, parameters: Sequence, temperature=None) -> list:
    """An output for each prompt: tokens, sampled as asked or at this temperature, with their
    log-probabilities by the model."""
    made = []
    for prompt, asked in zip(prompts, parameters, strict=True):
        context = prompt["prompt_token_ids"]
        sampler = GenerateSampler(model, frozenset(asked.stop_token_ids))
        drawn = asked.temperature if temperature is None else temperature
        sampling = Sampling(asked.max_tokens, drawn, top_p=asked.top_p, top_k=asked.top_k)
        (rollout,) = sampler.sample([context], sampling)
        with torch.no_grad():
            own = logits(model, context, rollout.ids).log_softmax(-1)
        log_probs = [
            {token: SimpleNamespace(logprob=float(own[n, token]))}
            for n, token in enumerate(rollout.ids)
        ]
        output = SimpleNamespace(token_ids=rollout.ids, logprobs=log_probs)
        made.append(SimpleNamespace(outputs=[output]))
    return made
