"""Suggestions for mistyped commands: synonyms, and config fields written as options.

`meant.toml` lists the names that other tools use.
"""

import argparse
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from opsd.common.errors import UserError
from opsd.common.near import did_you_mean, nearest

AS_FIELD = "a field of the config is set as in "


@cache
def _meant() -> dict[str, dict[str, Any]]:
    from opsd.common.files import read_toml  # a fifth of the time of `opsd --help`

    return read_toml(__file__, "meant")


def plainly(word: str) -> str:
    """How a word is typed that a page or a chat has typeset, with a dash for two hyphens and curly
    quotes around it or its value; "" for another."""
    if dashes := re.match("-*[\u2012-\u2015\u2212]+-*", word):
        return f"--{word[dashes.end() :]}"
    around = re.fullmatch(
        "((?!prompts)[\\w.]+=)?[\u2018-\u201f](.*)[\u2018-\u201f]", word, re.DOTALL
    )
    return shlex.quote(f"{around[1] or ''}{around[2]}") if around else ""


def no_command(words: Sequence[str], known: Iterable[str]) -> str:
    """Returns the error for a command line whose command is none of `known`."""
    word = next(word for word in words if not word.startswith("-"))
    said = f"there is no command {word!r}"
    if re.search(r"\.ya?ml$", word):
        rest = (other for other in words if other not in {word, "--config", "-c", *known})
        return f"{said}; did you mean `{shlex.join(['opsd', 'train', word, *rest])}`?"
    if meant := _meant()["commands"].get(word.lower().replace("_", "-")):
        if "`" in meant:
            return f"{said}; {meant}"
        at, more = words.index(word), meant.split()
        fields = [one for one in more if "=" in one or one[0] == "-"]  # they come last
        ours = [one for one in more if one not in fields]
        typed = shlex.join(["opsd", *words[:at], *ours, *words[at + 1 :], *fields])
        return f"{said}; did you mean `{typed}`?"
    parts = (part for part in re.split(r"\W|_", word) if part in known)  # train_opsd
    if near := nearest(word, known, cutoff=0.7) or next(parts, None):
        return f"{said}; did you mean {near!r}?"
    return f"{said}; there are {', '.join(known)}"


def unknown_options(rest: Sequence[str], words: Sequence[str], parsed: argparse.Namespace) -> str:
    """Suggests replacements for the options in `rest`, which the command of the line `words`, as
    far as it is `parsed`, does not know."""
    has_fields, own = hasattr(parsed, "overrides"), parsed.options
    said = [_instead(word, words, own, has_fields) for word in rest if word.startswith("-")]
    if not rest[0].startswith("-"):
        kind = "DIR" if Path(rest[0]).is_dir() else rest[0]
        texts = _meant()["words"].get(words[0], {}).items()
        extra = next((text for one, text in texts if re.fullmatch(one, kind, re.DOTALL)), "")
        place = shlex.quote(str(getattr(parsed, "model", "")))
        said.append(extra.replace("WORD", shlex.quote(rest[0])).replace("PLACE", place))
    if words[0] == "train" and not any(".y" in word for word in words):
        said.insert(0, "it needs a CONFIG.yaml; `opsd init` writes one")
    said = [one.removeprefix(AS_FIELD) if any(said[:at]) else one for at, one in enumerate(said)]
    return "".join(f"; {one}" for one in dict.fromkeys(said) if one)


