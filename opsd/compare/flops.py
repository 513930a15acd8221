"""Floating-point operations of a finished run, from what it left on disk.

Counted are the matrix products with the weights: 2 N a token forward and 6 N forward and backward,
for N parameters that multiply. Attention's own products, which grow with the length, are not. A
prompt is counted once a problem and pass, as a shared prefix is run; a run that repeats it for each
rollout does more.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from opsd.runs.read import Record, Run, value


def run_flops(path: Path, run: Run, config: Record) -> tuple[float | None, bool]:
    """(FLOPs of the whole run, whether prompts are in them); None where the model's size is not
    known or there are no steps. Evaluations are not counted."""
    weights = multiplying_parameters(path / "model")
    teacher_weights = weights
    teacher_section = config.get("teacher") or {}
    if teacher_section.get("policy") == "model":
        teacher_weights = multiplying_parameters(Path(str(teacher_section.get("path"))))
    if weights is None or teacher_weights is None or not run.metrics:
        return None, False
    last = run.metrics[-1]
    generated = value(last, "generated_tokens") or 0.0
    trained = value(last, "trained_tokens") or 0.0
    steps = value(last, "step") or len(run.metrics)
    problems = steps * (value(config.get("train"), "problems_per_step") or 0.0)
    student, teacher = context_lengths(path, run, config)
    teaches = run.method in ("opsd", "distill")
    counted = student is not None and problems > 0 and (teacher is not None or not teaches)
    prompt = problems * student if counted else 0.0
    shown = teacher if run.method == "opsd" else student  # distill's sees what the student sees
    hints = problems * shown if counted and teaches else 0.0
    flops = 6 * weights * (trained + prompt)
    if generated:
        flops += 2 * weights * (generated + prompt)
    if teaches:
        flops += 2 * teacher_weights * (trained + hints)
    return flops, counted


def multiplying_parameters(directory: Path) -> int | None:
    """Parameters of the safetensors in `directory`, but for an input embedding that is not the
    head as well: it is looked up, not multiplied. Beside an adapter's stand those of the directory
    of its model. None without such files."""
    below = 0
    if (directory / "adapter_config.json").is_file():
        from opsd.models.lora import base_of

        base = multiplying_parameters(Path(base_of(directory)[0]))
        if base is None:
            return None
        below = base
    sizes: dict[str, int] = {}
    for path in directory.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, 100_000_000)))
            for name, entry in header.items():
                if name != "__metadata__":
                    size = 1
                    for side in entry["shape"]:
                        size *= side
                    sizes[name] = size
        except (OSError, ValueError, KeyError, TypeError):
            return None
    has_head = any(name.endswith("lm_head.weight") for name in sizes)
    kept = [s for n, s in sizes.items() if not (has_head and "embed_tokens" in n)]
    return below + sum(kept) if kept else None


def context_lengths(path: Path, run: Run, config: Record) -> tuple[float | None, float | None]:
    """Mean tokens of the student's and the teacher's prompts, from the sampled problems that the
    run kept; None where they cannot be made again."""
    samples = [sample for sample in run.samples if sample.get("problem")]
    if not samples or not (path / "model" / "tokenizer_config.json").is_file():
        return None, None
    from transformers import AutoTokenizer

    from opsd.config.sections import PromptsSection
    from opsd.data.prompts import Prompts
    from opsd.data.rows import Row

    try:
        section = PromptsSection(**(config.get("prompts") or {}))
        prompts = Prompts(
            section, AutoTokenizer.from_pretrained(path / "model", trust_remote_code=False)
        )
        rows = {
            sample["problem"]: Row(
                *(str(sample.get(name) or "") for name in ("problem", "solution", "answer")),
                columns={},
            )
            for sample in samples
        }
        lengths = [
            fmean(len(prompts.ids(row, role)) for row in rows.values())
            for role in ("student", "teacher")
        ]
    except (ValueError, OSError, TypeError):  # UserError too: a template over other columns
        return None, None
    return lengths[0], lengths[1]
