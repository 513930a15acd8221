"""Fills in a template with texts that nothing can look into, in a worker: `skeletons`.

What the template does with such a text is one of three: it becomes a piece of the text that is
made; it is tested, and test and outcome are remembered; or the filling in ends with `LookedInto`.
Nothing else may happen: such a text is no `str`, so that no function in C takes it for one, and
whatever Python asks of it in passing (its length, hash, index, items, number) ends it too.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, update_wrapper
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opsd.common.skeletons import LONGEST, METHODS, TESTS, Piece, derived

MOST_PIECES, MOST_TESTS, MOST_PARTS, MOST = 1000, 100, 20, 1 << 20


class LookedInto(BaseException):
    """The template does more with a text than to show, trim or test it. No Exception, which
    templates and Jinja itself may take for something else."""


def _ends(*_: Any) -> Any:
    raise LookedInto


def only_text(value: Any, longest: int = LONGEST) -> Any:
    """The same value, a str of Python's own that is not too long."""
    return value if type(value) is str and len(value) <= longest else _ends()


class Opaque:
    """Of a row, what may be another in the next. Each subclass allows some of what this refuses."""

    def __init__(self, trace: "Trace", *pieces: Piece) -> None:
        self.trace, self.pieces = trace, pieces
        if len(pieces) > MOST_PIECES:
            raise LookedInto

    __getattr__ = __str__ = __repr__ = __format__ = __hash__ = __len__ = __iter__ = _ends
    __getitem__ = __contains__ = __int__ = __float__ = __index__ = __complex__ = _ends
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = _ends
    __rmod__ = __neg__ = __pos__ = __abs__ = __round__ = __reversed__ = __bytes__ = _ends
    __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _ends
    __pow__ = __rpow__ = __invert__ = __reduce_ex__ = _ends

    def __bool__(self) -> bool:
        return any(p if type(p) is str else self.trace.test(p, "true") for p in self.pieces)

    def __eq__(self, other: Any) -> Any:
        if isinstance(other, str):
            return self.trace.test(self.hole(), "equal", only_text(other))
        return NotImplemented if not isinstance(other, Opaque) else _ends()

    def hole(self) -> Sequence:
        """The one piece of it."""
        if len(self.pieces) != 1 or type(self.pieces[0]) is str:
            raise LookedInto
        return self.pieces[0]


class Number(Opaque):
    """An int or float: shown, or compared with another."""

    def __eq__(self, other: Any) -> Any:
        return self._compared("equal", other)

    def __lt__(self, other: Any) -> Any:
        return self._compared("less", other)

    def __le__(self, other: Any) -> Any:
        return self._compared("at_most", other)

    def __gt__(self, other: Any) -> Any:
        return self._compared("more", other)

    def __ge__(self, other: Any) -> Any:
        return self._compared("at_least", other)

    def _compared(self, how: str, other: Any) -> Any:
        return self.trace.test(self.hole(), how, other) if type(other) in (int, float) else _ends()

    def text(self) -> "Text":
        number, operations = self.hole()
        return Text(self.trace, (number, (*operations, ("text",))))


class Text(Opaque):
    """A str, or one that was put together of several."""

    def __add__(self, other: Any) -> Any:
        return self._joined(self, other)

    def __radd__(self, other: Any) -> Any:
        return self._joined(other, self)

    def _joined(self, *parts: Any) -> "Text":
        pieces: list[Piece] = []
        for part in parts:
            pieces += part.pieces if isinstance(part, Text) else [only_text(part, MOST)]
        return Text(self.trace, *pieces)

    def __contains__(self, part: Any) -> bool:
        return self._test("contains", part)

    def startswith(self, part: Any) -> bool:
        return self._test("startswith", part)

    def endswith(self, part: Any) -> bool:
        return self._test("endswith", part)

    def split(self, by: Any) -> list["Text"]:
        count = self._test("count", by or _ends())
        if count > MOST_PARTS:
            raise LookedInto
        return [self._with("split", by, number) for number in range(count + 1)]

    def replace(self, old: Any, new: Any, count: Any = -1) -> "Text":
        if not only_text(old) or len(only_text(new)) > len(old):  # or it could grow each time
            raise LookedInto
        return self._with("replace", old, new, -1 if count is None else count)

    def __getitem__(self, part: Any) -> "Text":
        if type(part) is not slice:
            raise LookedInto
        return self._with("slice", part.start, part.stop, part.step)

    def size(self) -> Number:
        number, operations = self.hole()
        return Number(self.trace, (number, (*operations, ("length",))))

    def _test(self, name: str, part: Any) -> Any:
        return self.trace.test(self.hole(), name, only_text(part))

    def _with(self, name: str, *arguments: Any) -> "Text":
        number, operations = self.hole()
        if len(operations) > MOST_PARTS:
            raise LookedInto
        for one in arguments:
            if one is not None and type(one) is not int:
                only_text(one)
        return Text(self.trace, (number, (*operations, (name, *arguments))))


for _name in {*METHODS} - {"replace"}:
    setattr(Text, _name, lambda self, *given, name=_name: self._with(name, *given))
