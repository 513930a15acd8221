"""Changes valid inputs at random, as damaged or wrong files would: values of other types, text in
other encodings, bytes lost or changed, files missing or replaced."""

import bz2
import copy
import gzip
import json
import lzma
import os
import re
import shutil
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

SECONDS = 20  # the most processor time
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 9123456\n"
PAGE = b"<!DOCTYPE html><html><body>Sign in to see this file</body></html>"

ODD = [
    None, True, False, 0, -1, 1, 2, 7, 0.5, -0.0, 1.0, 1e-300, 1e308, -1e308, 2**31, 2**63, 10**30,
    float("nan"), float("inf"), "", " ", "a", "0", "3", "1e-5", "nan", "no", "None", "true", "1:30",
    "../..", "/", "~", "{{ x }}", "\u00e9\u6570\U0001f600", "a\0b", "\ud800", "\x1b[2J", "x" * 5000,
    [], {}, [[]], [None], ["a", 1], {"": None}, {"a": {"b": []}}, [0] * 300, {"\ud800": 1},
    2**53 + 1, -(2**63) - 1, 10**400, 5e-324, "9" * 400, "1_000", "0x10", "\uff11", "3\r\n",
    "0000-00-00", "9999-12-31T23:59:60Z", "-99999999-01-01", "hf://a/b", "file:///etc/passwd",
    {"__class__": "a"}, {"_type": "Image"}, {"$ref": "#"}, [[[[[[0]]]]]],
    2**31 - 1, 2**32, -(2**31), 2**63 - 1, 2**64, 1e22, 1e16, 0.1 + 0.2, 1 - 2**-53, 2.0**-1074,
    float("-inf"), "\ufeff4", "4\ufeff", "e\u0301", "\u212a", "\u0130", "a\u2028b", "%s%n", "$(id)",
    "${HOME}", "a\\", "C:\\a", "\\\\h\\s", "con", ".", "..", "-", "--help", "a" * 256, "/" * 5000,
    "http://169.254.169.254/", "s3://a/b", "data:,a", "reasoning_gym:chain_sum", {"0": 0},
    {"a.b": 1}, {"then": {}}, {"path": None}, [True, 1, 1.0], ["a"] * 2000,
    {str(n): n for n in range(300)},
]  # fmt: skip


def odd_value(draw: Random, good: Any) -> Any:
    """A replacement for a valid value: of another type, or similar to it."""
    near: list[Any] = [str(good), [good], {"a": good}, [good, good]]
    if isinstance(good, int | float):
        near += [good + 1, good - 1, -good, good * 2, good // 2, float(good), good + 10**9]
    if isinstance(good, str):
        near += [good.upper(), good + " ", good[: len(good) // 2], good + "\0", good * 2]
    if isinstance(good, list):
        near += [good[1:], good[::-1], good * 2, [*good, None], dict(enumerate(map(str, good)))]
    if isinstance(good, dict):
        near += [list(good), list(good.items()), {k: None for k in good}]
    return copy.deepcopy(draw.choice(near if draw.random() < 0.5 else ODD))


def places(tree: Any, depth: int = 4) -> Iterator[tuple]:
    """Yield the paths to all values inside, down to a depth."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in inside:
        yield (key,)
        if depth > 1 and isinstance(value, dict | list):
            yield from ((key, *rest) for rest in places(value, depth - 1))


def changed(draw: Random, tree: Any) -> Any:
    """Copy the tree with one or two values replaced, renamed, removed or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 1, 2])):
        paths = list(places(tree))
        if not paths:
            break
        # Choose keys at the top often, not mostly the entries of long lists.
        top = draw.choice(paths)[:1] if draw.random() < 0.4 else draw.choice(paths)
        *above, key = top
        holder = tree
        for step in above:
            holder = holder[step]
        what = draw.randrange(6)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(key, str):
            other = draw.choice([key.upper(), key + "s", key[:-1], f" {key}", f"_{key}", ""])
            holder[other] = holder.pop(key)
        elif what == 2:
            holder[key] = copy.deepcopy(value_at(tree, draw.choice(paths)))
        else:
            holder[key] = odd_value(draw, holder[key])
    return tree


