"""YAML as a config may have it: plain values, each key once, no larger than it looks."""

from pathlib import Path
from typing import Any

import yaml

from opsd.common.errors import UserError

MAX_BYTES = 1 << 20
"""Largest file: a config has some kilobytes, and parsing a large file takes minutes."""

MAX_NODES = 100_000
"""Most values in a file, with each alias replaced by what it repeats."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice; SafeLoader drops the first of them silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return node


def read_yaml(path: Path, field: str = "CONFIG") -> Any:
    """The value of a file that the user has named as `field`. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{field} is {str(path)!r}: a directory; it must be a YAML file")
    if not path.is_file():
        raise UserError(f"{field} is {str(path)!r}: no such file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{field} is {str(path)!r}: {size:,} bytes; at most {MAX_BYTES:,} are read")
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def load_yaml(text: str) -> Any:
    """The document's value; what an alias repeats is a copy. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return _own(loader.construct_document(node))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # of Python's, such as the date 2020-13-45
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, sizes: dict[yaml.Node, int | None]) -> int:
    """How many values a node holds with its aliases written out."""
    if node in sizes:
        known = sizes[node]
        if known is None:
            raise yaml.YAMLError("an alias stands inside of what it repeats")
        return known
    sizes[node] = None
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
