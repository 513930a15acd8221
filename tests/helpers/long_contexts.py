"""The memory of a step with a long teacher's context, of random weights, in this process:

    python -m tests.helpers.long_contexts TOKENS [LAYERS]

Without LAYERS the model is tiny; with it, it is as wide as Qwen2.5-0.5B, which has 24. Prints the
resident peak and the context's cache, in MB. Run it for 4000 and for 32000 tokens: the second peak
should be within 10 % of the first, and the caches' difference.
"""

import resource
import sys
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from opsd.config.loss import LossSection
from opsd.objectives import OPSD, Sample, SampleGroup, Totals
from opsd.training.step import OPSDStep

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HALF_A_BILLION = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def main(tokens: int, layers: int | None = None) -> None:
    """Train one step of a group: a prompt of 200 tokens, two rollouts of 64."""
    sizes = {**HALF_A_BILLION, "num_hidden_layers": layers} if layers else TINY
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, max_position_embeddings=65536))
    ids = torch.randint(3, sizes["vocab_size"], (tokens + 400,)).tolist()
    samples = [Sample(ids[n : n + 64], 1 / 128) for n in (0, 64)]
    group = SampleGroup(ids[128:328], samples, [ids[400:]])
    step, begun = OPSDStep(model, OPSD(LossSection(), model)), time.process_time()
    step([group], Totals()).backward()
    seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    config = model.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    cache = 8 * config.num_hidden_layers * width * tokens >> 20
    print(f"{tokens} tokens: peak {peak} MB, cache {cache} MB, {seconds:.0f} s of processor time")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
