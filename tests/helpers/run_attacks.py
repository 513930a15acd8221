"""Attacks on the files of a run or an evaluation, drawn from a `random.Random`."""

import copy
import gzip
import json
import math
import os
import shutil
from pathlib import Path

VALUES = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e308, -1e308, math.nan, math.inf, "",
    "4", "stop", "tiny", "a" * 5000, "\ud800", [], [[]], {}, [4, 5, 6, 7], {"0": 4},
    2**53 + 1, -(2**63), 2**64, 10**400, 5e-324, -0.0, 1.0, "1.0", "NaN", "\ufeff", "true", [None],
    "2026-13-45", "9999-12-31", [[[[[1]]]]], {"a": {"a": {"a": 1}}}, {"": ""}, ["a"] * 2000,
]  # fmt: skip
TEXTS = [
    "\x1b]0;title\x07\x1b[2J", "\u202etxt\u2066", "a\r\nopsd: all is well", "</script><img src=x>",
    "<script>document.title=1</script>", "javascript:alert(1)", "\"'><svg onload=alert(1)>",
    "../../../etc/passwd", "{{ 7 * 7 }}", "$\\frac_{$", "=1+1", "\0", "x" * 100_000,
]  # fmt: skip


def mutated(value, draw, more=()):
    """Copy the value with one to three places changed, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        place = value
        while True:
            inside = list(place if isinstance(place, dict) else range(len(place)))
            if not inside:
                break
            key = draw.choice(inside)
            if isinstance(place[key], dict | list) and draw.random() < 0.8:
                place = place[key]
                continue
            how = draw.randrange(4)
            if how == 0:
                del place[key]
            elif how == 1 and isinstance(place, list):
                place.append(copy.deepcopy(place[key]))
            else:
                other = draw.choice([*VALUES, *more])  # a list may be changed in its turn
                place[key] = copy.deepcopy(other) if isinstance(other, list | dict) else other
            break
    return value


def _json(path: Path, draw) -> None:
    """Change values in a line, or in the file."""
    whole = path.suffix == ".json"
    lines = [path.read_bytes()] if whole else path.read_bytes().splitlines()
    number = draw.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except (ValueError, RecursionError):
        return  # the file was already attacked
    if isinstance(value, dict | list):
        lines[number] = json.dumps(mutated(value, draw, TEXTS)).encode()
    path.write_bytes(b"\n".join(lines) + b"\n" * (draw.random() < 0.9))


def _lines(path: Path, draw) -> None:
    """Insert a line: not a record, deeply nested, very long, or a copy of another."""
    lines = path.read_bytes().split(b"\n")
    odd = [
        b"nonsense", b"7", b"[]", b"null", b"{}", b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe{",
        b"\0" * 100, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 1e400}', b" " * 3_000_000,
        b'{"step": 3, "x": "' + b"a" * 3_000_000 + b'"}', b'{"step": 1, "step": 2}', b"",
        b"[" * 5000 + b"]" * 5000, b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}", b"\xef\xbb\xbf{}",
        '{"step": 3}'.encode("utf-16"), b'{"step": NaN}', b'{"step": 3}\r', b'{"step": 3}{}',
        b"\x1a",
        b'{"step": 3,}', b"{'step': 3}", b'{"step": "\\ud800"}', b'{"step": 3}\x85{"step": 4}',
        draw.choice(lines), draw.choice(lines) + b"\r", draw.choice(lines)[:-1],
        draw.choice(lines) * 2,
    ]  # fmt: skip
    lines.insert(draw.randrange(len(lines)), draw.choice(odd))
    path.write_bytes(b"\n".join(lines))


def _bytes(path: Path, draw) -> None:
    """Change, cut or double bytes."""
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    length = draw.choice([1, 1, 4, 100, len(content)])
    content[start : start + length] = draw.choice(
        [b"", draw.randbytes(length % 1000), bytes(length), bytes(content[: length % 1000]) * 2]
    )
    path.write_bytes(content)


def _encoded(path: Path, draw) -> None:
    """The whole text in another encoding, with other line ends, or packed."""
    content = path.read_bytes()
    text, how = content.decode("utf-8", "replace"), draw.randrange(4)
    if how == 0:
        encoding = draw.choice(["utf-16", "utf-8-sig", "utf-32", "utf-16-be", "utf-7", "cp1252"])
        content = text.encode(encoding, "replace")
    elif how == 1:
        content = content.replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n", b"", b"\n\0"]))
    elif how == 2:
        content = gzip.compress(content)[: draw.choice([None, 9, 40])]
    else:
        content = draw.choice([b"", b"\n", b"\0" * 4096, content * 2, content + content[:-9]])
    path.write_bytes(content)


def _another_kind(path: Path, draw) -> None:
    """Replace the file by a pipe, a link, a directory or an endless file."""
    own = path.read_bytes()
    path.unlink()
    how = draw.randrange(13)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(path)
    elif how in (3, 4):
        path.symlink_to(draw.choice(["/dev/zero", "/dev/random", "/dev/stdin", "/proc/self/mem"]))
    elif how == 5:
        secret = next(p / "outside" for p in path.parents if (p / "outside").is_dir()) / "secret"
        if draw.random() < 0.5:
            secret.write_bytes(own + b"\n# the secret\n")
        path.symlink_to(secret)
    elif how == 6:
        path.write_bytes(own)
        os.truncate(path, 10**12)
    elif how == 7:
        path.write_bytes(b"")
    elif how == 8:
        path.symlink_to(draw.choice([".", "..", "/", "nowhere", "../outside"]))
    elif how == 9:
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    elif how == 10:
        path.mkdir()
        (path / "own").write_bytes(own)
    elif how == 11:  # beside it names that are no text
        path.write_bytes(own)
        odd = draw.choice([b"\xff", b"\xc3(", b"\x1b[2J", b"a\nb", b"-rf"])
        path.with_name(os.fsdecode(odd + os.fsencode(path.suffix))).write_bytes(own)


def plain(path: Path) -> bool:
    """Whether it is a regular file of usual size."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size < 10**7


def attack(directory: Path, names: list[str], draw) -> None:
    """Attack one to three of the named files in the directory."""
    for name in draw.sample(names, draw.randint(1, min(3, len(names)))):
        path = directory / name
        ways = [_bytes, _another_kind, _encoded]
        if path.suffix in (".json", ".jsonl"):
            ways += [_json, _json, _json, _lines if path.suffix == ".jsonl" else _json]
        if plain(path) and path.stat().st_size:
            draw.choice(ways)(path, draw)


def copied(source: Path, target: Path) -> Path:
    """Copy `source` beside a directory `outside`, which contains a file of the user."""
    (target / "outside").mkdir(parents=True)
    (target / "outside" / "secret").write_text("the secret\n")
    return shutil.copytree(source, target / "run")
