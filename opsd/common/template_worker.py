"""The work of a template worker (see `workers`): parse, compile, render. Needs no torch."""

import datetime
import json
import pickle
import random
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from jinja2 import StrictUndefined, Template, Undefined, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opsd.common.near import did_you_mean
from opsd.common.skeletons import OPEN, chat_shape
from opsd.common.symbolic import Trace, skeleton

MOST = 20_000_000  # characters that one rendering may have
MADE, REFUSED = b"+", b"-"
CALL_IT = "call it, or add |list or |join"
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}", re.IGNORECASE)

# Filters and methods that make plain data of plain data: no iterator, no function.
_PLAIN = frozenset(
    "capitalize center count endswith first indent int join last length list lower lstrip replace "
    "round rstrip sort split splitlines startswith string strip sum title trim truncate upper "
    "wordcount wordwrap".split()
)
_TEXT = nodes.Output, nodes.TemplateData, nodes.Const
_PLAIN_NODES = *_TEXT, nodes.If, nodes.For, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.Not


def _shown(value: Any) -> Any:
    """Raises TypeError for a function or an iterator: `{{ }}` would print a memory address."""
    if (callable(value) or hasattr(type(value), "__next__")) and not isinstance(value, Undefined):
        kind = type(value).__name__
        raise TypeError(f"{{{{ }}}} holds a {kind}, not text: {CALL_IT}")
    return value


# Undefined names are errors, since a misspelt column must not become "".
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_shown)


def make() -> Callable[[bytes], bytes]:
    """Returns the function that answers jobs; imports all it needs before memory is limited."""
    if "transformers" not in sys.modules:
        # Import the module for chats without transformers itself, which takes ten times as long.
        for name in ("transformers", "transformers.utils"):
            package = ModuleType(name)
            package.__path__ = find_spec(name).submodule_search_locations or []
            sys.modules[name] = package
    _of_chats()
    return answer


def answer(job: bytes | memoryview) -> bytes:
    """Answers a job, a pickle of (function's name, arguments, values), by bytes for `texts_of`."""
    calls: list[Callable] = [names, prompts, chats, skeletons]
    try:
        name, arguments, values = pickle.loads(job)
        texts = list({call.__name__: call for call in calls}[name](*arguments, values))
        lengths = array("I", map(len, texts))
        if max(lengths, default=0) > MOST:
            raise SecurityError(f"its text has more than {MOST:,} characters")
        # Raises for half a surrogate pair, which no tokenizer could take.
        body = "".join(texts).encode()
        return b"".join((MADE, len(lengths).to_bytes(4), lengths.tobytes(), body))
    except MemoryError:
        raise
    except Exception as error:  # a template's expressions can raise anything, such as 1 / 0
        return REFUSED + _meant(str(error)[:2000]).encode(errors="backslashreplace")


def _meant(said: str) -> str:
    """An error's words, with the filter or test that was meant, or the text's own method."""
    if not (unknown := re.match(r"No (filter|test) named '(\w+)'", said)):
        return said
    kind, name = unknown.groups()
    own = f"; a text has it as a method: {{{{ problem.{name}() }}}}" if hasattr(str, name) else ""
    return unknown[0] + (own or did_you_mean(name, getattr(_ENVIRONMENT, f"{kind}s")))


def texts_of(made: bytes) -> Iterator[str]:
    """Splits an answer: status, number of texts, each one's length (4 bytes each), all in UTF-8."""
    start = 5 + 4 * int.from_bytes(made[1:5])
    all_in_one, at = str(memoryview(made)[start:], "utf-8"), 0
    for length in array("I", made[5:start]):
        yield all_in_one[at : at + length]
        at += length


def names(text: str, values: Sequence[Any]) -> list[str]:
    """The variables that a template uses but does not set."""
    return sorted(meta.find_undeclared_variables(_ENVIRONMENT.parse(text)))


def skeletons(name: str, arguments: tuple, values: Sequence) -> Iterator[str]:
    """What `Skeletons` learns of each value: JSON; "" where chance has a part in it."""
    text = arguments[0]
    for value in values:
        if "random" in text or "lipsum" in text:
            yield ""
        elif name == "prompts":
            trace = Trace([one for one in value.values() if type(one) in OPEN])
            opened = {k: trace.hole() if type(one) in OPEN else one for k, one in value.items()}
            yield json.dumps(skeleton(_compiled(text), text, trace, opened))
        else:
            _, more, date = arguments
            yield json.dumps(_skeleton_of_chat(text, more, date, value))


