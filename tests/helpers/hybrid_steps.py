"""A step of models that carry a state, with shared contexts against each rollout alone, in turn:

    python -m tests.helpers.hybrid_steps [TYPE ...]

Tiny random models; one problem with contexts of 200 (student) and 1000 (teacher) tokens and eight
rollouts of 256. Prints the median ratio of processor time and the gradients' difference. It should
be 1.5 or more for eight families.
"""

import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`

from helpers.tiny_models import tiny_model
from opsd.config.loss import LossSection
from opsd.objectives import OPSD, Sample, SampleGroup, Totals
from opsd.training.step import OPSDStep

TYPES = """qwen3_5_text qwen3_next falcon_h1 granitemoehybrid nemotron_h lfm2 lfm2_moe mamba2 zamba2
    olmo_hybrid bailing_hybrid zaya minimax""".split()
ROUNDS = 5


def main(types: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for name in types or TYPES:
        torch.manual_seed(0)
        model = tiny_model(name, max_position_embeddings=2048).train()
        ids = torch.randint(3, 60, (4000,)).tolist()
        samples = [Sample(ids[n : n + 256], 1 / 2048) for n in range(0, 2048, 256)]
        group = SampleGroup(ids[2100:2300], samples, [ids[2300:3300]])
        steps = [
            OPSDStep(model, OPSD(LossSection(), model), share=share) for share in (True, False)
        ]
        seconds, gradients = ([], []), [None, None]
        for _ in range(ROUNDS + 1):  # the first warms up
            for way, step in enumerate(steps):
                model.zero_grad()
                begun = time.process_time()
                step([group], Totals()).backward()
                seconds[way].append(time.process_time() - begun)
                gradients[way] = torch.cat([p.grad.flatten() for p in model.parameters()])
        ratios = [alone / shared for shared, alone in zip(*(s[1:] for s in seconds), strict=True)]
        apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
        said = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:18} {statistics.median(ratios):.2f} ({said}), apart {apart:.0e}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
