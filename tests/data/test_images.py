"""Images in rows: where they may come from, what is refused, and what two rows have in common."""

import io
import json
import struct
import zlib

import datasets
import numpy
import pandas
import pytest
from helpers.image_models import picture
from PIL import Image

from opsd.common.errors import UserError
from opsd.data.images import MOST_PIXELS, UnreadableImageError, read_images
from opsd.data.rows import load_rows, split_rows
from opsd.evaluate.benchmarks import Benchmark
from opsd.runs.directory import check_problems

ROW = {"problem": "What is it?", "answer": "4"}


def rows_of(source, **more):
    columns = {"images": "pictures"}
    return load_rows(source, columns=columns, require=("problem", "answer"), **more)


def write(tmp_path, *values):
    lines = [json.dumps({**ROW, "pictures": value}) + "\n" for value in values]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return str(tmp_path / "rows.jsonl")


def raw(image):
    """The pixels that Pillow itself reads of an encoded image."""
    return numpy.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def assert_pixels(row, *encoded):
    assert len(row.images) == len(encoded)
    for image, wanted in zip(row.images, encoded, strict=True):
        assert image.pixels().mode == "RGB"
        assert (numpy.asarray(image.pixels()) == raw(wanted)).all()


def test_paths_beside_a_file(tmp_path):
    first, second = picture(9, 5, 1), picture(4, 4, 2, "JPEG")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(first)
    (tmp_path / "b.jpg").write_bytes(second)
    rows = rows_of(write(tmp_path, "in/a.png", ["in/a.png", "b.jpg"], None, [], ""))
    assert_pixels(rows[0], first)
    assert_pixels(rows[1], first, second)
    assert [len(row.images) for row in rows[2:]] == [0, 0, 0]
    assert "pictures" not in rows[0].columns  # no template is given bytes
    (tmp_path / "in" / "a.png").write_bytes(picture(9, 5, 3))
    with pytest.raises(UnreadableImageError, match="has changed since it was read first"):
        rows[0].images[0].pixels()


def test_images_as_datasets_keeps_them(tmp_path):
    images = [picture(9, 5, n, "JPEG") for n in range(3)]
    features = datasets.Features(
        {
            **dict.fromkeys(ROW, datasets.Value("string")),
            "pictures": datasets.List(datasets.Image()),
        }
    )
    records = [{**ROW, "pictures": [{"bytes": one, "path": None}] * 2} for one in images]
    data = datasets.Dataset.from_list(records, features=features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "rows.parquet")
    for source in (str(tmp_path / "saved"), str(tmp_path / "rows.parquet"), data):
        for row, image in zip(rows_of(source), images, strict=True):
            assert_pixels(row, image, image)
            assert all(one.source == image for one in row.images)  # encoded, as it was
    single = datasets.Features({**features, "pictures": datasets.Image()})
    one = [{**ROW, "pictures": {"bytes": images[1], "path": None}}]
    assert_pixels(rows_of(datasets.Dataset.from_list(one, features=single))[0], images[1])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_pillow_and_their_modes(mode):
    image = Image.open(io.BytesIO(picture(6, 7))).convert(mode)
    (row,) = rows_of([{**ROW, "pictures": image}])
    assert (numpy.asarray(row.images[0].pixels()) == numpy.asarray(image.convert("RGB"))).all()
    (row,) = rows_of(pandas.DataFrame([{**ROW, "pictures": [image]}]))
    assert len(row.images) == 1


def test_a_photograph_is_turned_as_its_camera_was():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(6, 3))).save(file, "JPEG", exif=exif)
    assert read_images(file.getvalue(), None)[0].pixels().size == (3, 6)


def bomb(width, height):
    """A PNG of a hundred bytes that says how large it is, and is not."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(8))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("https://example.com/a.png", "image 1 is an address, which is not followed"),
        ("data:image/png;base64,AAAA", "image 1 is an address, which is not followed"),
        ("../secret.png", "image 1 is '../secret.png', outside of"),
        ("/etc/hostname", "outside of"),
        ("link.png", "outside of"),
        ("absent.png", "no such file"),
        ("a\0.png", "image 1 is 'a\\x00.png', which leads to no file"),
        ("a" * 5000, "which leads to no file"),
        ("circle.png", "which leads to no file"),
        ("rows.jsonl", "image 1 is not a PNG, JPEG, WEBP image"),
        (7, "is of type int: it may be bytes, a path"),
        ([["a"]], "is of type list"),
        ({"bytes": None, "path": None}, "is of type NoneType"),
    ],
)
def test_what_is_no_image_is_refused_in_a_line(value, said, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(picture(4, 4))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "circle.png").symlink_to("circle.png")
    source = write(tmp_path / "data", value)
    with pytest.raises(UserError) as told:
        rows_of(source)
    assert said in str(told.value) and "row 1 of" in str(told.value)
    assert "column 'pictures' (images)" in str(told.value) and "\n" not in str(told.value)


def test_a_hub_row_reads_no_files(tmp_path):
    with pytest.raises(UnreadableImageError, match="is the path '/etc/hostname', but its source"):
        read_images("/etc/hostname", None)


def test_large_images_are_refused_by_their_heads():
    for side, said in ((100_000, "too many"), (6_000, "6000 x 6000")):
        with pytest.raises(UnreadableImageError, match=rf"has {said} pixels \(at most"):
            read_images(bomb(side, side), None)
        assert side**2 > MOST_PIXELS
    with pytest.raises(UnreadableImageError, match=r"takes .* bytes"):
        read_images(bytes((1 << 26) + 1), None)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "TIFF")
    with pytest.raises(UnreadableImageError, match="is not a PNG, JPEG, WEBP image"):
        read_images(file.getvalue(), None)
    (short,) = read_images(bomb(200, 200), None)
    with pytest.raises(UnreadableImageError, match="is damaged"):
        short.pixels()


def test_rows_whose_images_cannot_be_read_are_left_out_where_that_is_asked(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(4, 4))
    said = []
    rows = rows_of(write(tmp_path, "b.png", "a.png"), skip_incomplete=True, note=said.append)
    assert len(rows) == 1 and "no such file" in said[0]


def test_a_row_with_images_that_no_column_is_named_for_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has 'image', .*: data.columns.images=image"):
        load_rows([{**ROW, "image": picture(4, 4)}], require=("problem",))
    with pytest.raises(UserError, match=r"data.columns.images: .* has no column 'pictures'"):
        rows_of([{**ROW, "pics": picture(4, 4)}])


def test_other_images_are_another_benchmark_and_another_run(tmp_path):
    first, second = (rows_of([{**ROW, "pictures": picture(4, 4, n)}]) for n in (1, 2))
    digests = {Benchmark("mine", "rows", rows).digest() for rows in (first, first, second)}
    assert len(digests) == 2
    check_problems(tmp_path, {"data.source": first}, None)
    check_problems(tmp_path, {"data.source": first}, tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match="the problems are not those that the run"):
        check_problems(tmp_path, {"data.source": second}, tmp_path / "checkpoint-1")


def test_one_question_of_two_images_is_two_problems():
    first, second = picture(4, 4, 1), picture(4, 4, 2)
    rows = rows_of([{**ROW, "pictures": one} for one in (first, second, first)])
    kept, held_out = split_rows(rows, 1, seed=0)
    assert len(held_out) == 1 and len(kept) in (1, 2)
    assert not {row.same_problem for row in kept} & {row.same_problem for row in held_out}
