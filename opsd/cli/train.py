"""`opsd train`: a config file → a run, or with `--dry-run` what it would be."""

import argparse
import json
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `opsd train`."""
    parser.formatter_class = _ConfigHelp
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", help="or, with --resume, the directory of a run")
    add("overrides", nargs="*", metavar="section.field=value")
    add(
        "--dry-run",
        action="store_true",
        help="check config, data, prompts and tokenizer, show the plan, train nothing",
    )
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add(
        "--start-over",
        action="store_true",
        help="with --resume: begin again where there is no checkpoint",
    )
    add(
        "--no-share",
        action="store_true",
        help="run each rollout with a context of its own (train.share_prefixes=false)",
    )


class _ConfigHelp(argparse.RawDescriptionHelpFormatter):
    """`opsd train --help` ends with every field of a config file."""

    def format_help(self) -> str:
        from opsd.config.load import describe

        lines, last = [super().format_help(), "config file:"], None
        for section, name, default, text in describe():
            if section != last:
                lines.append(f"\n  {section or '(top)'}:")
                last = section
            default = default if len(default) <= 40 else "see docs/options.md"
            lines.append(f"    {name}  [{default!s}]\n        {text}")
        return "\n".join(lines) + "\n"


def run(parsed: argparse.Namespace) -> None:
    """Trains by the config. Raises UserError before torch is imported where the config is wrong."""
    from opsd.config.load import load_config
    from opsd.runs.directory import CONFIG

    overrides = [*parsed.overrides, *(["train.share_prefixes=false"] if parsed.no_share else [])]
    file = Path(parsed.config)
    if parsed.resume and file.is_dir():
        overrides.append(f"output.dir={json.dumps(str(file))}")
        file /= CONFIG
    config = load_config(file, overrides)
    from opsd.common.display import Display

    if parsed.dry_run:
        from opsd.cli.dry_run import dry_run
        from opsd.models.load import quiet_transformers

        quiet_transformers()
        dry_run(config, Display())
        return
    from opsd.runs.records import Summary, read_record
    from opsd.training.run import train

    display = Display(quiet=os.environ.get("RANK", "0") != "0")
    directory = train(config, display, resume=parsed.resume, start_over=parsed.start_over)
    summary = read_record(directory / "summary.json", Summary)
    before, after = summary.accuracy.before, summary.accuracy.after
    if before is not None:
        display.note(f"Held-out accuracy: {before:.3f} before, {after:.3f} after")
        best, place = summary.best, "model" if config.output.keep == "best" else "best/model"
        if config.output.keep != "last":
            display.note(f"{place}: of step {best.step}, {best.accuracy:.3f}")
    names = ("model", "report.html", "curves.png", "summary.json")
    display.paths("Written", {name: directory / name for name in names})