del _name
REACHED = {*METHODS, "split", "startswith", "endswith"}
FILTERS = {"trim": "strip", "length": "size", "count": "size"}
FILTERS |= {name: name for name in ("upper", "lower", "capitalize", "replace")}
IS = dict.fromkeys("undefined none mapping number integer float boolean callable".split(), False)
IS |= dict.fromkeys(("true", "false"), False)
IS |= dict.fromkeys(("defined", "string", "iterable", "sequence"), True)
COMPARISONS = {"eq", "equalto", "==", "ne", "!=", "in"}


class Trace:
    """The holes of a row, and the tests on which what was made of them depends."""

    def __init__(self, holes: Sequence[Any]) -> None:
        self.holes, self._next = holes, 0
        self.tests: list[tuple[Sequence, str, Any, Any]] = []
        self._known: dict[tuple, Any] = {}

    def hole(self) -> Opaque:
        """What stands for the next hole."""
        self._next += 1
        kind = Text if type(self.holes[self._next - 1]) is str else Number
        return kind(self, (self._next - 1, ()))

    def test(self, piece: Any, name: str, argument: Any = None) -> Any:
        key = piece, name, type(argument), argument
        if key not in self._known:
            if len(self.tests) >= MOST_TESTS:
                raise LookedInto
            outcome = TESTS[name](derived(self.holes, piece), argument)
            self._known[key] = outcome
            self.tests.append((piece, name, argument, outcome))
        return self._known[key]


def joined(parts: Iterable[Any]) -> Any:
    """`"".join`, for texts that nothing can look into as well."""
    parts = list(parts)
    found = next((part for part in parts if isinstance(part, Text)), None)
    return "".join(parts) if found is None else found._joined(*parts)


def shown(value: Any) -> Any:
    """`str`, as `{{ }}` and `~` take it."""
    if isinstance(value, Opaque):
        return value.text() if isinstance(value, Number) else value
    return str(value)


class _Generator(CodeGenerator):
    """Writes `shown` for `str`, and `joined` for its `"".join`."""

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            raise LookedInto
        self.write("environment.shown(")
        if finalize.src is not None:
            self.write(finalize.src)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            raise LookedInto
        self.write("environment.concat(map(environment.shown, (")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write(")))")


class _Environment(ImmutableSandboxedEnvironment):
    """One that knows `Opaque`."""

    code_generator_class = _Generator
    concat = staticmethod(joined)  # type: ignore[assignment]
    shown = staticmethod(shown)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, self._checked(obj, argument))

    def getattr(self, obj: Any, attribute: str) -> Any:
        return super().getattr(obj, self._checked(obj, attribute))

    @staticmethod
    def _checked(obj: Any, name: Any) -> Any:
        if isinstance(name, Opaque) or (isinstance(obj, Opaque) and name not in REACHED):
            raise LookedInto
        return name


def _of(environment: ImmutableSandboxedEnvironment) -> ImmutableSandboxedEnvironment:
    """The same, for texts that nothing can look into."""
    made = environment.overlay()
    made.__class__ = _Environment
    made.filters = {name: _filter(name, does) for name, does in environment.filters.items()}
    made.tests = {name: _test(name, does) for name, does in environment.tests.items()}
    return made


def _filter(name: str, does: Any) -> Any:
    if name == "string":
        return lambda value: shown(value) if isinstance(value, Opaque) else does(value)
    if name not in FILTERS:
        return does  # whatever it does, it ends where it looks into a text
    first = int(hasattr(does, "jinja_pass_arg"))  # after the context

    def filtered(*given: Any, **named: Any) -> Any:
        value = given[first]
        if isinstance(value, Text) and not named:
            return getattr(value, FILTERS[name])(*given[first + 1 :])
        return _ends() if isinstance(value, Opaque) else does(*given, **named)

    return update_wrapper(filtered, does)


def _test(name: str, does: Any) -> Any:
    def tested(value: Any, *given: Any) -> Any:
        if not any(isinstance(one, Opaque) for one in (value, *given)) or name in COMPARISONS:
            return does(value, *given)
        if isinstance(value, Text) and name in IS and not given:
            return IS[name]
        if name in ("defined", "undefined", "none", "string", "mapping", "boolean"):
            return name == "defined"
        raise LookedInto

    return does if hasattr(does, "jinja_pass_arg") else tested


@cache
def _compiled(template: Template, text: str) -> Template:
    made = _of(template.environment).from_string(text)  # type: ignore[arg-type]
    made.globals = template.globals
    return made


def skeleton(
    template: Template, text: str, trace: Trace, values: Mapping[str, Any]
) -> dict[str, Any]:
    """What `Skeletons` learns of the values, in which the trace's holes stand: tests and pieces.
    template: the text's, compiled. pieces: None, where it looks into a text, or fails."""
    pieces: Any = None
    try:
        made = _compiled(template, text).render(values)
        pieces = made.pieces if isinstance(made, Text) else (made,)
        if sum(len(piece) for piece in pieces if type(piece) is str) > MOST:
            pieces = None
    except MemoryError:
        raise
    except (LookedInto, Exception):  # a template's expressions can raise anything
        pass
    return {"tests": trace.tests, "pieces": pieces}
