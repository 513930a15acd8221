"""Count the floating-point operations (FLOPs) of a finished run from its files.

It counts the matrix products with the weights: per token 2 N for a forward pass and 6 N for forward
and backward, where N is the number of parameters used in products. It leaves out attention's own
products, which grow with the length. A prompt counts once per problem and pass, because a shared
prefix runs once; a run without shared prefixes takes more.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from statistics import fmean

from safetensors import SafetensorError, safe_open

from opsd.runs.read import Run


def run_flops(path: Path, run: Run) -> tuple[float | None, bool]:
    """(FLOPs of the whole run, whether they include the prompts'); FLOPs are None if the model's
    size is unknown or there are no steps. Evaluations are not counted."""
    weights = multiplying_parameters(path / "model")
    passes = [
        (role, weights if other is None else multiplying_parameters(Path(other)), share)
        for role, other, share in teacher_passes(run)
    ]
    if weights is None or None in [its for _, its, _ in passes] or not run.metrics:
        return None, False
    last = run.metrics[-1]
    generated, trained = last.get("generated_tokens") or 0, last.get("trained_tokens") or 0
    asked = (run.config.get("train") or {}).get("problems_per_step") or 0
    problems = (last["step"] or len(run.metrics)) * asked
    lengths = context_lengths(path, run, ["student", *(role for role, _, _ in passes)])
    counted = None not in lengths and problems > 0
    student, *shown = [problems * length if counted else 0.0 for length in lengths]
    given = sum(line.get("sft_tokens") or 0 for line in run.metrics)  # after a prompt of its own
    flops = 6 * weights * (trained + student * (2 if given else 1))
    if generated:
        flops += 2 * weights * (generated + student)
    for (_, its, share), hints in zip(passes, shown, strict=True):
        flops += 2 * its * share * (trained - given + hints)
    return flops, counted


def teacher_passes(run: Run) -> list[tuple[str, str | None, float]]:
    """(role, directory, share) of each forward pass of a teacher, or of grpo's reference, over a
    step's rollouts: whose context it sees, where its model is (None for the student's weights), and
    what share of the tokens it sees."""
    loss, teacher = run.config.get("loss") or {}, run.config.get("teacher") or {}
    members = teacher.get("mix") or _routes(run, teacher.get("routes") or {}) or [{}]
    if run.method == "grpo":
        reference = [{**members[0], "context": "student"}] if loss.get("kl") else []
        members = (members if loss.get("credit") or loss.get("distil") else []) + reference
    elif run.method == "sft":
        members = []
    own, found = "student" if run.method == "distill" else "teacher", []
    for member in members:
        implied = "model" if member.get("path") else teacher.get("policy")
        other = (member.get("policy") or implied) == "model"
        path = (member.get("path") or teacher.get("path") or "") if other else None
        found.append((member.get("context") or own, path, member.get("share", 1.0)))
    return found


def _routes(run: Run, routes: dict[str, dict]) -> list[dict]:
    """Each of several teachers with its share of the tokens, the mean over steps."""
    return [
        {**own, "share": fmean(line.get(f"teacher_{name}_tokens") or 0 for line in run.metrics)}
        for name, own in (routes.items() if run.metrics else ())
    ]


def multiplying_parameters(directory: Path) -> int | None:
    """The number of parameters used in matrix products, from the safetensors files of `directory`;
    None without such files.

    It leaves out an input embedding that is not tied to the head, since its rows are looked up. For
    an adapter it includes the base model."""
    base: int | None = 0
    if (directory / "adapter_config.json").is_file():
        from opsd.config.sections import ModelSection
        from opsd.models.adapter_files import model_files

        files = model_files(ModelSection(path=str(directory)), offline=True)
        below = [files.base, *(adapter.section for adapter in files.adapters[:-1])]
        base = multiplying_parameters(Path(below[-1].path))
    sizes: dict[str, int] = {}
    try:
        for path in filter(Path.is_file, directory.glob("*.safetensors")):  # skip pipes
            with safe_open(path, framework="numpy") as file:
                sizes |= {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError):
        return None
    if any(name.endswith("lm_head.weight") for name in sizes):
        sizes = {name: size for name, size in sizes.items() if "embed_tokens" not in name}
    return base + sum(sizes.values()) if sizes and base is not None else None


def context_lengths(path: Path, run: Run, roles: Sequence[str]) -> list[float | None]:
    """The mean length in tokens of each role's prompt, over the sampled problems in the run's
    files; None if the prompts cannot be rendered again."""
    samples = [sample for sample in run.samples if sample.get("problem")]
    model = path / "model"
    there = list(model.iterdir()) if model.is_dir() and not model.is_symlink() else []
    small = [file for file in there if not file.name.endswith(".safetensors")]
    plain = all(file.is_file() and file.stat().st_size < 1 << 28 for file in small)
    if not samples or not plain or model / "tokenizer_config.json" not in there:
        return [None] * len(roles)
    from transformers import AutoTokenizer

    from opsd.config.sections import PromptsSection
    from opsd.data.prompts import Prompts
    from opsd.data.rows import COLUMNS, Row

    try:
        section = PromptsSection(**(run.config.get("prompts") or {}))
        prompts = Prompts(section, AutoTokenizer.from_pretrained(model, trust_remote_code=False))
        each = {sample["problem"]: sample for sample in samples}.values()
        texts = [[str(one.get(name) or "") for name in COLUMNS] for one in each]
        rows = [Row(*three, columns={}) for three in texts]
        return [fmean(len(prompts.ids(row, role)) for row in rows) for role in roles]
    except Exception:  # the template uses other columns, or the tokenizer does not load
        return [None] * len(roles)