def _instead(option: str, words: Sequence[str], own: Iterable[str], has_fields: bool) -> str:
    after = words[words.index(option) + 1 :] if option in words else []
    more = [*takewhile(lambda word: not word.startswith("--") and "=" not in word, after)]
    whole, (option, _, value) = option, option.partition("=")
    value = value or next(iter(more), "true")
    name, command = option.lstrip("-").replace("-", "_"), next(iter(words), "")
    plain = {one.lstrip("-").replace("-", "_"): one for one in own}
    if name in plain:
        return f"did you mean `{plain[name]}`?"
    place, whole_line = _meant()["places"].get(command), " ".join(words)
    if place and (lm_eval := re.search(r"\bpretrained=([^\s,]+)", whole_line)) and "model" in name:
        return f"{place} stands without an option: `opsd {command} {lm_eval[1]}`"
    if place and name in _meant()["places"]["names"]:
        less = [value if word == whole else word for word in words if word != option]
        return f"{place} stands without an option: `{shlex.join(['opsd', *less])}`"
    from opsd.config.config import Config
    from opsd.config.foreign import answer, fields_of, reason, typed

    meant = {one.replace("_", ""): said for one, said in _meant()["options"].items()}
    word = name.replace("_", "")
    said = meant.get(f"{command}.{word}") or _by_field(name, command, own) or meant.get(word, "")
    said = plain.get(value, said)  # --to gguf
    if not said and {*own} <= {"--debug", "--help", "-h"}:
        return f"`opsd {command}` takes no options"
    if (said.startswith("set ") and not has_fields) or (said.startswith("-") and said not in own):
        said = ""  # that is of another command
    if not said and has_fields and name in fields_of(Config):
        return f"{AS_FIELD}{typed(name, value, Config)}"
    near = nearest(name, plain, cutoff=0.8)
    if said := said or (answer(name, value, Config, near) if has_fields else reason(name)):
        if len(more) > 1 and "=[" in (every := answer(name, ",".join(more), Config)):
            said = every
        said = said.replace("here it is ", AS_FIELD)
        said = said.replace("CONFIG.yaml", value) if value.endswith((".yaml", ".yml")) else said
        if said.startswith("set ") and value != "true":
            said = re.sub(r"=[A-Z]+$", f"={value}", said)
        said = "--gpus" if said.startswith("several GPUs") and "--gpus" in own else said
        return f"did you mean `{said}`?" if said.startswith("--") else said
    near = near or nearest(name, plain, cutoff=0.7)
    known = f"`opsd {command} --help` lists " + ("options and fields" if has_fields else "options")
    return f"did you mean `{plain[near]}`?" if near else known


def _by_field(name: str, command: str, own: Iterable[str]) -> str:
    """The option that says what the field does by whose name, here or elsewhere, another is called:
    --problems for max_samples, since that is data.limit. Or what to do without one, or ""."""
    from opsd.config.config import Config
    from opsd.config.foreign import here

    for field in here(name, Config).split(" or "):
        option = f"--{field.rpartition('.')[2].replace('_', '-')}"
        for said in (_meant()["fields"].get(field, option), option):
            if said in own:
                return said
        if said := _meant()["options"].get(f"{command}.{field}"):
            return said
    return ""


def check_overrides(parsed: argparse.Namespace) -> None:
    """Raises UserError for an override without `=`: `tiny`, `train.steps 5`, a second file."""
    from opsd.config.config import Config
    from opsd.config.foreign import fields_of, here, typed
    from opsd.config.names import METHODS

    words, own = getattr(parsed, "overrides", ()), parsed.options
    for word, following in zip(words, [*words, ""][1:], strict=True):
        apart = word.endswith("=") and following and "=" not in following
        if word.startswith(("+", "~")):  # Hydra's
            raise UserError(f"override is {word!r}: write {word.lstrip('+~')}")
        if "=" in word.strip("=") or (word.endswith("=") and not apart and word != "="):
            continue
        hint = ""
        if apart or following.startswith("="):
            together = re.sub(r" ?= ?", "=", " ".join(words[words.index(word) :]))
            hint = f"; write it without spaces: {together.split()[0]}"
        elif f"--{word}" in own:
            hint = f"; did you mean `--{word}`?"
        elif Path(word, "config.yaml").is_file() and "--resume" in own:
            hint = f"; a run goes on by its directory alone: `opsd train {word} --resume`"
        elif "resume" in parsed and parsed.resume and ("/" in word or "checkpoint" in word):
            runs = [one for one in Path(word).parents if (one / "config.yaml").is_file()]
            hint = "; `--resume` goes on from output.dir's last checkpoint, without a path"
            hint = f"; write `opsd train {runs[0]} --resume`" if runs else hint
        elif split := _split(words[: words.index(word)], words):
            hint = f"; quote what holds blanks: {shlex.quote(split)}"
        elif "--gpu" in own and (unit := re.fullmatch(r"[A-Za-z]*\d+\w*|(gi?b?)", word, re.I)):
            name = "gpu" if parsed.gpu else "memory"
            between = "" if unit[1] or word[0] in "xX" else "-"
            whole = f"{getattr(parsed, name, '')}{between}{word}".lower()
            hint = f"; it has no space: --{name} {whole}"
        elif "--methods" in own and word in METHODS:
            hint = f"; a list has commas, as in --methods {parsed.methods or 'opsd'},{word}"
        elif re.match(r"[\w.]+:", word):
            said = re.sub(r":\s*", "=", word + following * word.endswith(":"), count=1)
            hint = f"; did you mean {said}?"
        elif re.search(r"\.(jsonl?|csv|tsv|parquet)$", word):
            hint = f"; data.source={word} in a config names it (`opsd init` writes one)"
        elif re.search(r"\.ya?ml$", word):
            hint = "; one config at a time (`opsd compare` takes several)"
        elif following and (field := word if word in fields_of(Config) else here(word, Config)):
            hint = f"; did you mean {typed(field, following, Config)}?"
        raise UserError(f"override is {word!r}: it must look like train.learning_rate=1e-5{hint}")


