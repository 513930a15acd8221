"""Datasets as they come: each kind of file, damaged, mixed, in another encoding. The rows that are
taken are those that the file holds, by json, csv and pyarrow; all else is refused in one line."""

import csv
import gzip
import io
import json
import os
from decimal import Decimal
from pathlib import Path

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
from helpers.data_attacks import card, odd_chat
from helpers.image_models import picture
from helpers.mutations import Clock, as_json, changed, damaged, misplace, odd_value, one_line
from helpers.training_cases import ROWS
from PIL import Image

from opsd.common.errors import UserError
from opsd.data.images import UnreadableImageError
from opsd.data.rows import load_rows

RECORDS = [{**row.columns, "source": {"name": "a", "page": 1}, "level": 3} for row in ROWS[:6]]


CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": record["problem"]},
            {"role": "assistant", "content": record["solution"]},
        ],
        "answer": record["answer"],
    }
    for record in RECORDS
]


KINDS = ["jsonl", "json", "jsonl.gz", "csv", "tsv", "csv.gz", "parquet", "saved", "splits"]
KINDS.append("folder")


OLD = {"version": "1.0", "coerce_timestamps": "us", "allow_truncated_timestamps": True}
STEMS = ["rows"] * 7 + [
    "r\u00f6w\u0301s",
    "\u6570\u5b66",
    "a b",
    "\u202erows",
    "rows\n",
    "-rows",
    "ro%20ws",
]


STEMS += [
    "rows.csv",
    "rows?*[a]",
    "train-00000-of-00001",
    "\U0001f600",
    "'rows\"",
    "rows\\",
    "\x1b[2J",
]


def odd_records(draw) -> list:
    """Records of which some are changed: types mixed, columns gone, lists instead of objects."""
    records: list = [dict(one) for one in draw.choice([RECORDS, CHATS])]
    for _ in range(draw.randrange(3)):
        number = draw.randrange(len(records))
        how = draw.random()
        if how < 0.1:
            records[number] = odd_value(draw, records[number])
        elif how < 0.4 and isinstance(records[number], dict):
            records[number] = odd_chat(draw, records[number])
        elif isinstance(records[number], dict) and records[number]:
            records[number] = changed(draw, records[number])
    return records


def text_of(draw, records: list, kind: str) -> bytes:
    """Records as JSON, one a line, in one list, or in a list under a key."""
    if kind == "json" and draw.random() < 0.6:
        return as_json(draw, draw.choice([records, {"data": records}, {"data": records, "n": [1]}]))
    return b"".join(as_json(draw, one).replace(b"\n", b"") + b"\n" for one in records)


def table(draw, delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, quoting=draw.choice([0, 1]))
    names = ["problem", "solution", "answer", *draw.choice([[], ["", "note"], ["answer"], [" "]])]
    names = draw.choice([names, names, names[::-1], ["\ufeffproblem", *names[1:]]])
    writer.writerow(names)
    for record in RECORDS:
        row = [record.get(name, "x\ny") for name in names]
        if draw.random() < 0.05:
            row = draw.choice([row[:-1], [*row, "more"], [], ['a"b', *row[1:]]])
        writer.writerow(row)
    return file.getvalue().encode()


