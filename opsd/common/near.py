"""Suggestions for unknown names, to append to an error message."""

import difflib
import re
from collections.abc import Iterable
from glob import escape
from pathlib import Path

from opsd.common.files import read_toml

HUB_ADDRESS = re.compile(
    r"(?:https?:/+)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)"
)

USUAL: dict[str, list[str]] = read_toml(__file__, "usual")
"""Our column → usual names elsewhere, which error messages suggest."""

ROWS = (".jsonl", ".json", ".parquet", ".csv")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most similar to `word`, ignoring case, hyphens and spaces, or None. One with
    the same letters, such as rank for rnak, is similar at any cutoff."""
    plain = {_plain(name): name for name in reversed(list(known))}
    near = [name for name in plain if sorted(name) == sorted(_plain(word))]
    near += difflib.get_close_matches(_plain(word), plain, n=1, cutoff=cutoff)
    return plain[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'train'?`, or "" if no known name is similar."""
    known = [*known]
    near = nearest(word, known, cutoff=0.9)  # a slip of the finger
    if near is None:  # cosine_with_restarts holds cosine
        held = [one for one in known if f"_{_plain(one)}_" in f"_{_plain(word)}_"]
        near = max(held, key=len, default=None) or nearest(word, known)
    return f"; did you mean {near!r}?" if near else ""


def near_file(path: str | Path, suffixes: tuple[str, ...] = ("",)) -> str:
    """`; did you mean 'rows.jsonl'?` for a missing path, by the files in its directory, here and in
    the directories here, or `'owner/name'` for an address on the hub; else what is beside it."""
    if named := HUB_ADDRESS.match(str(path)):
        return f"; did you mean {named[1]!r}?"
    if "$" in str(path):
        return "; a config fills in no variables: write the path itself"
    path = Path(path)
    if path.is_file():  # where a directory is wanted
        return f"; did you mean {str(path.parent)!r}?"
    try:
        there = [one.name for one in path.parent.iterdir() if one.name.endswith(suffixes)]
    except OSError:
        there = []
    near = next((path.name + s for s in suffixes if path.name + s in there), None)
    rows = [one for one in there if one.endswith(ROWS) and path.suffix in ROWS]
    only = rows[0] if len(rows) == 1 else None  # file of rows
    near = near or nearest(path.name, there) or only
    # Else one of that name here, or in a directory here.
    names = [escape(path.name.removesuffix(end) + end) for end in suffixes if path.name]
    others = (one for place in ("", "*/") for name in names for one in Path().glob(place + name))
    found = path.parent / near if near else next(others, None)
    if found or path.parent == Path():
        return f"; did you mean {str(found)!r}?" if found else ""
    listed = ", ".join(sorted(one for one in there if one[0] != ".")[:5])
    return f"; {str(path.parent)!r} has {listed}" if listed else ""


def near_hub(name: str, kind: str = "models") -> str:
    """`; did you mean 'Qwen/Qwen3-8B'?` for a name like a well-known one, or without an owner.
    kind: models or datasets."""
    known = {one.rpartition("/")[2]: one for one in read_toml(__file__, "hub")[kind]}
    last = name.rpartition("/")[2]
    start = (one for one in known if len(last) > 4 and _plain(one).startswith(_plain(last)))
    near = known.get(nearest(last, known, cutoff=0.85) or next(start, ""), name)
    if near != name:
        return f"; did you mean {near!r}?"
    return "" if "/" in name else f"; a hub name has an owner, as in {next(iter(known.values()))}"


def near_model(path: Path) -> str:
    """`; did you mean 'run/model'?` for a directory that holds models of a run, ours or another
    trainer's, but is none itself. Of numbered checkpoints it suggests the last."""
    found = {
        file.parent
        for name in ("config.json", "adapter_config.json")
        for place in ("*", "best/*", "*/model")
        for file in path.glob(f"{place}/{name}")
    }
    ours = [path / "opsd" / "model", path / "best" / "model", path / "model"]

    def rank(directory: Path) -> tuple[int, int, str]:
        number = directory.name.rpartition("-")[2]
        own = ours.index(directory) if directory in ours else -1
        return own, int(number) if number.isdecimal() else -1, str(directory)

    return f"; did you mean {str(max(found, key=rank))!r}?" if found else ""


def _plain(name: str) -> str:
    return re.sub(r"[\s.-]+", "_", name.strip().lower())