def value_at(tree: Any, path: tuple) -> Any:
    try:
        for step in path:
            tree = tree[step]
    except (LookupError, TypeError):
        return None
    return tree


def as_json(draw: Random, tree: Any) -> bytes:
    """The tree as JSON text, possibly with a repeated key, NaN, very long numbers, deep nesting, or
    in another encoding.
    """
    text = json.dumps(tree, indent=draw.choice([None, 2]), ensure_ascii=draw.random() < 0.7)
    kind = draw.randrange(18)
    keys = [m for m in re.finditer(r'"(\w+)": ', text)]
    if kind == 0 and keys:
        found = draw.choice(keys)
        value = json.dumps(draw.choice(ODD))
        text = f"{text[: found.start()]}{found[0]}{value}, {text[found.start() :]}"
    elif kind == 1 and keys:
        found = draw.choice(keys)
        odd = ["9" * 5000, "1e999", "-NaN", "01", "0x1", "[" * 99_999, '{"a":' * 9999, "'a'", "nul"]
        odd += [
            '"\\ud800",',
            '"\\udc00\\ud800",',
            '"\\u0000",',
            "-Infinity,",
            "1E+2,",
            "-0,",
            "+1,",
            "\ufeff",
        ]
        text = f"{text[: found.end()]}{draw.choice(odd)}{text[found.end() :]}"
    elif kind == 2:
        text = draw.choice(['"', "[", "{", "//x\n", "", "null ", "\x0c"]) + text
    elif kind == 3 and keys:  # whole nests, of which a parser may run out of stack
        found, depth = draw.choice(keys), draw.choice([100, 990, 5000, 100_000])
        value = draw.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])
        text = f"{text[: found.start()]}{found[0]}{value}, {text[found.start() :]}"
    elif kind == 4 and keys:
        found = draw.choice(keys)
        value = draw.choice(["NaN", "Infinity", "-Infinity", "1e400", "-1e-400", "4.0", "1E0"])
        end = re.search(r"[,}\]]", text[found.end() :])
        text = text[: found.end()] + value + (text[found.end() + end.start() :] if end else "")
    elif kind == 5:  # white space without an end, in one line or as lines
        odd = [" " * 3_000_000, "\n" * 100_000, "\r", "\t", "\u00a0", "\u2028", "\v"]
        at = draw.choice([0, len(text), keys[0].start() if keys else 0])
        text = text[:at] + draw.choice(odd) + text[at:]
    elif kind == 6:
        text = draw.choice(["[{}]", "{{}}", "{},", "{}{}", "({})", "{}\0"]).replace("{}", text)
    elif kind == 7:
        text = re.sub(r"([\]}])", r",\1", text, count=draw.choice([0, 1]))
    encoding = draw.choice(["utf-8"] * 9 + ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-7"])
    return text.encode(encoding if kind > 7 else "utf-8", "surrogatepass")


def damaged(draw: Random, data: bytes) -> bytes:
    """Cut, change, double or re-encode the bytes, or replace them by those of something else."""
    at = draw.randrange(len(data) + 1)
    kind = draw.randrange(18)
    if kind < 3:
        return data[:at]
    if kind < 6:
        found = bytearray(data)
        for _ in range(draw.choice([1, 1, 4, 64])):
            if found:
                found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
        return bytes(found)
    if kind == 6:
        return (
            data[:at] + draw.choice([b"\0", b"\xff", b"\xc3", b"\x80", b"\r", b"\x1a"]) + data[at:]
        )
    if kind == 7:
        return data[:at] + data[at + draw.choice([1, 8, 100]) :]
    if kind == 8:
        return draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b" ", b"\n\n"]) + data
    if kind == 9:
        encoding = draw.choice(["utf-16", "utf-32", "latin-1", "utf-7", "utf-16-be"])
        return data.decode("utf-8", "replace").encode(encoding, "replace")
    if kind == 10:
        return data + draw.choice([data, b"\0" * 4096, b"}", b"garbage", data[:at]])
    if kind == 11:
        return draw.choice([b"", b"\0" * len(data), b"\n", b"null", b"[]", b"{}", b"0"])
    if kind == 12:
        return draw.choice([LFS, PAGE, gzip.compress(data), b"PK\x03\x04" + data])
    if kind == 13:
        return data.replace(b"\n", draw.choice([b"\r\n", b"\r", b"", b"\n\n"]))
    if kind == 14:
        packed = draw.choice([gzip.compress, bz2.compress, lzma.compress, zlib.compress])(data)
        return draw.choice([packed, packed[: len(packed) // 2], packed * 2, packed + b"a"])
    if kind == 15:  # one very long line, of text or of none
        return (
            data[:at] + draw.choice([b"a", b" ", b"\0", b"\\", b'"', b"["]) * 3_000_000 + data[at:]
        )
    if kind == 16:
        one = draw.choice(
            [b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\xe2\x80\xa8", b"\x85"]
        )
        return data[:at] + one + data[at:]
    return data[:at] + data[at:][::-1]


def misplace(draw: Random, file: Path) -> None:
    """Remove a file, or replace it by something else."""
    kind = draw.randrange(13)
    other = draw.choice(sorted(file.parent.iterdir()))
    if kind == 5 and other.is_file() and not other.samefile(file):
        shutil.copy(other, file)
        return
    shutil.move(file, file.with_name(file.name + ".old"))
    if kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(file)
    elif kind == 3:
        file.symlink_to("nowhere")
    elif kind == 4:
        file.symlink_to(file.name + ".old")
    elif kind == 6:
        os.mkfifo(file)
    elif kind == 7:
        file.symlink_to(draw.choice(["/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem"]))
    elif kind == 8:
        file.mkdir()
        shutil.move(file.with_name(file.name + ".old"), file / file.name)
    elif kind == 9:
        file.symlink_to(draw.choice([".", "..", "/", "/etc/passwd", "/proc/self/environ"]))
    elif kind == 10:  # far larger than it is
        shutil.copy(file.with_name(file.name + ".old"), file)
        os.truncate(file, 10**12)
    elif kind == 11:  # a link to a pipe, which waits as long as the pipe itself
        os.mkfifo(file.with_name("pipe"))
        file.symlink_to("pipe")
    elif kind == 12:  # names that are no text, or that another system takes for this one
        stem, suffix = os.fsencode(file.stem), os.fsencode(file.suffix)
        name = draw.choice([b"\xff", b"\xc3(", stem + b"\n", stem.upper(), b"-" + stem, b"\x1b[2J"])
        shutil.copy(
            file.with_name(file.name + ".old"), os.fsencode(file.parent) + b"/" + name + suffix
        )


ATTRIBUTES = re.compile(r"Traceback|object at 0x|pydantic|\[type=|errors\.pydantic|internal error")
"""Parts of Python errors that no message may show a user."""


class Clock:
    """A context that limits its code to `SECONDS` of processor time, and to two minutes in all."""

    def __enter__(self) -> "Clock":
        def stop(*_: Any) -> None:
            raise AssertionError("it waits for ever")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(120)
        self.begun = time.process_time()
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        signal.alarm(0)
        assert kind is not None or time.process_time() - self.begun < SECONDS


def one_line(text: str, *parts: str) -> None:
    """Assert that a refusal is one clear line that names one of the parts."""
    assert "\n" not in text.strip() and len(text) < 2000, text
    assert not ATTRIBUTES.search(text), text
    assert any(part in text for part in parts), text
