"""The `opsd` command. Each subcommand imports what it needs when it runs: `--help` stays fast."""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from opsd.cli.evaluate_arguments import add_arguments
from opsd.cli.plan_arguments import add_arguments as add_plan_arguments
from opsd.cli.plan_arguments import asked
from opsd.common.errors import UserError, said_elsewhere
from opsd.config.names import METHODS

VOICES = ("words", "own", "terse", "markdown")  # quickstart.chain_sum's, which imports slowly


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a user's error, 130 for Ctrl-C."""
    parsed = _parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns after a fork otherwise
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' GGUF loader draws over our display
    # Waiting threads spin for some microseconds, then sleep. libgomp's default spins for
    # milliseconds: on cores that others use too a step of the tiny model took 30 times as long.
    # Sleeping at once (OMP_WAIT_POLICY=passive) costs a quiet machine 1.5 times. Read when torch is
    # first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Packed streams have ever new lengths, and oneDNN keeps a compiled product for each: by default
    # 1024 of them, 50 MB a step.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")
    try:
        return parsed.run(parsed) or 0
    except KeyboardInterrupt:
        if parsed.debug:
            raise
        print("opsd: interrupted; what was saved is kept", file=sys.stderr)
        return 130
    except UserError as error:
        if parsed.debug:
            raise
        if said_elsewhere(error):
            time.sleep(2)  # launchers end all processes with the first
            return 1
        _complain(str(error))
        return 1
    except OSError as error:
        if parsed.debug:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _complain(f"{error.strerror or error}{where}")
        return 1


def _complain(message: str) -> None:
    """One line on stderr. What it quotes may come from a stranger's file, and must not move the
    terminal's cursor."""
    printable = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    print(f"opsd: {''.join(printable)}", file=sys.stderr)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    for word in sys.argv[1:] if arguments is None else arguments:
        if "\0" in word:
            top.error(f"{word!r} holds a NUL character")
    parsed, rest = top.parse_known_args(arguments)
    # argparse takes no more overrides once an option has followed the config.
    if rest and (
        parsed.run not in (_quickstart, _train, _plan) or any(word.startswith("-") for word in rest)
    ):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="opsd", description="On-policy self-distillation for language models."
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, help: str, **more) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, **more)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    sub = command("quickstart", _quickstart, "See a model learn from itself, on a CPU.")
    sub.add_argument("--tiny", action="store_true", help="a tiny model made here, in minutes")
    sub.add_argument("--output", metavar="DIR", help="default: runs/quickstart or runs/tiny")
    sub.add_argument(
        "--methods",
        metavar="LIST",
        help="of opsd,grpo,sft,distill (default: opsd; --tiny: the first three)",
    )
    sub.add_argument("--seed", type=int, default=0, help="default: 0")
    sub.add_argument("--model", metavar="DIR", help="another chat model instead of SmolLM2-135M")
    sub.add_argument("--steps", type=int, help="stop each method after so many steps, for a try")
    sub.add_argument("--problems", type=int, help="held-out problems (default: 300)")
    sub.add_argument(
        "--solutions", type=int, help="how many there are to learn from (default: endless)"
    )
    sub.add_argument(
        "--voice",
        default="words",
        help="whose solutions: words, own, terse, markdown (default: words)",
    )
    sub.add_argument(
        "--resume", action="store_true", help="go on with what the same command has left"
    )
    sub.add_argument("overrides", nargs="*", metavar="[method.]section.field=value")

    sub = command(
        "train",
        _train,
        "Train by a config file.",
        formatter_class=_ConfigHelp,
    )
    sub.add_argument("config", metavar="CONFIG.yaml")
    sub.add_argument("overrides", nargs="*", metavar="section.field=value")
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, data, prompts and tokenizer, show the plan, train nothing",
    )
    sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    sub.add_argument(
        "--no-share",
        action="store_true",
        help="run each rollout with a context of its own (train.share_prefixes=false)",
    )

    sub = command("eval", _eval, "Measure a model on a benchmark.")
    add_arguments(sub)

    sub = command("plan", _plan, "Plan memory, tokens and time, before any weight is loaded.")
    add_plan_arguments(sub)

    sub = command("replay", _replay, "Find what was not finite in a step that failed.")
    sub.add_argument("file", metavar="FILE", type=Path, help="a run's failed-step-N.pt")

    sub = command("report", _report, "Write report.html and curves.png of a run.")
    sub.add_argument("directory", metavar="RUN_DIR", type=Path)

    sub = command("compare", _compare, "Compare runs: methods by seeds, tokens to a target.")
    _add_compare_arguments(sub)

    command("doctor", _doctor, "Say what works on this machine and what does not.")
    return top


