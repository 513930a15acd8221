"""`opsd chat`: questions typed, answers as they come, of a model and of the base that it was."""

import argparse
import sys

from opsd.cli.arguments import check_at_least
from opsd.common.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `opsd chat`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run's directory, a model's, or a hub name")
    add("--base", nargs="?", const="", metavar="MODEL", help="beside it; a run's: what it was")
    add(
        "--with-solution",
        action="store_true",
        help="ask for a solution too, and show it to the model, as a teacher sees it",
    )
    add("--plain", action="store_true", help="a run's: without its prompt templates")
    add("--system", metavar="TEXT", help="a system message")
    add("--temperature", type=float, default=0.0, help="default: 0, the likeliest tokens")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 512)")


def run(parsed: argparse.Namespace) -> None:
    """Talks until the input ends. Raises UserError."""
    check_at_least(1, parsed, "max_new_tokens")
    if not 0 <= parsed.temperature < float("inf"):
        raise UserError(f"--temperature is {parsed.temperature}: it must be at least 0")
    from opsd.cli.first_look import check_model, of_run
    from opsd.common.display import Display
    from opsd.config.requirements import longest_answer
    from opsd.config.sections import PromptsSection

    model, config = of_run(parsed.model)
    base = config.model.path if config and parsed.base == "" else parsed.base
    if base == "":
        raise UserError(f"--base needs a name: {parsed.model!r} is no run, which would say it")
    models = {"model": model} | ({"base": base} if base else {})
    for path in models.values():
        check_model(path, "MODEL")
    section = PromptsSection(student="{{ problem }}")
    if config is not None and not parsed.plain:
        section = config.prompts
    elif parsed.with_solution:
        section = PromptsSection()
    if parsed.system is not None:
        section = section.model_copy(update={"system": parsed.system, "student_system": None})
    display = Display(file=sys.stderr)
    from opsd.cli.first_look import import_torch

    import_torch(display)
    from opsd.cli.talk import Talker
    from opsd.rollout import Sampling

    longest = parsed.max_new_tokens or (longest_answer(config) if config else 512)
    talkers = {}
    for name, path in models.items():
        with display.stage(f"Load {path}"):
            talkers[name] = Talker(path, section, Sampling(longest, parsed.temperature))
    display.note("Type a problem; /new forgets what was said, Ctrl-D ends.")
    while (problem := _asked("> ")) is not None:
        if problem == "/new":
            for talker in talkers.values():
                talker.history = ()
        elif problem:
            solution = (_asked("solution> ") or "") if parsed.with_solution else ""
            for name, talker in talkers.items():
                print(f"\n{name}: ", end="")
                talker.answer(problem, solution)
            print()


def _asked(prompt: str) -> str | None:
    """A line of the input; None at its end."""
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
