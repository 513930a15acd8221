"""`opsd compare`: compares finished runs, configs trained with several seeds, or a study's runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.files import write_file, write_json
from opsd.common.near import near_file
from opsd.common.urls import is_address
from opsd.compare import page as pages
from opsd.compare.comparison import Comparison, compare, to_json
from opsd.compare.study import Study, load_study, overrides, run_jobs, study_jobs, train_jobs
from opsd.compare.study_page import study_columns, study_notes, study_page, study_rows
from opsd.config.yaml import MAX_BYTES
from opsd.runs.read import check_directory

FILES = ("comparison.json", "comparison.html", "comparison.md", "comparison.png")


def run(asked: argparse.Namespace) -> None:
    """Trains what is not finished, compares the runs, writes comparison.json and pages to --output.

    The paths are run directories; or configs of `opsd train`, each trained with each seed; or one
    study file. Raises UserError.
    """
    output, seeds, display = asked.output, _seeds(asked.seeds), Display()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output is {str(output)!r}: it is not a directory")
    files = [path for path in asked.paths if path.suffix in (".yaml", ".yml")]
    if files and len(files) != len(asked.paths):
        raise UserError("RUN_DIR: give either run directories or configs, not both")
    for path in files:
        if not path.is_file():
            raise UserError(f"CONFIG is {str(path)!r}: no such file{near_file(path)}")
    if not files and (seeds, asked.tokens) != (None, None):
        raise UserError("--seeds and --tokens are for configs; the runs named here are finished")
    if len(files) == 1 and is_study(files[0]):
        if (seeds, asked.tokens) != (None, None):
            raise UserError(f"--seeds, --tokens: {files[0]} has its own seeds and budget")
        study = load_study(files[0])
        run_study(study, asked.target, asked.baseline or study.baseline, output, display)
        return
    # A study's logs and tables lie beside its runs, for a shell's * to find.
    paths = [p for p in asked.paths if p.suffix != ".log" and p.name not in FILES] or asked.paths
    if files:
        jobs = train_jobs(files, [0, 1, 2] if seeds is None else seeds, output, asked.tokens)
        run_jobs(jobs, display, gpus=gpus())
        paths = [job.directory for job in jobs]
    for path in paths:
        check_directory(path)
    with display.stage("Compare the runs"):
        comparison = compare(paths, asked.target, asked.baseline)
        _write(comparison, output)
    _show(comparison, display)
    display.paths("Written", {name: output / name for name in FILES})


def _seeds(text: str | None) -> list[int] | None:
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) != len(words):
        raise UserError(f"--seeds is {text!r}: it must list numbers such as 0,1,2, each once")
    return [int(word) for word in words] or None


def gpus() -> list[str]:
    """Returns the GPUs to spread the runs over, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(index) for index in range(count)])[:count]


def is_study(path: Path) -> bool:
    """Whether a YAML file describes a study, not a single run."""
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = file.read(MAX_BYTES).splitlines()
    return any(line.startswith("quickstart:") for line in lines)


def run_study(
    study: Study, target: float | None, baseline: str | None, output: Path, display: Display
) -> None:
    """Runs all variants and compares the runs of each; several variants also get a common page."""
    check_settings(study)
    variants = study_jobs(study, output)
    run_jobs([job for jobs in variants.values() for job in jobs], display, study.threads)
    comparisons = {
        name: compare([job.directory for job in jobs], target, baseline)
        for name, jobs in variants.items()
    }
    written = {}
    for name, comparison in comparisons.items():
        place = output / name if len(comparisons) > 1 else output
        _write(comparison, place)
        written[name] = place / FILES[1]
        if len(comparisons) == 1:
            _show(comparison, display)
    if len(comparisons) > 1:
        records = {name: comparison.record() for name, comparison in comparisons.items()}
        write_json(output / "study.json", records)
        write_file(output / "study.html", study_page(study, comparisons))
        columns, lines = study_columns(study, comparisons), study_rows(study, comparisons)
        write_file(output / "study.md", pages.markdown(columns, lines, study_notes(comparisons)))
        display.table("Held-out accuracy", columns, lines)
        written = {"study.html": output / "study.html", **written}
    display.paths("Written", written)


def check_settings(study: Study) -> None:
    """Raises UserError, before anything runs, if the settings of a cell give an invalid config."""
    if not any((study.settings, study.variants)):
        return
    from opsd.quickstart import smollm2_recipe, tiny_recipe
    from opsd.quickstart.recipe import check_methods, overridden

    instead = "compare configs of `opsd train` instead"
    recipe = tiny_recipe if study.quickstart == "tiny" else smollm2_recipe
    for cell in study.cells:
        methods = overridden(recipe.METHODS, overrides(study, cell))
        try:
            named = {str(name): methods[name] for name in study.methods}
            for config in check_methods(recipe.SECTIONS, named):
                loss, paths = config.loss, [own.path for own in config.teacher.members()]
                own_code = loss.reward.verifier != "math" or loss != loss.without_code()
                if own_code or config.model.trust_remote_code:
                    said = "run no code (loss.reward.verifier, model.trust_remote_code)"
                    raise UserError(f"a study may {said}: {instead}")
                output = config.output.push_to_hub or config.output.report_to
                if output or config.rollout.server or any(map(is_address, paths)):
                    said = "(an address, output.push_to_hub, output.report_to)"
                    raise UserError(f"a study may send nothing to a server {said}: {instead}")
        except UserError as error:
            where = f"variants.{cell.name}" if study.variants else "settings"
            raise UserError(f"{where}: {error}") from None


def _write(comparison: Comparison, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / FILES[0], to_json(comparison))
    write_file(directory / FILES[1], pages.page(comparison))
    notes = [pages.title(comparison) + ".", *comparison.notes]
    text = pages.markdown(pages.COLUMNS, pages.rows(comparison), notes)
    if seeds := pages.seed_rows(comparison):
        text += "\n" + pages.markdown(pages.seed_columns(comparison), seeds)
    write_file(directory / FILES[2], text)
    write_file(directory / FILES[3], lambda file: pages.write_comparison(comparison, file))


def _show(comparison: Comparison, display: Display) -> None:
    rows, columns = pages.rows(comparison), list(pages.COLUMNS)
    display.table(pages.title(comparison), columns, rows)
    for note in comparison.notes:
        display.note(note)
