"""Floating-point operations of a finished run, from what it left on disk.

The matrix products with the weights are counted: 2 N for each token forward and 6 N forward and
backward, for N parameters that multiply. Attention's own products, which grow with the length, are
not counted. A prompt counts once for each problem and pass, because a shared prefix runs once; a
run that repeats it for each rollout does more.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from statistics import fmean

from safetensors import SafetensorError, safe_open

from opsd.runs.read import Run


def run_flops(path: Path, run: Run) -> tuple[float | None, bool]:
    """(FLOPs of the whole run, whether they include the prompts'); None where the model's size is
    not known or there are no steps. Evaluations are not counted."""
    weights = multiplying_parameters(path / "model")
    teacher_weights = weights
    other = run.config.get("teacher") or {}
    if other.get("policy") == "model":
        teacher_weights = multiplying_parameters(Path(other.get("path") or ""))
    if weights is None or teacher_weights is None or not run.metrics:
        return None, False
    last = run.metrics[-1]
    generated, trained = last.get("generated_tokens") or 0, last.get("trained_tokens") or 0
    asked = (run.config.get("train") or {}).get("problems_per_step") or 0
    problems = (last["step"] or len(run.metrics)) * asked
    student, teacher = context_lengths(path, run)
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
    """How many parameters in the safetensors of `directory` multiply; None without such files.

    An input embedding that is not the head as well does not: its rows are looked up. To those of
    an adapter, the parameters of its base model are added.
    """
    base: int | None = 0
    if (directory / "adapter_config.json").is_file():
        from opsd.config.sections import ModelSection
        from opsd.models.adapter_files import model_files

        files = model_files(ModelSection(path=str(directory)), offline=True)
        below = [files.base, *(adapter.section for adapter in files.adapters[:-1])]
        base = multiplying_parameters(Path(below[-1].path))
    sizes: dict[str, int] = {}
    try:
        for path in filter(Path.is_file, directory.glob("*.safetensors")):  # no pipe
            with safe_open(path, framework="numpy") as file:
                sizes |= {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError):
        return None
    if any(name.endswith("lm_head.weight") for name in sizes):
        sizes = {name: size for name, size in sizes.items() if "embed_tokens" not in name}
    return base + sum(sizes.values()) if sizes and base is not None else None


def context_lengths(path: Path, run: Run) -> tuple[float | None, float | None]:
    """Mean tokens of the student's and the teacher's prompts, from the sampled problems that the
    run kept; None where they cannot be made again."""
    samples = [sample for sample in run.samples if sample.get("problem")]
    model = path / "model"
    there = list(model.iterdir()) if model.is_dir() and not model.is_symlink() else []
    small = [file for file in there if not file.name.endswith(".safetensors")]
    plain = all(file.is_file() and file.stat().st_size < 1 << 28 for file in small)
    if not samples or not plain or model / "tokenizer_config.json" not in there:
        return None, None
    from transformers import AutoTokenizer

    from opsd.config.sections import PromptsSection
    from opsd.data.prompts import Prompts
    from opsd.data.rows import Row

    try:
        section = PromptsSection(**(run.config.get("prompts") or {}))
        prompts = Prompts(section, AutoTokenizer.from_pretrained(model, trust_remote_code=False))
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
    except Exception:  # a template over other columns, a tokenizer that is none
        return None, None
    return lengths[0], lengths[1]
