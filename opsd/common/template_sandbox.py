"""A Jinja environment for templates that may come from a stranger. Needs no torch.

Jinja's own sandbox keeps a template away from Python's insides, but not from the machine's time and
memory: `'a' * 10**9`, `9**9**9`, a loop in a loop in a loop. Here everything that a template makes
costs its size, and one rendering may spend WORK. What could be too large to be made at all is
estimated first.
"""

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import generate_lorem_ipsum

WORK = 20_000_000
"""What rendering one template may cost: a character or digit 1, an item 10, a call 100."""

ITEM, CALL = 10, 100

MULTIPLIES = frozenset(
    "ljust rjust center zfill expandtabs indent wordwrap batch slice lipsum tojson replace join "
    "translate format format_map pprint".split()
)
"""Methods and filters whose result may be as long as the product of their arguments."""

_NUMBER = re.compile(r"\d+")


class _Generator(CodeGenerator):
    """Counts a loop's items, and the characters that `~` joins."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.iter = _callback("counted", [node.iter])
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.visit(_callback("joined", node.nodes), frame)


def _callback(name: str, arguments: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a bound on what a template may make.

    Undefined names are errors, since a misspelt column must not become "". Raises SecurityError, a
    TemplateError, beyond the bound.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, finalize=self._shown)
        self._spent = threading.local()
        self.filters = {name: self._paid(name, made) for name, made in self.filters.items()}
        self.globals["lipsum"] = self._paid("lipsum", generate_lorem_ipsum)

    def begin(self) -> None:
        """Call before a template is compiled or rendered: it may spend all of WORK."""
        self._spent.work = 0

    def spend(self, work: int) -> None:
        """Pay for something of this size. Raises SecurityError."""
        self._spent.work += work
        if self._spent.work > WORK:
            raise SecurityError(
                f"it makes too much: more than {WORK:,} characters, or a tenth as many items"
            )

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, each paid for when it comes."""
        for item in items:
            self.spend(ITEM)
            yield item

    def joined(self, *parts: Any) -> str:
        """What `~` makes."""
        for part in parts:
            self._pay_for(part)
        return "".join(map(str, parts))

    def concat(self, pieces: Iterable[str]) -> str:
        """The text of a template, a macro or a block."""
        made = []
        for piece in pieces:
            self.spend(ITEM + len(piece))
            made.append(piece)
        return "".join(made)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self._estimate(_product(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._estimate(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            self._estimate_format(left, right)
        result = super().call_binop(context, operator, left, right)
        self._pay_for(result)
        return result

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
        self.spend(CALL)
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps str.format
        receiver = getattr(method, "__self__", None)
        if isinstance(receiver, str):
            self._check(method.__name__, [receiver, *arguments], named)
        result = super().call(context, function, *arguments, **named)
        self._pay_for(result)
        return result

    def _paid(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)  # with jinja2's mark of who wants the context
        def paid(*arguments: Any, **named: Any) -> Any:
            self._check(name, arguments, named)
            result = function(*arguments, **named)
            self._pay_for(result)
            return result

        return paid

    def _check(self, name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Estimate a call whose result could be far longer than what it is given."""
        if name not in MULTIPLIES:
            return
        given = [*arguments, *named.values()]
        if name.startswith("format"):
            template = next((one for one in given if isinstance(one, str)), "")
            self._estimate_format(template, given)
            return
        sizes = sorted(abs(one) if isinstance(one, int) else self._size(one) for one in given)
        self._estimate(sizes[-1] * (1 + sum(sizes[:-1])))

    def _estimate_format(self, template: str, given: Any) -> None:
        """Widths are numbers in the template; `*` or a nested field takes them from the values."""
        width = max((int(digits[:12]) for digits in _NUMBER.findall(template)), default=0)
        if "*" in template or re.search(r":[^}]*\{", template):
            values = given.values() if isinstance(given, Mapping) else given
            values = values if isinstance(values, list | tuple) else [values]
            width = max([width, *(abs(one) for one in values if isinstance(one, int))])
        fields = template.count("%") + template.count("{")
        self._estimate(len(template) + fields * (width + self._size(given)))

    def _estimate(self, work: int) -> None:
        if work > WORK - self._spent.work:
            self.spend(work)

    def _pay_for(self, made: Any) -> None:
        self.spend(self._size(made))

    def _shown(self, made: Any) -> Any:
        """What `{{ }}` is about to write. Short lists that hold each other can be long as text."""
        self._pay_for(made)
        return made

    def _size(self, made: Any) -> int:
        """Its characters, digits and items, with all that it holds, as often as it holds it."""
        if isinstance(made, str):
            return len(made) + ITEM
        total, waiting = 0, [made]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str | bytes):
                total += len(one)
            elif isinstance(one, int):
                total += one.bit_length() // 3
            elif isinstance(one, Mapping):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple | set | frozenset):
                waiting += one
            total += ITEM
            if total + ITEM * len(waiting) > WORK:
                self.spend(WORK + 1)
        return total


def _product(left: Any, right: Any) -> int:
    """An upper bound on the size of `left * right`."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    for times, repeated in ((left, right), (right, left)):
        if isinstance(times, int) and hasattr(repeated, "__len__"):
            return max(0, times) * len(repeated) * (1 if isinstance(repeated, str) else ITEM)
    return 0
