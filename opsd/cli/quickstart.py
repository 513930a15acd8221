"""`opsd quickstart`: checks the arguments, then trains a small model and compares methods."""

import argparse
from dataclasses import fields
from pathlib import Path

from opsd.common.errors import UserError
from opsd.config.names import METHODS
from opsd.data.solution_styles import SOLUTION_STYLES


def run(parsed: argparse.Namespace) -> None:
    """Checks the arguments and runs the quickstart. Raises UserError."""
    methods = _methods(parsed.methods, parsed.tiny)
    if parsed.tiny and parsed.model:
        raise UserError("--model and --tiny exclude each other: --tiny makes its own model")
    if parsed.solution_style not in SOLUTION_STYLES:
        known = ", ".join(SOLUTION_STYLES)
        raise UserError(f"--solution-style is {parsed.solution_style!r}: it must be one of {known}")
    if parsed.tiny and parsed.solution_style != "words":
        raise UserError("--solution-style and --tiny exclude each other: worksheets have one")
    output = Path(parsed.output or ("runs/tiny" if parsed.tiny else "runs/quickstart"))
    from opsd.cli.first_look import check_model, import_torch
    from opsd.common.display import Display
    from opsd.quickstart.settings import ARGUMENTS, OUTPUT, Asked
    from opsd.runs.directory import locked

    if parsed.model:
        check_model(parsed.model, "--model", hub=True)
    asked = Asked(**{field.name: getattr(parsed, field.name) for field in fields(Asked)})
    if output.exists():
        with locked(output, OUTPUT, ARGUMENTS):
            asked.claim(output, parsed.resume)
    display = Display()
    import_torch(display)
    from opsd.quickstart.run import quickstart

    quickstart(display, output, methods, asked, resume=parsed.resume)


def _methods(text: str | None, tiny: bool) -> list[str]:
    if text is None:
        return ["opsd", "grpo", "sft"] if tiny else ["opsd"]
    methods = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or len(set(methods)) != len(methods):
        known = ",".join(METHODS)
        raise UserError(f"--methods is {text!r}: it must be {known}, or some of these, each once")
    return methods
