"""Run the quickstart: make the base model, train it by each method, write curves and the report.

An interrupted quickstart can be resumed: it keeps the base, if it had been evaluated, and the
finished methods, and resumes the unfinished method from its last checkpoint, if there is one.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml
from pydantic import TypeAdapter

from opsd.common.display import Display
from opsd.common.errors import UserError, in_short
from opsd.common.files import write_file, write_json, write_lines
from opsd.common.precision import compute_dtype
from opsd.common.statistics import wilson_interval
from opsd.common.strict_json import read_text
from opsd.common.system import machine, peak_memory, versions
from opsd.config.sections import PromptsSection
from opsd.data.prompts import Prompts
from opsd.models.copies import copy_model
from opsd.models.load import load_model
from opsd.quickstart.recipe import Recipe, check_methods, merge, method_config, overridden, repeated
from opsd.quickstart.settings import ARGUMENTS, OUTPUT, Asked
from opsd.report import write_report
from opsd.rollout import Sampling
from opsd.runs.directory import claim_directory, locked
from opsd.runs.log import student_curve
from opsd.runs.records import Anything, read_record
from opsd.training.checkpoints import save_model
from opsd.training.held_out import Evaluation, HeldOut
from opsd.training.run import run

Evaluations = dict[str, Evaluation]
_EVALUATIONS = TypeAdapter(Evaluations)


def quickstart(
    display: Display, directory: Path, methods: Sequence[str], asked: Asked, resume: bool = False
) -> dict:
    """Run a quickstart; returns the summary that is written to `directory`/summary.json.

    resume: continue an interrupted quickstart, or add methods to one; the summary's seconds and
    peak memory are then those of the last call.

    Raises UserError, before anything is trained, for an override that a method's config refuses,
    and for a directory that holds something else or is in use by another process.
    """
    begun = time.monotonic()
    if asked.tiny:
        from opsd.quickstart.tiny_recipe import tiny_recipe as make_recipe
    else:
        from opsd.quickstart.smollm2_recipe import smollm2_recipe as make_recipe
    recipe = make_recipe(asked)
    if asked.steps is not None:
        sections = merge(recipe.sections, {"train": {"warmup_steps": 0}})
        few = {"train": {"steps": asked.steps, "warmup_steps": 0}}
        own = {name: merge(sections, few) for name, sections in recipe.methods.items()}
        recipe = replace(recipe, sections=sections, methods=own)
    recipe = replace(recipe, methods=overridden(recipe.methods, asked.overrides))
    check_methods(recipe.sections, {method: recipe.methods[method] for method in methods})
    with locked(directory, OUTPUT, ARGUMENTS, display.note):
        asked.claim(directory, resume)
        (directory / "summary.json").unlink(missing_ok=True)  # it marks a finished quickstart
        torch.manual_seed(asked.seed)
        before = _make_base(recipe, directory, display)
        for method in methods:
            _train_method(recipe, method, directory, asked.seed, before, display)
        there = [name for name in recipe.methods if name in methods or _done(directory / name)]
        summary = _summary(recipe, directory, there, asked.seed, before)
        summary["seconds"] = time.monotonic() - begun
        summary["peak_memory_bytes"] = peak_memory()
        configs = {method: _config(directory / method) for method in there}
        text = yaml.safe_dump(configs, sort_keys=False, allow_unicode=True)
        write_file(directory / "config.yaml", text)
        write_json(directory / "summary.json", summary)
        with display.stage("Write the report"):
            written = write_report(directory)
    _show(display, summary, written)
    return summary


def _make_base(recipe: Recipe, directory: Path, display: Display) -> Evaluations:
    """Make `directory`/base, the model and the problems of all methods, unless it exists.

    Returns the base's evaluations by role, and that of the "pretrained" model, if there is one.
    """
    place = directory / "base"
    measured = place / "evaluations.json"  # written last, so it marks a complete base
    if measured.is_file():
        try:
            return _EVALUATIONS.validate_json(read_text(measured), strict=True)
        except ValueError as error:
            raise UserError(f"{str(measured)!r} is damaged ({in_short(error)})") from None
    test = _tests(recipe)
    base = recipe.make_base(directory, test, display)
    place.mkdir(exist_ok=True)
    save_model(base.model, base.tokenizer, place)
    # Save the problems too, so that `opsd train` can repeat a run from its config.yaml.
    rows = repeated(recipe.problems, recipe.solutions)
    write_lines(place / "train.jsonl", (dict(row.columns) for row in rows))
    write_lines(place / "held_out.jsonl", (dict(row.columns) for row in recipe.held_out_rows))
    held_out = test(base.tokenizer)
    precision = recipe.sections["train"].get("precision", "auto")
    decoder = copy_model(base.model, compute_dtype(precision))
    before = {"student": held_out.evaluate(decoder, display, "student", "base")}
    some = held_out.first(recipe.teacher_problems)
    before["teacher"] = some.evaluate(decoder, display, "teacher", "base as teacher")
    if base.pretrained is not None:
        before["pretrained"] = base.pretrained
    write_json(measured, {name: asdict(result) for name, result in before.items()})
    return before


def _tests(recipe: Recipe):
    """A function from a tokenizer to the held-out problems for it, to be answered greedily."""
    rollout, held = recipe.sections["rollout"], recipe.sections["eval"]
    size = held.get("batch_size", 64)
    sampling = Sampling(rollout["max_new_tokens"], temperature=0, batch_size=size)
    section = PromptsSection(**recipe.sections["prompts"])
    return lambda tokenizer: HeldOut(
        recipe.held_out_rows, Prompts(section, tokenizer), recipe.grader, sampling
    )


def _train_method(
    recipe: Recipe, method: str, directory: Path, seed: int, before: Evaluations, display: Display
) -> None:
    place = directory / method
    if not _done(place):
        config = method_config(recipe, method, directory, seed, display)
        rows = repeated(recipe.problems, recipe.solutions, config.prompts.hold)
        if config.prompts.hold:
            write_lines(Path(str(config.data.source)), (dict(row.columns) for row in rows))
        checkpoint = claim_directory(place, config, resume=True)
        model, tokenizer = load_model(config.model)
        torch.manual_seed(seed)
        given = config, model, tokenizer, rows, recipe.held_out_rows, recipe.grader, display
        own = {role: before[role] for role in ("student", "teacher")}
        run(*given, checkpoint=checkpoint, before=own, verifier=recipe.verifier)
    with display.stage("Write the report"):
        write_report(place)


def _done(run_directory: Path) -> bool:
    return (run_directory / "summary.json").is_file()


def _config(directory: Path) -> dict:
    return read_record(directory / "config.yaml", Anything).record


def _summary(
    recipe: Recipe, directory: Path, methods: Sequence[str], seed: int, before: Evaluations
) -> dict:
    summary: dict = {"model": recipe.name}
    if (pretrained := before.get("pretrained")) is not None:
        problems = len(pretrained.grades)
        summary["pretrained"] = {"accuracy": pretrained.accuracy, "problems": problems}
    summary["base"] = {
        "accuracy": before["student"].accuracy,
        "teacher_accuracy": before["teacher"].accuracy,
        "teacher_problems": len(before["teacher"].grades),
    }
    summary["methods"] = {method: _curve(directory / method, method) for method in methods}
    summary["problems"] = len(recipe.held_out_rows)
    return summary | {"seed": seed, "versions": versions(), "machine": machine()}


def _curve(directory: Path, method: str) -> dict:
    """The accuracy of the model that a method keeps in model/, and its curve over generated tokens,
    or trained ones for sft."""
    axis = "trained_tokens" if method == "sft" else "generated_tokens"
    lines = student_curve(directory)
    if not lines or any(getattr(line, axis) is None for line in lines):
        raise UserError(f"{str(directory)!r} has no whole evaluations.jsonl: remove the directory")
    last, best = lines[-1], max(lines, key=lambda line: line.accuracy)
    kept = best if _config(directory)["output"]["keep"] == "best" else last
    return {
        "accuracy": kept.accuracy,
        "generated_tokens": last.generated_tokens,
        "trained_tokens": last.trained_tokens,
        "curve": [[getattr(line, axis), line.accuracy] for line in lines],
    }


def _show(display: Display, summary: dict, written: dict[str, Path]) -> None:
    n = summary["problems"]

    def row(name: str, accuracy: float, tokens: str, n: int = n) -> list[str]:
        low, high = wilson_interval(accuracy * n, n)
        return [name, f"{accuracy:.3f}", f"{low:.3f} to {high:.3f}", tokens]

    rows = []
    if "pretrained" in summary:
        before = summary["pretrained"]
        rows.append(row("pretrained", before["accuracy"], "-", before["problems"]))
    base = summary["base"]
    rows.append(row("base", base["accuracy"], "0"))
    shown = base["teacher_accuracy"], "-", base["teacher_problems"]
    rows.append(row("base, shown the solution", *shown))
    for method, result in summary["methods"].items():
        tokens = result["trained_tokens" if method == "sft" else "generated_tokens"]
        kind = "trained" if method == "sft" else "generated"
        rows.append(row(method, result["accuracy"], f"{tokens:,} {kind}"))
    columns = ["model", "held-out accuracy", "95 % interval", "tokens"]
    display.table(f"{summary['model']}, {n} held-out problems", columns, rows)
    peak = summary["peak_memory_bytes"] / 1e9
    display.note(f"{summary['seconds']:.0f} s, peak memory {peak:.1f} GB")
    display.paths("Written", written)