def columns(draw) -> pyarrow.Table:
    """A table with types that a file of its own may have, and texts that are none."""
    records = [{k: str(v) for k, v in record.items()} for record in RECORDS]
    made = {
        name: [record[name] for record in records] for name in ("problem", "solution", "answer")
    }
    arrays = {name: pyarrow.array(values) for name, values in made.items()}
    name = draw.choice(list(arrays))
    texts = [text.encode() for text in made[name]]
    broken = [text + b"\xff\xc3(" for text in texts]
    kind = draw.randrange(20)
    if kind == 0:
        data = pyarrow.array(broken, pyarrow.binary())
        arrays[name] = pyarrow.Array.from_buffers(pyarrow.string(), len(data), data.buffers())
    elif kind == 1:
        arrays[name] = pyarrow.array(texts, draw.choice([pyarrow.binary(), pyarrow.large_binary()]))
    elif kind == 2:
        arrays[name] = arrays[name].dictionary_encode()
    elif kind == 3:
        arrays["answer"] = pyarrow.array(
            range(6), draw.choice([pyarrow.int8(), pyarrow.float64(), pyarrow.decimal128(9, 2)])
        )
    elif kind == 4:
        types = [pyarrow.timestamp("ns"), pyarrow.timestamp("us"), pyarrow.duration("ns")]
        types.append(pyarrow.timestamp("s", "Mars/Crater"))
        type_ = draw.choice(types)
        far = 10**9 if type_ == types[-1] else 10**18  # no writer takes more seconds
        arrays["when"] = pyarrow.array([far, None, -far, 0, 1, 2], type_)
    elif kind == 5:
        arrays["when"] = pyarrow.array([2**43, 0, 1, 2, 3, 4], pyarrow.timestamp("s"))
    elif kind == 6:
        arrays["map"] = pyarrow.array([[("a", 1), ("a", 2)]] * 6, pyarrow.map_("string", "int64"))
    elif kind == 7:
        arrays[name] = pyarrow.array([None, *made[name][1:]])
    elif kind == 8:
        arrays["answer"] = pyarrow.array([float("nan"), 1.0, float("inf"), 1e300, -0.0, 2.5])
    elif kind == 9:
        arrays[name] = pyarrow.array([[text] for text in made[name]])
    elif kind == 10:
        arrays["day"] = pyarrow.array([0, 1, 2, 3, 4, 2**30], pyarrow.date32())
    elif kind == 11:
        arrays[name] = arrays[name].cast(pyarrow.large_string())
    elif kind == 12:
        arrays["more"] = odd_column(draw)
    elif kind == 13:  # a list of parts, as chats have, and half of its text broken
        parts = pyarrow.array(broken, pyarrow.binary())
        parts = pyarrow.Array.from_buffers(pyarrow.string(), len(parts), parts.buffers())
        arrays["more"] = draw.choice([pyarrow.StructArray.from_arrays([parts], ["text"]), parts])
    elif kind == 16:  # names of columns that are long, empty, no text to see, or a path
        odd = [
            "",
            " ",
            "a.b",
            "a" * 10**5,
            "\0",
            "\u202e",
            "images",
            "__index_level_0__",
            "\n",
            "0",
        ]
        arrays[draw.choice(odd)] = arrays[name]
    elif kind == 17:  # nests and widths
        deep = pyarrow.array([1] * 6)
        for _ in range(draw.choice([9, 60])):
            deep = pyarrow.StructArray.from_arrays([deep], ["a"])
        wide = [{f"c{n}": n for n in range(2000)}] * 6
        arrays["more"] = draw.choice([deep, pyarrow.array(wide)])
    elif kind == 14:
        arrays[name] = pyarrow.nulls(6, draw.choice([pyarrow.null(), pyarrow.string()]))
    made_of = pyarrow.table(
        list(arrays.values()), names=draw.choice([list(arrays)] * 9 + [["a"] * len(arrays)])
    )
    if kind == 15:  # what `datasets` and pandas write beside the columns, and other tools do not
        feature = draw.choice(
            [{"_type": "Image"}, {"_type": "Nobody"}, {"_type": "Value", "dtype": "int8"}, 5, None]
        )
        said = draw.choice([{"info": {"features": {name: feature}}}, {"info": []}, 7, "{"])
        said = said if said == "{" else json.dumps(said)
        made_of = made_of.replace_schema_metadata({"huggingface": said, "pandas": said})
    return made_of


def odd_column(draw) -> pyarrow.Array:
    """A column beside the texts, of a type that few files have."""
    far, days = [2**60, 0, -1, None, 2, 3], [1, 2, 3, 4, 5, None]
    fixed = pyarrow.array([b"\xff\0"] * 6, pyarrow.binary(2))
    return draw.choice(
        [
            pyarrow.array(days, pyarrow.time32("s")),
            pyarrow.array(far, pyarrow.time64("ns")),
            pyarrow.array(far, pyarrow.duration("us")),
            pyarrow.array(days, pyarrow.float32()).cast(pyarrow.float16()),
            pyarrow.array([Decimal("1.5")] * 6, pyarrow.decimal256(76, 30)),
            fixed,
            pyarrow.array([b"0123456789abcdef"] * 6, pyarrow.uuid()),
            pyarrow.ExtensionArray.from_storage(
                pyarrow.fixed_shape_tensor(pyarrow.int8(), [2]),
                pyarrow.array([[1, 2]] * 6, pyarrow.list_(pyarrow.int8(), 2)),
            ),
            pyarrow.array(['{"a": 1}', "{", "", None, "1", "NaN"], pyarrow.json_()),
            pyarrow.array([None, [], [None], [[1]], [[]], [[1, None]]]),
            pyarrow.array([{"a": {"a": {"a": n}}} for n in range(6)]),
            pyarrow.array([2**64 - 1] * 6, pyarrow.uint64()),
            pyarrow.array(["a", "b"] * 3, pyarrow.string_view()),
        ]
    )


