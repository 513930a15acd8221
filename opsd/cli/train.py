"""`opsd train`: trains by a config file; with `--dry-run`, checks it and shows the plan."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from shutil import get_terminal_size
from textwrap import TextWrapper
from typing import TYPE_CHECKING

from opsd.common.errors import UserError

if TYPE_CHECKING:
    from opsd.common.display import Display
    from opsd.config.config import Config


def more() -> str:
    """Describes every config field, for the end of `opsd train --help`."""
    from opsd.config.load import describe

    lines, last, indent = ["config file:"], None, 8 * " "
    wrap = TextWrapper(get_terminal_size().columns - 2, indent, indent, break_on_hyphens=False)
    for section, name, default, text in describe():
        if section != last:
            lines.append(f"\n  {section or '(top)'}:")
            last = section
        default = default if len(default) <= 40 else "see docs/options.md"
        lines += [f"    {name}  [{default!s}]", wrap.fill(text)]
    return "\n".join(lines) + "\n"


def run(parsed: argparse.Namespace) -> None:
    """Trains by the config. Raises UserError for a wrong config before torch is imported."""
    from opsd.cli.first_look import check_inputs, check_output, import_torch
    from opsd.cli.plan_arguments import machine_of
    from opsd.common.display import Display
    from opsd.common.near import near_file
    from opsd.config.load import load_recipe
    from opsd.runs.directory import CONFIG, checkpoints_in, is_done

    overrides = [*parsed.overrides, *(["train.share_prefixes=false"] if parsed.no_share else [])]
    file = Path(parsed.config)
    if parsed.resume and (file / CONFIG).is_file():
        overrides.append(f"output.dir={json.dumps(str(file))}")
        file /= CONFIG
    runs = load_recipe(file, overrides)
    machine = None if parsed.machine is None else machine_of(parsed.machine, "--for")
    if machine is not None and not parsed.dry_run:
        raise UserError("--for is for --dry-run: it trains nothing")
    # A later run starts from an earlier run's model, which does not exist yet: check the first's.
    checked = [config.model_copy(update={"model": runs[0].model}) for config in runs]
    for config in checked:
        # A done run needs no model.
        check_inputs(config, hub=not parsed.resume, here=machine is None)
    display = Display(quiet=os.environ.get("RANK", "0") != "0")
    for config in [] if parsed.dry_run or display.quiet else runs:
        check_output(config, parsed.resume, parsed.start_over)
        if parsed.resume and not (place := Path(config.output.dir)).exists():
            display.note(f"There is no {place} to go on from: it begins{near_file(place)}")
    import_torch(display, "opsd.training.run")
    if parsed.dry_run:
        from opsd.cli.dry_run import dry_run

        for config in checked:
            dry_run(config, display, machine)
        return
    for config in runs:
        directory = Path(config.output.dir)
        # A run by itself is looked at again from its last checkpoint, if it has kept one.
        again = parsed.start_over or checkpoints_in(directory) or not (directory / "model").is_dir()
        if done := parsed.resume and is_done(directory, config):
            display.note(f"{directory} is done; a larger train.steps goes on")
        if not done or (len(runs) == 1 and again):
            _train(config, display, parsed)


def _train(config: Config, display: Display, parsed: argparse.Namespace) -> None:
    from opsd.runs.log import student_curve
    from opsd.runs.records import Summary, read_record
    from opsd.training.run import train

    directory = train(config, display, resume=parsed.resume, start_over=parsed.start_over)
    summary = read_record(directory / "summary.json", Summary)
    if curve := student_curve(directory):
        said = [f"{one.accuracy:.3f} ({one.low:.3f} to {one.high:.3f})" for one in curve]
        display.note(f"Held-out accuracy: {said[0]} before, {said[-1]} after (95 % intervals)")
        best, place = summary.best, "model" if config.output.keep == "best" else "best/model"
        if config.output.keep != "last":
            display.note(f"{place}: of step {best.step}, {best.accuracy:.3f}")
    names = ("model", "report.html", "curves.png", "summary.json")
    display.paths("Written", {name: directory / name for name in names})
