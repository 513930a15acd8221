"""The `opsd` command: finds the command's module, reads the arguments, runs it.

It imports only that module, and most modules import what they need in `run`: `--help` stays fast.
"""

import argparse
import atexit
import locale
import logging
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from shutil import get_terminal_size
from textwrap import TextWrapper
from typing import NoReturn

from opsd.cli.arguments import add_options, check_bounds
from opsd.cli.meant import Parser, check_overrides, no_command, plainly, unknown_options, usage
from opsd.common.ending import PARENT, Interruption, Stopped, end_with_parent
from opsd.common.environment import set_environment
from opsd.common.errors import UserError, in_short, said_elsewhere
from opsd.common.files import read_toml
from opsd.common.format import shown

ABOUT = "On-policy self-distillation for language models."
INTERNAL = 70  # exit code for bugs of ours: EX_SOFTWARE of sysexits.h

COMMANDS: dict[str, dict[str, str]] = read_toml(__file__, "commands")
"""Command → its help, and its module. That has run(parsed) → exit code or None, and may have WORDS
of options.toml, more() for the end of the help, and add_arguments(parser)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a user's error, 70 for a bug of ours, 130
    for Ctrl-C, 143 for SIGTERM."""
    if arguments is None:
        _as_utf8()
        if watched := os.environ.pop(PARENT, None):
            end_with_parent(int(watched))
    parsed = _parse(arguments)
    set_environment()
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' GGUF loader draws over our display
    logging.getLogger("DeepSpeed").addFilter(lambda said: "accelerator to CPU" not in str(said.msg))
    try:
        check_bounds(parsed)
        check_overrides(parsed)
        with Interruption():
            code = parsed.run(parsed) or 0
        sys.stdout.flush()
        return code
    except Stopped as stopped:
        if parsed.debug:
            raise
        print(f"opsd: interrupted; {_kept(stopped, arguments)}", file=sys.stderr)
        return 128 + stopped.number
    except Exception as error:
        if parsed.debug:
            raise
        if said_elsewhere(error):
            time.sleep(2)  # a launcher ends all processes once one ends: let the first report first
            return 1
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 128 + signal.SIGPIPE
        code, message = _explained(error)
        print(f"opsd: {shown(message)}", file=sys.stderr)
        return code


def command() -> NoReturn:
    """The `opsd` command. It ends as Python does, but for clearing the million objects of torch and
    transformers one by one, which takes longer than all else in many commands."""
    code = main()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reader_left() -> bool:
    """Whether nothing reads our output any more, as after `opsd examples | head -1`. Then what is
    still to be written goes nowhere, since Python would complain at its end."""
    (output := select.poll()).register(sys.stdout, 0)
    if left := bool(output.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _kept(stopped: Stopped, arguments: Sequence[str] | None) -> str:
    """Says what an interrupted command has saved, and the command that resumes it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    kept = str(stopped) or "what was saved is kept"
    if words[0] in ("train", "quickstart"):
        words += [] if "--resume" in words else ["--resume"]
    elif words[0] not in ("eval", "compare"):
        return kept
    return f"{kept}: `{shlex.join(['opsd', *words])}` goes on"


def _explained(error: Exception) -> tuple[int, str]:
    """Returns the exit code for an error, and the line to print."""
    if isinstance(error, UserError):
        return 1, str(error)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return 1, f"{error.strerror or error}{where}"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's own
        return 1, f"there is not enough memory for that ({in_short(error)})"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}opsd" in frame.filename] or frames
    place = f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}"
    return INTERNAL, (
        f"internal error at {place}: {in_short(error)}; please report it, with what `--debug` shows"
    )


def _as_utf8() -> None:
    """Restarts in Python's UTF-8 mode if the locale has another encoding: every file that we or our
    libraries read or write is UTF-8."""
    encoding = locale.getpreferredencoding(False).lower().replace("-", "")
    if encoding != "utf8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = next((word for word in words if not word.startswith("-")), None)
    if command in COMMANDS and "--version" not in words:  # options may stand before it
        words.insert(0, words.pop(words.index(command)))
    top = parser(command if command in COMMANDS else "")
    if not words:
        top.exit(2, top.format_help())
    for word in words:
        if "\0" in word:
            top.error(f"{word!r} holds a NUL character")
        if plain := plainly(word):
            top.error(f"{word!r} has a dash or quotes of a typeset page: write {plain}")
        if re.fullmatch(r"[A-Z]+(_[A-Z0-9]+)+=\S*", word):  # for the environment
            others = [other for other in words if other != word]
            top.error(f"write it before the command: `{shlex.join([word, 'opsd', *others])}`")
    if command is not None and command not in COMMANDS:
        top.error(no_command(words, COMMANDS))
    parsed, rest = top.parse_known_args(words)
    # argparse leaves overrides that follow an option unparsed: take them here.
    if rest and (not hasattr(parsed, "overrides") or any(word.startswith("-") for word in rest)):
        meant = unknown_options(rest, words, parsed)
        top.error(f"unrecognized arguments: {' '.join(rest)}{meant}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def _listed() -> str:
    """All commands with what they do, for the end of the help."""
    wrap = TextWrapper(get_terminal_size().columns - 2, subsequent_indent=17 * " ")
    lines = [wrap.fill(f"  {name:<15}{of['help']}") for name, of in COMMANDS.items()]
    return "\n".join(["commands:", *lines, "", "Begin with: opsd quickstart --tiny"])


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Builds the parser. only: add the arguments of this command alone; None: of all commands."""
    top = Parser(prog="opsd", usage="opsd COMMAND [options]", description=ABOUT)
    top.more = _listed
    version = f"%(prog)s {sys.modules['opsd'].__version__}"
    top.add_argument("--version", action="version", version=version)
    how = {"metavar": "COMMAND", "prog": "opsd", "help": argparse.SUPPRESS}
    commands = top.add_subparsers(required=True, **how)
    for name, of in COMMANDS.items():
        sub = commands.add_parser(name, description=of["help"])
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if only in (None, name):
            command = import_module(of["module"])
            sub.more = getattr(command, "more", sub.more)
            add_options(sub, name, **getattr(command, "WORDS", {}))
            getattr(command, "add_arguments", lambda parser: None)(sub)
            sub.usage, options = usage(sub), sorted(sub._option_string_actions)
            sub.set_defaults(run=command.run, command=name, options=options)
    return top
