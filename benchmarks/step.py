"""`python -m benchmarks.step`: a training step with shared prefixes against one without.

One step of OPSD: the teacher's stream without gradient, the student's forward, the fused loss and
backward, for problems with G rollouts of R tokens after contexts of P (student) and P' (teacher).

- shared: `opsd.prefix`, each context once, no padding.
- naive: each rollout with a context of its own, in a padded batch, torch's fused attention.
- grouper: contexts once as well, attention by our own minimal rendering of PrefixGrouper's form
  (arXiv 2506.05433): the prefix's causal attention, and each rollout's over copies of [prefix ;
  own], both by torch's fused attention.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks import machine
from benchmarks.measure import Disagreement, peak_bytes
from opsd.config import LossSection, ModelSection
from opsd.hidden import Scored
from opsd.models import copy_model, load_model
from opsd.objectives import OPSD, Sample, Totals
from opsd.prefix import stream
from opsd.prefix.layout import Layout
from opsd.step import OPSDStep, token_ratio


@dataclass(frozen=True)
class Case:
    """Problems, rollouts a problem, and tokens: student's, teacher's context, rollout."""

    problems: int
    rollouts: int
    student: int
    teacher: int
    length: int

    def samples(self, vocabulary: int) -> list[Sample]:
        """Random tokens; rollouts of 3/4 R to R tokens."""
        draw = torch.Generator().manual_seed(0)

        def ids(n: int) -> list[int]:
            return torch.randint(vocabulary, (n,), generator=draw).tolist()

        samples = []
        for _ in range(self.problems):
            contexts = ids(self.student), ids(self.teacher)
            for index in range(self.rollouts):
                rollout = ids(self.length - index * self.length // (4 * self.rollouts))
                samples.append(Sample(tuple(Scored(c, rollout) for c in contexts), 1e-3))
        return samples


CASES = [
    Case(1, 8, 200, 1000, 256),  # the design's example
    Case(1, 4, 200, 1000, 256),
    Case(2, 2, 200, 1000, 256),
    Case(4, 1, 200, 1000, 256),
    Case(1, 8, 100, 2000, 128),
    Case(1, 8, 100, 200, 512),
]


def grouper_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float, **_
) -> Tensor:
    """PrefixGrouper's form for full attention: [T, H, d], [T, K, d] twice → [T, H, d]."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    def rows(states: Tensor, span) -> Tensor:
        return states[span.start : span.start + span.length].transpose(0, 1)[None]

    parts = []
    for segment in layout.segments:
        q = rows(query, segment.queries)
        spans = (*segment.before, segment.queries)
        k, v = (torch.cat([rows(x, span) for span in spans], 2) for x in (key, value))
        mask = None
        if segment.before:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
            mask = mask.tril(k.shape[2] - q.shape[2])
        parts.append(
            scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(parts, 2)[0].transpose(0, 1)


def make_step(model: PreTrainedModel, teacher: PreTrainedModel, name: str, bf16: bool) -> Callable:
    """samples → None: one step's forward and backward by the named way."""
    step = OPSDStep(model, OPSD(LossSection(), teacher), share=name != "naive")
    ours = stream.packed_attention

    def run(samples: list[Sample], max_tokens: int) -> None:
        model.zero_grad()
        stream.packed_attention = grouper_attention if name == "grouper" else ours
        try:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                for batch in step.micro_batches(samples, max_tokens):
                    loss = step(batch, Totals())
                    with torch.autocast(model.device.type, enabled=False):
                        loss.backward()
        finally:
            stream.packed_attention = ours

    return run


def gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def measure(case: Case, model, teacher, bf16: bool, max_tokens: int, rounds: int) -> dict:
    """One row of the report. Raises Disagreement before anything is timed."""
    samples = case.samples(model.config.vocab_size)
    names = ("shared", "naive", "grouper")
    steps = {name: make_step(model, teacher, name, bf16) for name in names}
    gradients = {}
    for name, step in steps.items():  # a warm-up at once
        step(samples, max_tokens)
        gradients[name] = gradient(model)
    for name, found in gradients.items():
        error = float((found - gradients["naive"]).norm() / gradients["naive"].norm())
        if not error < (5e-2 if bf16 else 1e-4):
            raise Disagreement(f"{name} and naive differ by {error:.1e} in the gradient")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start, used = time.perf_counter(), time.process_time()
            step(samples, max_tokens)
            seconds[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - used)
    return {
        "case": asdict(case),
        "token_ratio": token_ratio(samples),
        "seconds": {n: {"min": min(t), "median": statistics.median(t)} for n, t in seconds.items()},
        # What other processes took is not in these.
        "cpu_seconds": {
            n: {"min": min(t), "median": statistics.median(t)} for n, t in busy.items()
        },
        "peak_bytes": {
            name: peak_bytes(lambda step=step: step(samples, max_tokens))
            for name, step in steps.items()
        },
    }


def tiny() -> PreTrainedModel:
    """Four layers, D = 256, 8 heads over 4, V = 4096, random weights, fp32."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=8192,
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--model", help="a model's directory instead of four random layers")
    parser.add_argument("--case", metavar="N,G,P,P',R", help="problems and lengths (see above)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks-step.json"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [Case(*map(int, options.case.split(",")))] if options.case else CASES
    model = load_model(ModelSection(path=options.model))[0] if options.model else tiny()
    teacher = copy_model(model, torch.bfloat16 if options.bf16 else torch.float32)
    model.train()
    rows, refused = [], []
    print(
        f"{'N,G,P,Pt,R':22}{'shared':>9}{'naive ÷':>9}{'grouper ÷':>11}{'tokens ÷':>10}   peak MiB"
    )
    for case in cases:
        label = ",".join(map(str, asdict(case).values()))
        try:
            row = measure(
                case, model, teacher, options.bf16, options.micro_batch_tokens, options.rounds
            )
        except Disagreement as error:
            refused.append(f"{label}: {error}")
            print(f"{label:22}refused: {error}")
            continue
        rows.append(row)
        cpu = {name: t["min"] for name, t in row["cpu_seconds"].items()}
        peaks = ", ".join(
            f"{name} {'-' if peak is None else f'{peak / 2**20:.0f}'}"
            for name, peak in row["peak_bytes"].items()
        )
        print(
            f"{label:22}{cpu['shared']:8.2f}s{cpu['naive'] / cpu['shared']:9.2f}"
            f"{cpu['grouper'] / cpu['shared']:11.2f}{row['token_ratio']:10.2f}   {peaks}",
            flush=True,
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine.describe(), "options": vars(options), "refused": refused}
    report |= {"rows": rows}
    options.output.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(f"written: {options.output}; times are CPU seconds, minimum of {options.rounds}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