def _skeleton_of_chat(
    text: str, arguments: dict, date: datetime.date, chat: tuple
) -> dict[str, Any]:
    trace = Trace((chat_shape(chat) or ((), []))[1])
    said = []
    for message in chat[0]:
        said.append({key: v for key, v in message.items() if v is not None})
        content = message.get("content")
        if type(content) is str:
            said[-1]["content"] = trace.hole()
        elif type(content) is list:
            said[-1]["content"] = [
                {k: trace.hole() if (k, type(v)) == ("text", str) else v for k, v in part.items()}
                for part in content
            ]
    values = {"tools": None, "documents": None, **arguments}
    values |= {"messages": said, "add_generation_prompt": chat[1]}
    return skeleton(_template_of_chats(text, date), text, trace, values)


def prompts(text: str, values: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Renders the template for each of the values; compiles it even if there are none."""
    render = _compiled(text).render
    plain = _writes_plain_data(text)
    for one in values:
        _fix_chance(text, one)
        yield render(one) if plain else _without_address(render(one), text, one)


def chats(text: str, arguments: dict, date: datetime.date, values: Sequence) -> Iterator[str]:
    """Renders a chat template for each (messages, add_generation_prompt).

    arguments: special tokens, tools, documents and the role's own; date: today for the template.
    """
    of_chats = _of_chats()
    _template_of_chats(text, date)
    for messages, prompt in values:
        _fix_chance(text, messages)
        said = [{key: v for key, v in one.items() if v is not None} for one in messages]
        more = {"chat_template": text, "add_generation_prompt": prompt, **arguments}
        made = of_chats.render_jinja_template([said], **more)[0][0]
        yield _without_address(made, text, said)


def _without_address(made: str, text: str, values: Any) -> str:
    """Returns the text. Raises TypeError if the template wrote a function or an iterator into it in
    a way that `_shown` does not see, such as `x|unique ~ "a"`: its address differs each time."""
    if " at 0x" in made or ("X" in made and " AT 0X" in made):  # finding one letter takes no time
        given = (text + repr(values)).lower()
        for found in _ADDRESS.findall(made):
            if found.lower() not in given:
                raise TypeError(f"it writes a memory address ({found.strip()}): {CALL_IT}")
    return made


@cache
def _writes_plain_data(text: str) -> bool:
    """Whether a template surely makes all it writes from plain data, by nothing but `_PLAIN`; a
    search of all it writes for addresses would take a tenth of the time of a short template."""
    tree = _ENVIRONMENT.parse(text)
    methods = {id(call.node) for call in tree.find_all(nodes.Call)}

    def plain(node: nodes.Node) -> bool:
        match node:
            case nodes.Name():
                return node.name not in _ENVIRONMENT.globals
            case nodes.Filter():
                more = len(node.args) > 1 or node.dyn_args or node.dyn_kwargs  # |join("", "upper")
                return node.name in _PLAIN and not more
            case nodes.Getattr():
                return node.attr in _PLAIN and id(node) in methods
            case nodes.Call():
                return isinstance(node.node, nodes.Getattr)
        return isinstance(node, _PLAIN_NODES)

    return all(map(plain, tree.find_all(nodes.Node)))


def _template_of_chats(text: str, date: datetime.date) -> Template:
    template = _of_chats()._compile_jinja_template(text)
    template.globals["strftime_now"] = date.strftime
    return template


def _of_chats() -> ModuleType:
    return import_module("transformers.utils.chat_template_utils")


def _fix_chance(text: str, values: Any) -> None:
    """Seeds `random` and `lipsum` by the values, so that order and process make no difference."""
    if "random" in text or "lipsum" in text:
        random.seed(repr(values))


@cache
def _compiled(text: str) -> Template:
    template = _ENVIRONMENT.from_string(text)
    template.globals = dict(template.globals)  # copying a ChainMap is slower than rendering a row
    return template