def _split(before: Sequence[str], words: Sequence[str]) -> str:
    """The override that the shell has split at its blanks, whole: the last one of `before` if a
    brace is open there or it is a prompt, with the words up to the next override; else ""."""
    first = next((one for one in reversed(before) if re.match(r"[\w.]+=", one)), "")
    opened = sum(map(first.count, "{[")) > sum(map(first.count, "}]"))
    if opened or first.startswith("prompts."):
        rest = words[words.index(first) + 1 :]
        return " ".join([first, *takewhile(lambda word: not re.match(r"[\w.]+=", word), rest)])
    return ""


class Parser(argparse.ArgumentParser):
    """argparse's parser; its error for a missing config says how to get one. more: a function that
    returns text to append to the help."""

    more: Callable[[], str] = staticmethod(lambda: "")

    def format_help(self) -> str:
        return f"{super().format_help()}\n{self.more()}".rstrip() + "\n"

    def error(self, message: str) -> NoReturn:
        if "required: CONFIG.yaml" in message:
            message = f"it needs a CONFIG.yaml{_config_here()}; `opsd init` writes one"
        if flag := re.search(r"argument (\S+): expected one argument", message):
            message = f"{flag[1]} needs a value: {self._option_string_actions[flag[1]].help}"
        for pattern, text in _meant()["errors"].items():
            message = re.sub(pattern, text, message, flags=re.DOTALL)
        if wrong := re.search(r"invalid (int|float) value: '(.*)'", message):
            from opsd.config.explain import number_meant

            message += number_meant(wrong[2], wrong[1])
        if wrong := re.search(r"choice: '(.*)' \(choose from (.*)\)", message):
            meant = _meant()["choices"].get(wrong[1], wrong[1])
            message += did_you_mean(meant, re.findall(r"[\w-]+", wrong[2]))
        if "required: " in message:
            message += f", as in `{self.prog} {_meant()['places'].get(self.prog[5:], 'FILE')}`"
        super().error(message)


def _config_here() -> str:
    """What to type where the working directory is a run's, or has one config; else ""."""
    if Path("metrics.jsonl").is_file() and Path("config.yaml").is_file():
        return "; this run goes on with `opsd train . --resume`"
    configs = [*Path().glob("*.yaml"), *Path().glob("*.yml")]
    return f", as in `opsd train {shlex.quote(str(configs[0]))}`" if len(configs) == 1 else ""


def usage(parser: argparse.ArgumentParser) -> str:
    """Returns a short usage line with the required arguments only; `--help` lists the options."""
    needed = [
        action.metavar or action.dest
        for action in parser._actions
        if not action.option_strings and action.metavar
    ]
    return " ".join(["%(prog)s", *map(str, needed), "[options]"]).replace("[] ", "")
