"""The quickstart's course: base model → each method from there → held-out curves → report."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from opsd.checkpoints import save_model
from opsd.config import save_config
from opsd.data import Row
from opsd.display import Display
from opsd.environment import machine, peak_memory, versions
from opsd.errors import UserError
from opsd.evaluate.metrics import wilson_interval
from opsd.evaluate.run import Evaluation, HeldOut
from opsd.models import copy_model, load_model
from opsd.prompts import Prompts
from opsd.quickstart.recipe import Recipe, check_methods, merge, method_config, overridden
from opsd.report import write_report
from opsd.rollout import Sampling
from opsd.runlog import read_lines
from opsd.sections import PromptsSection
from opsd.train import run, write_json


def check_output(directory: Path) -> None:
    """Raises UserError unless `directory` is new or empty: a quickstart is made in one go."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"--output is {str(directory)!r}: it is not empty; choose another, or remove it"
        )


def quickstart(
    display: Display,
    directory: Path,
    methods: Sequence[str],
    *,
    tiny: bool,
    seed: int = 0,
    model_path: str | None = None,
    steps: int | None = None,
    problems: int | None = None,
    solutions: int | None = None,
    voice: str = "words",
    overrides: Sequence[str] = (),
) -> dict:
    """Run it all; returns the summary that is written to `directory`/summary.json.

    Args:
        tiny: the tiny model instead of the real one.
        model_path: another chat model's directory instead of SmolLM2.
        steps: stop each method, and the real model's cold start, after so many steps.
        problems: held-out problems.
        solutions: how many worked solutions there are; none: as many as a method needs.
        voice: whose solutions they are; for the real model.
        overrides: `[method.]section.field=value`, of all methods where none is named.

    Raises UserError for an override that a method's config refuses, before anything is trained.
    """
    begun = time.monotonic()
    if tiny:
        from opsd.quickstart.tiny_recipe import tiny_recipe

        recipe = tiny_recipe(seed, problems, solutions)
    else:
        from opsd.quickstart.smollm2_recipe import COLD_STEPS, smollm2_recipe

        recipe = smollm2_recipe(
            seed, problems, model_path, steps or COLD_STEPS, solutions=solutions, voice=voice
        )
    if steps is not None:
        recipe = replace(
            recipe,
            sections=merge(recipe.sections, {"train": {"warmup_steps": 0}}),
            methods={
                name: merge(own, {"train": {"steps": steps, "warmup_steps": 0}})
                for name, own in recipe.methods.items()
            },
        )
    recipe = replace(recipe, methods=overridden(recipe.methods, overrides))
    check_methods(recipe.sections, {method: recipe.methods[method] for method in methods})
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    test = _tests(recipe)
    base = recipe.make_base(directory, test, display)
    base_path = directory / "base"
    base_path.mkdir(exist_ok=True)
    save_model(base.model, base.tokenizer, base_path)
    # The problems too: a method's config.yaml then holds all that `opsd train` needs to redo it.
    save_rows(recipe.train_rows, base_path / "train.jsonl")
    save_rows(recipe.held_out_rows, base_path / "held_out.jsonl")
    held_out = test(base.tokenizer)
    precision = recipe.sections["train"].get("precision", "bf16")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    decoder = copy_model(base.model, dtype)
    before = {
        "student": held_out.evaluate(decoder, display, "student", "base"),
        "teacher": held_out.first(recipe.teacher_problems).evaluate(
            decoder, display, "teacher", "base as teacher"
        ),
    }
    pretrained = base.pretrained
    del base, decoder
    for method in methods:
        _train_method(recipe, method, base_path, directory / method, seed, before, display)
    summary = _summary(recipe, directory, methods, seed, pretrained, before)
    summary["seconds"] = time.monotonic() - begun
    summary["peak_memory_bytes"] = peak_memory()
    configs = {method: _config(directory / method) for method in methods}
    text = yaml.safe_dump(configs, sort_keys=False, allow_unicode=True)
    (directory / "config.yaml").write_text(text)
    write_json(directory / "summary.json", summary)
    written = write_report(directory)
    _show(display, summary, written)
    return summary


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Rows as JSON lines, all their columns."""
    lines = [json.dumps(dict(row.columns), ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines))


def _tests(recipe: Recipe):
    """tokenizer → the held-out problems in that tokenizer's contexts, answered greedily."""
    rollout, held = recipe.sections["rollout"], recipe.sections["eval"]
    sampling = Sampling(
        rollout["max_new_tokens"], temperature=0, batch_size=held.get("batch_size", 64)
    )
    section = PromptsSection(**recipe.sections["prompts"])
    return lambda tokenizer: HeldOut(
        recipe.held_out_rows, Prompts(section, tokenizer), recipe.grader, sampling
    )


def _train_method(
    recipe: Recipe,
    method: str,
    base: Path,
    directory: Path,
    seed: int,
    before: dict[str, Evaluation],
    display: Display,
) -> None:
    directory.mkdir()
    config = method_config(recipe, method, base, directory, seed, display)
    save_config(config, directory / "config.yaml")
    model, tokenizer = load_model(config.model)
    torch.manual_seed(seed)
    run(
        config,
        model,
        tokenizer,
        recipe.train_rows,
        recipe.held_out_rows,
        recipe.grader,
        display,
        before=before,
        reward=recipe.reward,
    )
    write_report(directory)


def _config(directory: Path) -> dict:
    return yaml.safe_load((directory / "config.yaml").read_text())


def _summary(
    recipe: Recipe,
    directory: Path,
    methods: Sequence[str],
    seed: int,
    pretrained: Evaluation | None,
    before: dict[str, Evaluation],
) -> dict:
    summary: dict = {"model": recipe.name}
    if pretrained is not None:
        summary["pretrained"] = {
            "accuracy": pretrained.accuracy,
            "problems": len(pretrained.grades),
        }
    summary["base"] = {
        "accuracy": before["student"].accuracy,
        "teacher_accuracy": before["teacher"].accuracy,
        "teacher_problems": len(before["teacher"].grades),
    }
    summary["methods"] = {method: _curve(directory / method, method) for method in methods}
    summary["problems"] = len(recipe.held_out_rows)
    return summary | {"seed": seed, "versions": versions(), "machine": machine()}


def _curve(directory: Path, method: str) -> dict:
    """A method's last accuracy, and its curve over the tokens it is charged for."""
    axis = "trained_tokens" if method == "sft" else "generated_tokens"
    lines = [
        line for line in read_lines(directory / "evaluations.jsonl") if line["role"] == "student"
    ]
    last = lines[-1]
    return {
        "accuracy": last["accuracy"],
        "generated_tokens": last["generated_tokens"],
        "trained_tokens": last["trained_tokens"],
        "curve": [[line[axis], line["accuracy"]] for line in lines],
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
    display.note(
        f"{summary['seconds']:.0f} s, peak memory {summary['peak_memory_bytes'] / 1e9:.1f} GB"
    )
    display.paths("Written", written)