def write(draw, kind: str, folder: Path) -> Path:
    """A dataset of this kind; damaged or of odd records in most cases."""
    stem = draw.choice(STEMS)
    path = folder / f"{stem}.{kind}"
    if kind in ("saved", "splits"):
        path = folder / "rows"
        data = datasets.Dataset.from_list([{k: str(v) for k, v in r.items()} for r in RECORDS])
        if kind == "splits":
            data = datasets.DatasetDict(train=data, test=data.select([0]))
        data.save_to_disk(path, **({"num_shards": 2} if kind == "saved" else {}))
        attack_directory(draw, path)
        return path
    if kind == "folder":
        path = folder / "rows"
        path.mkdir()
        texts = [{k: str(v) for k, v in record.items()} for record in RECORDS]
        (path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
        name, text = draw.choice(["README.md", ".huggingface.yaml"]), card(draw)
        marks = draw.choice([b"---\n", b"---\r\n", b"---\n", b" ---\r"]) * (name == "README.md")
        (path / name).write_bytes(
            marks + text + b"\n" * bool(marks) + marks + b"# Rows\n" * bool(marks)
        )
        if draw.random() < 0.1:
            misplace(draw, path / name)
        return path
    if kind == "parquet":
        how = draw.choice([{}, OLD, {"use_deprecated_int96_timestamps": True}])
        how |= {"row_group_size": draw.choice([2, 100]), "store_schema": draw.random() < 0.7}
        how["compression"] = draw.choice(["none", "zstd", "gzip", "brotli", "snappy"])
        pyarrow.parquet.write_table(columns(draw), path, **how)
        data = path.read_bytes()
    elif kind.startswith(("csv", "tsv")):
        data = table(draw, "," if kind.startswith("csv") else "\t")
    else:
        records = odd_records(draw) if draw.random() < 0.8 else RECORDS
        data = text_of(draw, records, kind)
    if draw.random() < 0.35:
        data = damaged(draw, data)
    if kind.endswith(".gz"):
        data = gzip.compress(data)
        kind = draw.randrange(8)
        if kind < 2:
            data = damaged(draw, data)
        elif kind == 2:  # its end missing, twice itself, itself packed, a head of another
            odd = [data[:-4], data[:-9], data[: len(data) // 2], data * 2, gzip.compress(data)]
            data = draw.choice([*odd, data + b"\0" * 512, data[:10], data[:3] + b"\xff" + data[4:]])
    path.write_bytes(data)
    if draw.random() < 0.03:
        misplace(draw, path)
    return path


def attack_directory(draw, path: Path) -> None:
    """Damage to a directory of `datasets`."""
    file = draw.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    kind = draw.randrange(4)
    if kind == 0:
        misplace(draw, file)
    elif kind == 1 or file.suffix != ".json":
        file.write_bytes(damaged(draw, file.read_bytes()))
    else:
        file.write_bytes(as_json(draw, changed(draw, json.loads(file.read_text()))))


def held(path: Path) -> list:
    """The records of a dataset, read directly."""
    for name in ("rows.jsonl", path.name):  # a file may lie in a directory of its own name
        if (path / name).is_file():
            return held(path / name)
    if path.is_dir():
        folder = path if (path / "state.json").is_file() else path / "train"
        state = json.loads((folder / "state.json").read_text())
        tables = []
        for one in state["_data_files"]:
            with pyarrow.memory_map(str(folder / one["filename"])) as file:
                tables.append(pyarrow.ipc.open_stream(file).read_all())
        return pyarrow.concat_tables(tables).to_pylist()
    if path.name.endswith("parquet"):
        return pyarrow.parquet.read_table(path).to_pylist()
    data = path.read_bytes()
    zipped = path.suffix == ".gz" or data[:2] == b"\x1f\x8b"
    text = (gzip.decompress(data) if zipped else data).decode("utf-8-sig")
    kind = path.name.removesuffix(".gz")[-4:]
    if kind in (".csv", ".tsv"):
        lines = csv.reader(io.StringIO(text, newline=""), delimiter="," if kind == ".csv" else "\t")
        names, *rows = [line for line in lines if line]
        names = [name.strip() for name in names]  # as a table's are read
        return [{n: v for n, v in zip(names, row, strict=True) if n} for row in rows]
    if path.suffix == ".json":
        try:
            value = json.loads(text, object_pairs_hook=each_once)
        except json.JSONDecodeError:
            pass
        else:
            if isinstance(value, dict):
                value = next((v for v in value.values() if isinstance(v, list) and v and
                              isinstance(v[0], dict) and "role" not in v[0]), [value])  # fmt: skip
            return value
    lines = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return [json.loads(line, object_pairs_hook=each_once) for line in lines if line.strip()]


def each_once(pairs: list) -> dict:
    assert len(dict(pairs)) == len(pairs), "a key stands there twice, and one of its values is lost"
    return dict(pairs)


def test_a_dataset_is_taken_as_it_is_or_refused(draw, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(draw, draw.choice(KINDS), tmp_path)
    skip = draw.random() < 0.3
    said: list[str] = []
    require = draw.choice([("problem", "solution", "answer"), ("problem",), ("problem", "answer")])
    try:
        with Clock():
            rows = load_rows(str(path), skip_incomplete=skip, note=said.append, require=require)
    except UserError as error:
        one_line(str(error), str(path), "data.")
        return
    records = held(path)
    left_out = int(said[0].split()[0]) if said else 0
    assert len(rows) + left_out == len(records)
    if not left_out:
        for row, record in zip(rows, records, strict=True):
            # NaN is not equal to itself.
            assert repr(row.columns) == repr(record)
            for name in ("problem", "solution"):
                given = record.get(name)
                if isinstance(given, str) and given.strip() and given.lstrip()[0] not in "[{":
                    assert getattr(row, name) == given
            for text in row.texts.values():
                text.encode()


NO_PICTURES = [
    None, "", [], [None], 7, 1.5, True, "nobody.png", "../outside.png", "/etc/passwd", "/dev/zero",
    "in",
    "link.png", "pipe.png", "up.png", "dir.png", "in/../a.png", "./a.png", "a\0.png",
    "a" * 5000, "~",
    "https://a/b.png", "file:///etc/passwd", "data:image/png;base64,AAAA",
    {"bytes": None, "path": None},
    {"bytes": [1, 2]}, {"bytes": "AAAA", "path": "a.png"}, {"path": 7}, {"a": 1}, [["a.png"]],
    ["a.png"] * 99,
    "A.PNG", "a.png ", "a.png#x", "%61.png", "\u202egnp.a", [{"path": "a.png"}, "b.jpg", None],
]  # fmt: skip


def test_images_of_rows_are_those_of_the_directory_or_refused(draw, tmp_path):
    place = tmp_path / "data"
    (place / "in").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(picture(3, 3, 9))
    good = {"a.png": picture(9, 5, 1), "b.jpg": picture(4, 4, 2, "JPEG"), "in/c.webp": b""}
    good["in/c.webp"] = picture(6, 6, 3, "WEBP")
    for name, image in good.items():
        (place / name).write_bytes(image)
    (place / "link.png").symlink_to("a.png")
    (place / "up.png").symlink_to("../outside.png")
    (place / "dir.png").mkdir()
    os.mkfifo(place / "pipe.png")
    if draw.random() < 0.5:
        name = draw.choice(sorted(good))
        (place / name).write_bytes(damaged(draw, good[name]))
        if draw.random() < 0.3:
            misplace(draw, place / name)
    values = [draw.choice([*good, draw.choice(NO_PICTURES)]) for _ in range(3)]
    kind = draw.choice(["jsonl", "parquet"])
    rows = [{"problem": "1?", "answer": "1", "pictures": one} for one in values]
    path = place / f"rows.{kind}"
    try:
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
        return  # no table of these
    inside = {file.resolve() for file in place.rglob("*") if file.is_file()}
    inside = {file for file in inside if file.is_relative_to(place.resolve())}
    try:
        with Clock():
            taken = load_rows(str(path), columns={"images": "pictures"}, require=("problem",))
            found = [image for row in taken for image in row.images]
            pixels = [numpy.asarray(image.pixels()) for image in found]
    except UserError as error:
        one_line(str(error), str(path), "image")
        return
    except UnreadableImageError as error:  # its reader says which row's
        one_line(str(error), "is damaged")
        return
    assert len(taken) == 3
    theirs = [numpy.asarray(Image.open(file).convert("RGB")) for file in inside if opened(file)]
    for one in pixels:
        assert any(one.shape == other.shape and (one == other).all() for other in theirs)


def opened(file: Path) -> bool:
    try:
        Image.open(file).load()
    except Exception:
        return False
    return True


def test_text_of_parquet_that_is_not_utf_8_is_refused(tmp_path):
    data = pyarrow.array([b"1 + 1?\xff"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, data.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"problem": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet' cannot be read as parquet: Unicode"):
        load_rows(str(tmp_path / "a.parquet"), require=["problem"])


def test_a_column_without_a_name_is_kept(tmp_path):
    table = pyarrow.table({"problem": ["1?"], "": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = load_rows(str(tmp_path / "a.parquet"), require=["problem"])
    assert row.columns == {"problem": "1?", "": "b"}


def test_a_directory_that_goes_while_it_is_looked_at_is_left_out(tmp_path, monkeypatch):
    """As below /proc, to which a link may lead."""
    (tmp_path / "rows" / "gone").mkdir(parents=True)
    scandir = os.scandir

    def gone(place):
        if str(place).endswith("gone"):
            raise FileNotFoundError(place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", gone)
    (tmp_path / "rows" / "another's").symlink_to("secret")
    stat = os.stat

    def refused(place, **more):
        if str(place).endswith("another's") and more.get("follow_symlinks", True):
            raise PermissionError(place)
        return stat(place, **more)

    monkeypatch.setattr(os, "stat", refused)
    with pytest.raises(UserError, match="was not saved by `datasets`"):
        load_rows(str(tmp_path / "rows"), require=["problem"])