def _add_compare_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "paths",
        metavar="RUN_DIR|CONFIG.yaml|STUDY.yaml",
        nargs="+",
        type=Path,
        help="finished runs; or configs, each to be run with each seed; or one study file",
    )
    sub.add_argument("--seeds", metavar="LIST", help="of configs (default: 0,1,2)")
    sub.add_argument("--tokens", type=int, metavar="N", help="of configs: train.token_budget")
    sub.add_argument("--target", type=float, metavar="ACCURACY", help="default: baseline's best")
    sub.add_argument("--baseline", metavar="METHOD", help="default: grpo, or the last there is")
    sub.add_argument("--output", metavar="DIR", type=Path, default=Path("runs/compare"))


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


def _quickstart(parsed: argparse.Namespace) -> None:
    from opsd.common.display import Display

    methods = _methods(parsed.methods, parsed.tiny)
    for name in ("steps", "problems", "solutions"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: it must be at least 1")
    if parsed.tiny and parsed.model:
        raise UserError("--model and --tiny exclude each other: --tiny makes its own model")
    if not 0 <= parsed.seed < 2**32:
        raise UserError(f"--seed is {parsed.seed}: it must be at least 0 and at most {2**32 - 1}")
    if parsed.voice not in VOICES:
        raise UserError(f"--voice is {parsed.voice!r}: it must be one of {', '.join(VOICES)}")
    if parsed.tiny and parsed.voice != "words":
        raise UserError("--voice and --tiny exclude each other: the worksheets have one voice")
    output = Path(parsed.output or ("runs/tiny" if parsed.tiny else "runs/quickstart"))
    from opsd.models.load import quiet_transformers
    from opsd.quickstart.run import quickstart

    quiet_transformers()
    quickstart(
        Display(),
        output,
        methods,
        tiny=parsed.tiny,
        seed=parsed.seed,
        model_path=parsed.model,
        steps=parsed.steps,
        problems=parsed.problems,
        solutions=parsed.solutions,
        voice=parsed.voice,
        overrides=parsed.overrides,
        resume=parsed.resume,
    )


def _methods(text: str | None, tiny: bool) -> list[str]:
    if text is None:
        return ["opsd", "grpo", "sft"] if tiny else ["opsd"]
    methods = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or len(set(methods)) != len(methods):
        raise UserError(
            f"--methods is {text!r}: it must list some of {', '.join(METHODS)}, each once"
        )
    return methods


def _train(parsed: argparse.Namespace) -> None:
    from opsd.config.load import load_config

    overrides = [*parsed.overrides, *(["train.share_prefixes=false"] if parsed.no_share else [])]
    config = load_config(parsed.config, overrides)  # before torch is imported
    from opsd.common.display import Display
    from opsd.models.load import quiet_transformers

    if parsed.dry_run:
        from opsd.cli.dry_run import dry_run

        quiet_transformers()
        dry_run(config, Display())
        return
    from opsd.training.run import train

    quiet_transformers()
    display = Display(quiet=os.environ.get("RANK", "0") != "0")
    directory = train(config, display, resume=parsed.resume)
    summary = json.loads((directory / "summary.json").read_text())
    before, after = summary["accuracy"]["before"], summary["accuracy"]["after"]
    if before is not None:
        display.note(f"Held-out accuracy: {before:.3f} before, {after:.3f} after")
    names = ("model", "report.html", "curves.png", "summary.json")
    display.paths("Written", {name: directory / name for name in names})


def _eval(parsed: argparse.Namespace) -> None:
    from opsd.cli.evaluate import evaluate_command
    from opsd.models.load import quiet_transformers

    quiet_transformers()
    evaluate_command(parsed)


def _plan(parsed: argparse.Namespace) -> None:
    wanted = asked(parsed)
    gc.disable()  # a sixth of its time, most of it imports, went to collections that find little
    try:
        from opsd.cli.plan import plan_command
        from opsd.models.load import quiet_transformers

        quiet_transformers()
        plan_command(wanted)
    finally:
        gc.enable()


def _replay(parsed: argparse.Namespace) -> None:
    from opsd.cli.replay import replay
    from opsd.common.display import Display
    from opsd.models.load import quiet_transformers

    quiet_transformers()
    replay(parsed.file, Display())


def _report(parsed: argparse.Namespace) -> None:
    from opsd.report import write_report

    for name, path in write_report(parsed.directory).items():
        print(f"{name}: {path}")


def _compare(parsed: argparse.Namespace) -> None:
    from opsd.cli.compare import compare_command

    seeds = _seeds(parsed.seeds)
    compare_command(
        parsed.paths, parsed.target, parsed.baseline, parsed.output, seeds, parsed.tokens
    )


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) != len(words):
        raise UserError(f"--seeds is {text!r}: it must list numbers such as 0,1,2, each once")
    return [int(word) for word in words]


def _doctor(parsed: argparse.Namespace) -> int:
    from opsd.cli.doctor import run_doctor

    return run_doctor(print)
