"""Read YAML strictly: plain values only, no duplicate keys, no aliases that expand to huge data.

Words and numbers are read by YAML 1.2's core schema, plus dates. By YAML 1.1, PyYAML's default,
`1:30` is 90, `010` is 8, `on` and `no` are true and false, and 1e-5 is text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from opsd.common.errors import UserError
from opsd.common.files import read_toml
from opsd.common.near import near_file

MAX_BYTES = 1 << 20
"""The largest file to read: a config has some kilobytes; parsing a large file takes minutes."""

MAX_NODES = 100_000
"""The most values that a file may have, counting what aliases repeat each time."""

CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "timestamp": (r"[0-9]{4}-[0-9]{2}-[0-9]{2}", list("0123456789")),
    "merge": (r"<<", ["<"]),
}
"""Type → a pattern of its unquoted words, and their first characters. Other words are text."""

SLIPS: dict[str, Any] = read_toml(__file__, "slips")
LINES: dict[str, str] = SLIPS.pop("lines")
"""What PyYAML says → what to do about it; and patterns of lines → what to write instead."""


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which SafeLoader silently drops the first."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - as PyYAML has it

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        number = int(text, 0 if text[:2] in ("0o", "0x") else 10)
        repr(number)  # raises ValueError for a number with too many digits to print
        return number

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return node


for _type, (_pattern, _first) in CORE.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_type}", re.compile(f"(?:{_pattern})$"), _first
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in (*CORE, "str", "seq", "map")} | {None}
_Loader.yaml_constructors = {t: c for t, c in _Loader.yaml_constructors.items() if t in _PLAIN}


def read_yaml(path: Path) -> Any:
    """Read a YAML file. Raises UserError."""
    if path.is_dir():
        model = (path / "config.json").is_file()
        what = "a model; name it in a config as model.path" if model else "a directory"
        run = next((one for one in (path, path.parent) if (one / "config.yaml").is_file()), None)
        hint = f"; a run goes on with `opsd train {run} --resume`" if run else ""
        raise UserError(f"CONFIG is {str(path)!r}: {what}; it must be a YAML file{hint}")
    if not path.is_file():
        hint = near_file(path, (".yaml", ".yml")) or "; `opsd init` writes a first one"
        if " " in (typed := str(path).strip()) and Path(typed.split()[0]).is_file():
            hint = f"; without the quotes, which make it one name: `opsd train {typed}`"
        raise UserError(f"CONFIG is {str(path)!r}: no such file{hint}")
    if path.suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".py", ".safetensors"):
        mend = "a config names the data as data.source (`opsd init` writes one)"
        mend += f"; if this is one, name it {path.stem}.yaml" if path.suffix == ".json" else ""
        raise UserError(f"CONFIG is {str(path)!r}: a {path.suffix} file is not YAML; {mend}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"CONFIG is {str(path)!r}: {size:,} bytes; at most {MAX_BYTES:,} are read")
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        return load_yaml(text)
    except OSError as error:  # such as for a link to /proc/self/mem
        raise UserError(f"CONFIG is {str(path)!r}: it cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        hint = next((f"; {hint}" for said, hint in SLIPS.items() if said in str(error)), "")
        for pattern, said in LINES.items():
            if found := re.search(pattern, text, re.MULTILINE):
                hint = found.expand(f"; {said}")
        if named := re.search(r"column \d+: (\w+) \^ could not find", " ".join(str(error).split())):
            hint += f", as in `{named[1]}:`"
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}{hint}") from None


def load_yaml(text: str) -> Any:
    """Parse YAML; each use of an alias is a separate copy. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return _own(loader.construct_document(node))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # raised by Python, such as for the date 2020-13-45
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, sizes: dict[yaml.Node, int | None]) -> int:
    """Count a node's values, aliases included. Raises yaml.YAMLError for more than MAX_NODES."""
    if node in sizes:
        known = sizes[node]
        if known is None:
            raise yaml.YAMLError("an alias is inside the value that it repeats")
        return known
    sizes[node] = None
    kind = node.tag.rpartition(":")[2]
    if kind in CORE and not re.fullmatch(CORE[kind][0], str(node.value)):  # an explicit tag
        raise yaml.YAMLError(f"{str(node.value)!r} is no {kind}")
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inside = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    total = 1 + sum(_count(part, sizes) for part in inside)
    if total > MAX_NODES:
        raise yaml.YAMLError(f"it holds more than {MAX_NODES:,} values, aliases written out")
    sizes[node] = total
    return total


def _own(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _own(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_own(inside) for inside in value]
    return value
