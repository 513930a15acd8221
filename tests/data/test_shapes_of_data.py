"""Data as people have them: files, chats, numbers, rows with holes, several sources."""

import csv
import gzip
import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
import yaml
from helpers.image_models import picture

from opsd.common.errors import UserError
from opsd.data.chats import read_chat
from opsd.data.rows import Row, load_rows, mixture

RECORDS = [
    {"problem": f"{n} + 1?", "solution": f"So, {n} + 1\n= {n + 1}", "answer": str(n + 1)}
    for n in range(4)
]
ROWS = [Row(*record.values(), record) for record in RECORDS]


def lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def table(path, delimiter):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, RECORDS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)


def save(name, folder):
    path = folder / name
    if name in ("semicolons.csv", "tabs.csv"):
        table(path, ";" if name == "semicolons.csv" else "\t")
    elif name.endswith((".csv", ".tsv")):
        table(path, "," if name.endswith(".csv") else "\t")
    elif name == "under a key.json":
        path.write_text(json.dumps({"version": 1, "data": RECORDS}))
    elif name == "indented.json":
        path.write_text(json.dumps({"data": RECORDS}, indent=2))
    elif name in ("list.json", "list.jsonl"):
        path.write_text(json.dumps(RECORDS, indent=2))
    elif name == "columns.json":
        path.write_text(pd.DataFrame(RECORDS).to_json())
    elif name == "lists.json":
        path.write_text(json.dumps({name: [r[name] for r in RECORDS] for name in RECORDS[0]}))
    elif name == "index.json":
        path.write_text(pd.DataFrame(RECORDS).to_json(orient="index", indent=1))
    elif name == "zipped without the name.jsonl":
        path.write_bytes(gzip.compress(lines(RECORDS).encode()))
    elif name == "mark.jsonl":
        path.write_text(lines(RECORDS), encoding="utf-8-sig")
    elif name.endswith(".gz"):
        plain = save(name.removesuffix(".gz"), folder)
        path.write_bytes(gzip.compress((folder / plain).read_bytes()))
    else:
        path.write_text(lines(RECORDS))
    return str(path)


NAMES = [
    "rows.jsonl",
    "rows.ndjson",
    "rows.JSONL",
    "mark.jsonl",
    "rows.jsonl.gz",
    "rows.json",
    "list.json",
    "list.json.gz",
    "under a key.json",
    "indented.json",
    "columns.json",
    "lists.json",
    "index.json",
    "semicolons.csv",
    "tabs.csv",
    "list.jsonl",
    "zipped without the name.jsonl",
    "rows.csv",
    "rows.csv.gz",
    "rows.tsv",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    assert load_rows(save(name, tmp_path)) == ROWS


def test_records_of_python_are_a_source():
    assert load_rows(RECORDS) == ROWS
    assert load_rows(datasets.Dataset.from_list(RECORDS)) == ROWS
    assert load_rows({name: [r[name] for r in RECORDS] for name in RECORDS[0]}) == ROWS
    with pytest.raises(UserError, match="row 1 of 'the list that was given' has no text in column"):
        load_rows([{**RECORDS[0], "answer": ""}])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "problem,answer\n1,2,3\n", "line 2 has 3 fields, and the first line names 2"),
        ("a.csv", "problem,problem\n1,2\n", "must name the columns, each once"),
        ("a.json", '{"a": [{"x": 1}],\n"b": [{"x": 2}]}', "holds 'a', 'b': expected"),
        ("a.jsonl.gz", "no gzip", "cannot be read: Not a gzipped file"),
        ("a.parquet.gz", "no", "not a .jsonl"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path / name))


USER = {"role": "user", "content": "1 + 1?"}
ANSWER = {"role": "assistant", "content": "So 2."}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
CHATS = {
    "messages": ({"messages": [USER, ANSWER]}, ()),
    "a system message": ({"messages": [SYSTEM, USER, ANSWER]}, (SYSTEM,)),
    "several turns": ({"messages": [*EARLIER, USER, ANSWER]}, tuple(EARLIER)),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "1 + 1?"},
                {"from": "gpt", "value": "So 2."},
            ]
        },
        (),
    ),
    "prompt and completion": ({"prompt": [USER], "completion": [ANSWER]}, ()),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}, ANSWER]},
        (),
    ),
    "parts that are texts": ({"messages": [{**USER, "content": ["1 + ", "1?"]}, ANSWER]}, ()),
    "roles in capitals": (
        {"messages": [{**USER, "role": "User"}, {**ANSWER, "role": "ASSISTANT"}]},
        (),
    ),
    "OASST": (
        {
            "conversations": [
                {"from": "prompter", "value": "1 + 1?"},
                {"from": "assistant", "value": "So 2."},
            ]
        },
        (),
    ),
    "a prompt and a solution": ({"prompt": [SYSTEM, USER], "solution": "So 2."}, (SYSTEM,)),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_a_problem_and_a_solution(name):
    record, history = CHATS[name]
    record = {**record, "answer": "2"}
    (row,) = load_rows([record])
    assert row == Row("1 + 1?", "So 2.", "2", record, history)


def test_columns_reach_into_chats_and_lists():
    record = {"chat": [SYSTEM, USER, ANSWER], "reward_model": {"ground_truth": "2"}}
    columns = {"problem": "chat", "answer": "reward_model.ground_truth"}
    assert load_rows([record], columns=columns)[0].solution == "So 2."
    columns |= {"problem": "chat.1.content", "solution": "chat.-1.content"}
    (row,) = load_rows([record], columns=columns)
    assert (row.problem, row.solution, row.history) == ("1 + 1?", "So 2.", ())
    with pytest.raises(UserError, match=r"data\.columns\.problem: .* no column 'chat\.9\.content'"):
        load_rows([record], columns={**columns, "problem": "chat.9.content"})


TEXTS = {
    "JSON": json.dumps([SYSTEM, USER, ANSWER]),
    "pandas, to CSV": str([SYSTEM, USER, ANSWER]),
    "an array": np.array([SYSTEM, USER, ANSWER], dtype=object),
}


@pytest.mark.parametrize("column", ["messages", "prompt", "problem"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_chat_may_be_written_as_text(name, column):
    (row,) = load_rows([{column: TEXTS[name], "answer": "2"}])
    assert (row.problem, row.solution, row.history) == ("1 + 1?", "So 2.", (SYSTEM,))


def test_a_list_that_is_no_chat_stays_a_text():
    for text in (
        "[1, 2] sorted?",
        "[asy] draw(); [/asy]",
        "{1, 2} has how many?",
        '["a"]',
        "[" * 9,
    ):
        assert load_rows([{**RECORDS[0], "problem": text}])[0].problem == text


def test_a_system_message_may_stand_beside_the_chat():
    shared = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "So 2."}]
    record = {"system": "Be brief.", "conversations": shared, "answer": "2"}
    assert load_rows([record])[0].history == (SYSTEM,)
    own = {"from": "system", "value": "Be long."}
    record["conversations"] = [own, *shared]
    assert load_rows([record])[0].history[0]["content"] == "Be long."
    assert load_rows([{**RECORDS[0], "system": "metric"}])[0].history == ()


IMAGE, WORDS = {"type": "image"}, {"type": "text", "text": "How many?"}


def asked(*parts):
    return [{"role": "user", "content": [*parts]}, ANSWER]


def with_images(messages, count):
    """A row as TRL and the hub have them: the images' places in the chat, the images beside it."""
    record = {"messages": messages, "answer": "2", "images": [picture(8, 8)] * count}
    return load_rows([record], columns={"images": "images"})


def test_images_at_the_beginning_of_the_question_are_those_of_their_column():
    (row,) = with_images(asked(IMAGE, IMAGE, WORDS), 2)
    assert row.problem == "How many?" and len(row.images) == 2
    assert len(with_images(asked(WORDS), 1)[0].images) == 1  # its template shows them


@pytest.mark.parametrize(
    "messages, said",
    [
        (asked(WORDS, IMAGE), "image after a text .*where its template has"),
        ([*asked(IMAGE, WORDS), *asked(WORDS)], "has images before its last question"),
        (asked(IMAGE, WORDS), "its chat shows 1 images, its column has 2"),
    ],
)
def test_images_elsewhere_are_refused_in_a_line(messages, said):
    with pytest.raises(UserError, match=said):
        with_images(messages, 2)


@pytest.mark.parametrize(
    "messages, said",
    [
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, ANSWER],
         "parts that are no text: image .map the column of a row.s images: columns.images=images"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]},
          {"role": "tool", "content": "2"}, ANSWER], "calls tools"),
        ([USER, {"role": "assistant", "content": None}], "of the assistant without content"),
        ([{"from": "human", "value": "?"}, {"from": "function_call", "value": ""}], "calls tools"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_row_or_left_out(messages, said):
    chats = [{"messages": [USER, ANSWER], "answer": "2"}, {"messages": messages, "answer": "2"}]
    with pytest.raises(UserError, match=f"row 2 of .*: its chat .*{said}"):
        load_rows(chats)
    told = []
    assert len(load_rows(chats, skip_incomplete=True, note=told.append)) == 1
    assert told[0].startswith("1 rows are left out")


@pytest.mark.parametrize(
    "column, value",
    [("images", [b"png"]), ("image", {"bytes": b"png"}), ("answer", "N/A"), ("answer", "?"),
     ("messages", []), ("messages", [{"content": "?"}])],
)  # fmt: skip
def test_what_nobody_could_learn_of_is_refused_by_row(column, value):
    row = dict(RECORDS[0])
    if column == "messages":
        del row["problem"]
    with pytest.raises(UserError, match=f"row 1 of .*'{column}'"):
        load_rows([{**row, column: value}])
    for nothing in ([], None, "", "https://example.org/figure.png"):
        assert load_rows([{**RECORDS[0], "images": nothing}])[0].problem == RECORDS[0]["problem"]


def test_an_answer_inside_an_object_is_named():
    with pytest.raises(UserError, match=r"data\.columns\.answer can .* 'answer\.value'"):
        load_rows([{**RECORDS[0], "answer": {"value": "2", "type": "int"}}])
    verl = {"prompt": [USER], "reward_model": json.dumps({"ground_truth": "2"}), "solution": "So."}
    for record in (verl, {**verl, "reward_model": {"ground_truth": "2"}}):
        assert load_rows([record], columns={"answer": "reward_model.ground_truth"})[0].answer == "2"


def test_a_table_as_pandas_writes_it(tmp_path):
    """With its index, and whole numbers as fractions because one of them is not there."""
    frame = pd.DataFrame([*RECORDS, {**RECORDS[0], "answer": None}])
    frame["answer"] = frame["answer"].astype(float)
    frame.to_csv(tmp_path / "rows.csv")
    rows = load_rows(str(tmp_path / "rows.csv"), skip_incomplete=True)
    assert [row.answer for row in rows] == [record["answer"] for record in RECORDS]
    assert load_rows(frame, skip_incomplete=True)[3].answer == "4"
    (tmp_path / "two.csv").write_text(",,a\n1,2,3\n")
    with pytest.raises(UserError, match="must name the columns"):
        load_rows(str(tmp_path / "two.csv"))


def test_splits_are_for_sources_that_have_them(tmp_path):
    data = datasets.Dataset.from_list(RECORDS)
    both = datasets.DatasetDict({"train": data, "test": data.select([2])})
    both.save_to_disk(tmp_path / "both")
    data.save_to_disk(tmp_path / "one")
    for source in (both, str(tmp_path / "both")):
        assert load_rows(source) == ROWS
        assert load_rows(source, default_split="test") == load_rows(source, split="test")
        assert load_rows(source, split="test") == ROWS[2:3]
        with pytest.raises(UserError, match=r"data\.split: 'dev' is not known"):
            load_rows(source, split="dev")
    for source in (RECORDS, data, save("rows.jsonl", tmp_path), str(tmp_path / "one")):
        assert load_rows(source, default_split="test") == ROWS
        with pytest.raises(UserError, match=r"data\.split is 'test': .* has no splits"):
            load_rows(source, split="test")


def test_a_chat_without_a_user_is_none():
    assert read_chat([SYSTEM]) is None and read_chat([]) is None and read_chat(["a"]) is None


@pytest.mark.parametrize(
    "value, text",
    [
        (8.0, "8"),
        (8, "8"),
        (0.5, "0.5"),
        (-3.0, "-3"),
        (1e300, "1e+300"),
        (Decimal("2.50"), "2.5"),
        (np.int64(8), "8"),
        (np.float64(8), "8"),
        (["$3$"], "$3$"),
        (["3", "5"], "3, 5"),
        ([3.0, 5], "3, 5"),
        (np.array([3, 5]), "3, 5"),
        ((3, 5), "3, 5"),
        (Fraction(1, 2), "1/2"),
    ],
)
def test_numbers_are_answers(value, text):
    assert load_rows([{"problem": "?", "answer": value}], require=["answer"])[0].answer == text


@pytest.mark.parametrize("value", [None, float("nan"), True, " ", [], [None], "nan", "<NA>", {}])
def test_what_is_no_number_is_no_answer(value):
    with pytest.raises(UserError, match="no text in column 'answer'"):
        load_rows([{"problem": "?", "answer": value}], require=["answer"])


def test_incomplete_rows_are_an_error_or_counted():
    holes = [
        RECORDS[0],
        {**RECORDS[1], "solution": None},
        {**RECORDS[2], "answer": " "},
        RECORDS[3],
    ]
    with pytest.raises(UserError, match=r"row 2 .* column 'solution'"):
        load_rows(holes)
    told = []
    rows = load_rows(holes, skip_incomplete=True, note=told.append)
    assert rows == [ROWS[0], ROWS[3]]
    (said,) = told
    assert said.startswith("2 rows are left out as incomplete; the first: row 2 of")
    with pytest.raises(UserError, match=r"row 1 .* column 'solution'"):
        load_rows([holes[1]], skip_incomplete=True)
    assert load_rows(holes, skip_incomplete=True, limit=2) == [ROWS[0], ROWS[3]]


def test_a_mapped_column_that_nobody_needs_may_have_holes():
    records = [{**RECORDS[0], "cot": ""}, {**RECORDS[1], "cot": None}]
    assert len(load_rows(records, columns={"solution": "cot"}, require=["problem"])) == 2


def test_a_mixture_has_each_source_as_often_as_its_weight_says():
    a, b = ROWS[:2], ROWS[2:]
    assert mixture([(a, 1), (b, 1)], 0) == ROWS
    assert mixture([(a, 2), (b, 0)], 0) == a + a
    assert len(mixture([(a, 1.5), (b, 0.5)], 0)) == 4
    assert mixture([(a, 0.5)], 0) == mixture([(a, 0.5)], 0) and len(mixture([(a, 0.01)], 0)) == 1


@pytest.mark.parametrize(
    "said",
    [
        {"content": "So 3.", "reasoning_content": "\nWe add.\n"},
        {"content": "So 3.", "thinking": "We add."},
        {
            "content": [
                {"type": "thinking", "thinking": "We add."},
                {"type": "text", "text": "So 3."},
            ]
        },
    ],
)
def test_a_thought_apart_from_the_content_is_kept(said):
    chat = read_chat([{"role": "user", "content": "1 + 2?"}, {"role": "assistant", **said}])
    assert chat.solution == "<think>\nWe add.\n</think>\n\nSo 3."


@pytest.mark.parametrize("type", ["jsonl", "parquet"])
def test_a_directory_of_shards_is_a_source(type, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for split, records in (("train", RECORDS), ("test", RECORDS[:1])):
        for number in range(0, len(records), 2):
            data = datasets.Dataset.from_list(records[number : number + 2])
            name = folder / f"{split}-0000{number // 2}-of-0000{len(records) // 2}.{type}"
            data.to_parquet(name) if type == "parquet" else data.to_json(name)
    assert [row.texts for row in load_rows(str(folder))] == RECORDS
    assert [row.texts for row in load_rows(str(folder), split="test")] == RECORDS[:1]
    with pytest.raises(UserError, match=r'data.source: the directory .* Unknown split "dev"'):
        load_rows(str(folder), split="dev")


@pytest.mark.parametrize(
    "names",
    ["../secret.jsonl", "{outside}/secret.jsonl", "https://example.com/a.jsonl", "zip://a::b.zip"],
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_names_no_files_elsewhere(card, names, tmp_path, monkeypatch):
    """`datasets` would read them, those of a server too."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for file in (folder / "train.jsonl", tmp_path / "secret.jsonl"):
        datasets.Dataset.from_list(RECORDS).to_json(file)
    for inside in (names.format(outside=tmp_path), "train.jsonl"):
        configs = [{"config_name": "default", "data_files": [{"split": "train", "path": inside}]}]
        text, marks = yaml.safe_dump({"configs": configs}), "---\n" * (card == "README.md")
        (folder / card).write_text(f"{marks}{text}{marks}")
        if inside == "train.jsonl":
            assert [row.texts for row in load_rows(str(folder))] == RECORDS
            continue
        with pytest.raises(UserError, match=r"data.source: .* its card names .* not in it"):
            load_rows(str(folder))


PAIRS = [
    ({"instruction": "1 + 1?", "input": "", "output": "So 2."}, "1 + 1?"),
    ({"instruction": "Add.", "input": "1 + 1", "output": "So 2."}, "Add.\n\n1 + 1"),
    ({"instruction": "1 + 1?", "input": None, "output": "So 2.", "system": "Be brief"}, "1 + 1?"),
    ({"prompt": "1 + 1?", "completion": "So 2."}, "1 + 1?"),
    ({"prompt": "1 + 1?", "chosen": "So 2.", "rejected": "So 3."}, "1 + 1?"),
    ({"prompt": [{"role": "user", "content": "1 + 1?"}],
      "chosen": [{"role": "assistant", "content": "So 2."}]}, "1 + 1?"),
    ({"chosen": [{"role": "user", "content": "1 + 1?"},
                 {"role": "assistant", "content": "So 2."}], "rejected": []}, "1 + 1?"),
    ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "1 + 1?"}]},
                   {"role": "assistant", "content": [{"type": "output_text", "text": "So 2."}]}]},
     "1 + 1?"),
]  # fmt: skip


@pytest.mark.parametrize("record, problem", PAIRS)
def test_instruction_data_needs_no_columns(record, problem):
    (row,) = load_rows([record], require=["problem", "solution"])
    assert row.texts == {"problem": problem, "solution": "So 2.", "answer": ""}
    system = [{"role": "system", "content": record["system"]}] if "system" in record else []
    assert list(row.history) == system


def test_what_instruction_data_cannot_say_is_refused_by_row():
    earlier = {"instruction": "1 + 1?", "output": "2", "history": [["Hello", "Hi"]]}
    with pytest.raises(UserError, match=r"row 1 .* has `history`, or an `input` that is no text"):
        load_rows([earlier], require=["problem"])
    with pytest.raises(UserError, match=r"data.columns.solution: .* has no column 'solution'"):
        load_rows([{"instruction": "1 + 1?", "output": None}], require=["problem", "solution"])


CLASSES = datasets.ClassLabel(names=["A", "B", "C", "D"])
LABELLED = {
    "answer": ("answer", CLASSES, 1),
    "inside": ("m.answer", {"answer": CLASSES}, {"answer": 1}),
    "in a list": ("m", datasets.List(CLASSES), [1]),
    "of a list": ("m.0", datasets.List(CLASSES), [1, 2]),
    "in a list of objects": ("m.0.answer", [{"answer": CLASSES}], [{"answer": 1}]),
    "an object of lists": ("m.answer.0", datasets.Sequence({"answer": CLASSES}), {"answer": [1]}),
}


@pytest.mark.parametrize("kept", ["an object", "a stream", "torch's", "saved", "parquet", "shards"])
@pytest.mark.parametrize("name", LABELLED)
def test_a_class_is_its_name_and_not_its_number(name, kept, tmp_path, monkeypatch):
    """cais/mmlu's answers are 0 to 3 in its files, and A to D to whoever looks at it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    column, feature, value = LABELLED[name]
    top = column.partition(".")[0]
    features = datasets.Features({"problem": datasets.Value("string"), top: feature})
    data = datasets.Dataset.from_dict({"problem": ["?"], top: [value]}, features=features)
    assert data.features["problem"] and CLASSES.int2str(1) == "B"
    source = {"an object": data, "a stream": data.to_iterable_dataset()}.get(kept)
    if kept == "torch's":
        source = data.with_format("torch")
    elif kept == "saved":
        data.save_to_disk(tmp_path / "saved")
        source = tmp_path / "saved"
    elif kept in ("parquet", "shards"):
        (tmp_path / "shards").mkdir()
        data.to_parquet(tmp_path / "shards" / "train.parquet")
        source = tmp_path / "shards" / ("train.parquet" if kept == "parquet" else "")
    (row,) = load_rows(source, columns={"answer": column}, require=["answer"])
    assert row.answer == "B"


def test_a_class_without_a_name_is_no_answer():
    features = datasets.Features({"problem": datasets.Value("string"), "answer": CLASSES})
    data = datasets.Dataset.from_dict({"problem": ["?"], "answer": [-1]}, features=features)
    with pytest.raises(UserError, match="no text in column 'answer'"):
        load_rows(data, require=["answer"])


TEXTS_ONLY = [{"problem": "1 + 1?", "answer": "2"}, {"problem": "1 + 2?", "answer": "3"}]
FORMS = {
    "a tuple": tuple(TEXTS_ONLY),
    "a generator": (record for record in TEXTS_ONLY),
    "pandas": pd.DataFrame(TEXTS_ONLY),
    "pandas' categories": pd.DataFrame(TEXTS_ONLY).astype("category"),
    "arrow": pyarrow.Table.from_pylist(TEXTS_ONLY),
    "a batch of arrow's": pyarrow.RecordBatch.from_pylist(TEXTS_ONLY),
    "torch's": torch.utils.data.Subset(TEXTS_ONLY * 2, [0, 1]),
    "columns of arrays": {k: np.array([r[k] for r in TEXTS_ONLY]) for k in TEXTS_ONLY[0]},
    "columns of pandas": {k: pd.Series([r[k] for r in TEXTS_ONLY]) for k in TEXTS_ONLY[0]},
    "numpy's texts": [{k: np.str_(v) for k, v in record.items()} for record in TEXTS_ONLY],
}
FORMS |= {
    f"datasets as {name}": datasets.Dataset.from_list(TEXTS_ONLY).with_format(name)
    for name in (None, "torch", "numpy", "pandas", "arrow")
}
FORMS |= {
    "a dictionary of arrow's": datasets.Dataset(
        pyarrow.table(
            {
                k: pyarrow.array([r[k] for r in TEXTS_ONLY]).dictionary_encode()
                for k in TEXTS_ONLY[0]
            }
        )
    ),
    "long strings": datasets.Dataset.from_list(
        TEXTS_ONLY,
        features=datasets.Features(dict.fromkeys(TEXTS_ONLY[0], datasets.Value("large_string"))),
    ),
    "splits of streams": datasets.IterableDatasetDict(
        {"train": datasets.Dataset.from_list(TEXTS_ONLY).to_iterable_dataset()}
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_python_gives_the_same_rows(name):
    rows = load_rows(FORMS[name], require=["problem", "answer"])
    assert [(row.problem, row.answer) for row in rows] == [("1 + 1?", "2"), ("1 + 2?", "3")]


@pytest.mark.parametrize(
    "given, said",
    [
        (5, "is of type int: it may be a list of rows"),
        (None, "is of type NoneType"),
        (lambda: iter(TEXTS_ONLY), "is of type function"),
        (TEXTS_ONLY[0], "an object with 'problem', 'answer': give a list of rows"),
        (["1 + 1?"], "row 1 of .* is of type str, not an object"),
        ([["1 + 1?", "2"]], "row 1 of .* is a list, not an object"),
        (Path("none.jsonl"), "there is no file or directory 'none.jsonl'"),
        (pd.DataFrame([["?", "1", "2"]], columns=["problem", "answer", "answer"]), "same name"),
        (datasets.Dataset.from_dict({"problem": [], "answer": []}), "has no rows"),
    ],
)
def test_what_is_no_data_is_named(given, said):
    with pytest.raises(UserError, match=said):
        load_rows(given, require=["problem", "answer"])


def test_a_frame_of_pandas_has_arrays_inside_of_objects(tmp_path):
    """verl's parquet files, read by pandas: each list is an array, also inside of a struct."""
    record = {
        "prompt": [USER],
        "reward_model": {"ground_truth": {"target": ["2"]}, "style": "rule"},
        "said": [{"role": "assistant", "content": [{"type": "text", "text": "So 2."}]}],
    }
    pd.DataFrame([record]).to_parquet(tmp_path / "verl.parquet")
    frame = pd.read_parquet(tmp_path / "verl.parquet")
    assert isinstance(frame.reward_model[0]["ground_truth"]["target"], np.ndarray)
    columns = {"answer": "reward_model.ground_truth.target", "solution": "said"}
    for source in (frame, tmp_path / "verl.parquet"):
        assert load_rows(source, columns=columns)[0].texts == {
            "problem": "1 + 1?",
            "solution": "So 2.",
            "answer": "2",
        }


@pytest.mark.parametrize(
    "split",
    ["train[:10%]", "train[:5]", "train[5:]", "train[-3:]", "train+test", "test[50%:]+train"],
)
@pytest.mark.parametrize("kept", ["in Python", "saved", "shards"])
def test_parts_of_splits_are_those_of_datasets(split, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = [{"problem": f"{n}?", "answer": str(n)} for n in range(22)]
    parts = {"train": records[:20], "test": records[20:]}
    both = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    (tmp_path / "shards").mkdir()
    for name, data in both.items():
        data.to_parquet(tmp_path / "shards" / f"{name}.parquet")
    both.save_to_disk(tmp_path / "saved")
    wanted = datasets.load_dataset(str(tmp_path / "shards"), split=split)
    source = both if kept == "in Python" else tmp_path / kept
    rows = load_rows(source, split=split, require=["answer"])
    assert [row.answer for row in rows] == wanted["answer"] != []


@pytest.mark.parametrize("split", ["dev", "train[:", "train[:x]", "train+dev", ""])
def test_a_part_that_there_is_not_is_named(split):
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)})
    with pytest.raises(UserError, match=r"data\.split: .* is not known"):
        load_rows(both, split=split or "dev")


def test_a_directory_may_have_several_configurations(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm8k"
    for name in ("main", "socratic"):
        (folder / name).mkdir(parents=True)
        data = datasets.Dataset.from_list([{"problem": name, "answer": "1"}])
        data.to_parquet(folder / name / "train-00000-of-00001.parquet")
    listed = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("main", "socratic")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for name in ("main", "socratic"):
        (row,) = load_rows(folder, options={"name": name}, require=["answer"])
        assert row.problem == name
    with pytest.raises(UserError, match=r"data\.options: .*'socratic'.* options: \{name"):
        load_rows(folder, require=["answer"])
    with pytest.raises(UserError, match="'socratik' not found"):
        load_rows(folder, options={"name": "socratik"}, require=["answer"])


CHAT_OF_LISTS = {
    "role": ["system", "user", "assistant"],
    "content": ["Be brief.", "1 + 1?", "So 2."],
}


@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
def test_a_chat_may_be_an_object_of_lists(column, tmp_path):
    """As `datasets` below 4 stores lists of objects: {"role": […], "content": […]}."""
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{column: CHAT_OF_LISTS}]), tmp_path / "old.parquet"
    )
    old = {"from": ["system", "human", "gpt"], "value": CHAT_OF_LISTS["content"]}
    for source in (tmp_path / "old.parquet", [{column: old}]):
        (row,) = load_rows(source, require=["problem", "solution"])
        assert (row.problem, row.solution, row.history) == ("1 + 1?", "So 2.", (SYSTEM,))
    ragged = {"role": ["user", "assistant"], "content": ["1 + 1?"]}
    with pytest.raises(UserError, match="data"):
        load_rows([{column: ragged}], require=["problem", "solution"])


@pytest.mark.parametrize("completion", ["So 3.", [{"role": "assistant", "content": "So 3."}]])
def test_a_completion_that_is_labelled_as_bad_is_no_solution(completion):
    """KTO's rows."""
    prompt = "1 + 1?" if isinstance(completion, str) else [USER]
    bad = {"prompt": prompt, "completion": completion, "label": False}
    good = {**bad, "label": True}
    with pytest.raises(UserError, match=r"row 2 .*labelled as bad"):
        load_rows([good, bad], require=["problem", "solution"])
    rows = load_rows([bad, good], require=["problem", "solution"], skip_incomplete=True)
    assert [row.solution for row in rows] == ["So 3."]
    assert len(load_rows([good, bad], require=["problem"])) == 2


def test_a_solution_may_be_the_only_one_of_a_list():
    """OlympiadBench has lists of solutions, OpenR1 of generations."""
    row = {"problem": "1 + 1?", "cot": ["So 2."], "answer": "2"}
    assert load_rows([row], columns={"solution": "cot"})[0].solution == "So 2."
    several = {**row, "cot": ["So 2.", "Two."]}
    with pytest.raises(UserError, match=r"data\.columns\.solution can name one, as 'cot\.0'"):
        load_rows([several], columns={"solution": "cot"})
    assert load_rows([several], columns={"solution": "cot.1"})[0].solution == "Two."


def test_an_object_that_is_not_there_is_empty():
    records = [{"problem": "?", "meta": {"answer": "2"}}, {"problem": "?", "meta": None}]
    with pytest.raises(UserError, match=r"row 2 .* column 'meta\.answer' \(answer\): it is empty"):
        load_rows(records, columns={"answer": "meta.answer"}, require=["answer"])


@pytest.mark.parametrize(
    "text", ["0.1", "0.3", "3.14159", "-2.7", "1e-05", "123456.7", "0.5", "1e+20"]
)
@pytest.mark.parametrize("kept", ["numpy", "torch", "arrow", "parquet"])
def test_a_number_in_fp32_is_the_number_that_was_written(text, kept, tmp_path):
    """0.1 in fp32 is 0.10000000149011612 as a Python number."""
    features = datasets.Features(problem=datasets.Value("string"), answer=datasets.Value("float32"))
    records = [{"problem": "?", "answer": float(text)}]
    data = datasets.Dataset.from_list(records, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    source = {
        "numpy": [{"problem": "?", "answer": np.float32(text)}],
        "torch": [{"problem": "?", "answer": torch.tensor(float(text))}],
        "arrow": data,
        "parquet": tmp_path / "a.parquet",
    }[kept]
    (row,) = load_rows(source, require=["answer"])
    assert np.float32(row.answer) == np.float32(text) and float(row.answer) == float(text)


@pytest.mark.parametrize(
    "text",
    [
        "problem,answer,\na,5,\n",
        "problem, answer\na,5\n",
        ",problem,answer,\n0,a,5,\n",
        " problem ;answer \na;5\n",
    ],
)
def test_a_tables_header_may_have_blanks_and_a_comma_at_its_end(text, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    (row,) = load_rows(tmp_path / "a.csv", require=["problem", "answer"])
    assert (row.problem, row.answer) == ("a", "5")
    (tmp_path / "a.csv").write_text("problem,answer,\na,5,6\n")
    with pytest.raises(UserError, match="its first line must name the columns"):
        load_rows(tmp_path / "a.csv", require=["problem", "answer"])


def test_a_chat_that_pandas_wrote_without_commas_is_named(tmp_path):
    pd.DataFrame({"messages": [np.array([USER, ANSWER])], "answer": "2"}).to_csv(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"row 1 .*'messages' is no chat with a user's message"):
        load_rows(tmp_path / "a.csv")


HUB = {
    "GSM8K": (
        {"question": "2 + 3?", "answer": "2+3=<<2+3=5>>5.\n#### 5"},
        {"problem": "question", "solution": "answer"},
    ),
    "MATH": ({"problem": "2 + 3?", "level": 1, "solution": "\\boxed{5}."}, {"answer": "solution"}),
    "MATH-500": ({"problem": "2 + 3?", "solution": "$5$", "answer": "5", "unique_id": "a"}, {}),
    "NuminaMath": (
        {"source": "aops", "problem": "2 + 3?", "solution": "$\\boxed{5}$",
         "messages": [{"role": "user", "content": "?"}]},
        {"answer": "solution"},
    ),
    "OpenR1": (
        {"problem": "2 + 3?", "solution": "", "answer": "5",
         "generations": ["<think>\nA</think>\n\n5", "B"], "correctness_math_verify": [True, False]},
        {"solution": "generations.0"},
    ),
    "DAPO": (
        {"data_source": "math_dapo", "prompt": [{"content": "2 + 3?", "role": "user"}],
         "reward_model": {"ground_truth": "5", "style": "rule"}, "solution": "5"},
        {"answer": "reward_model.ground_truth"},
    ),
    "verl": (
        {"prompt": [{"role": "user", "content": "2 + 3? Think."}],
         "reward_model": {"ground_truth": "5"},
         "extra_info": {"question": "2 + 3?", "answer": "5\n#### 5", "index": 0}},
        {"problem": "extra_info.question", "solution": "extra_info.answer",
         "answer": "reward_model.ground_truth"},
    ),
    "Skywork": (
        {"prompt": [{"role": "user", "content": "2 + 3?"}], "solution": "5",
         "reward_model": {"ground_truth": '["5"]'}},
        {"answer": "reward_model.ground_truth"},
    ),
    "AIME": ({"id": 60, "problem": "2 + 3?", "solution": "5", "answer": 5, "year": "2024"}, {}),
    "AMC": ({"question": "2 + 3?", "solution": "5", "answer": 5.0}, {"problem": "question"}),
    "OlympiadBench": (
        {"question": "2 + 3?", "solution": ["So 5."], "final_answer": ["$5$"], "unit": None},
        {"problem": "question", "answer": "final_answer"},
    ),
    "Omni-MATH": (
        {"domain": ["A"], "difficulty": 8.0, "problem": "2 + 3?", "solution": "5", "answer": "5"},
        {},
    ),
    "OpenThoughts": (
        {"system": "Think.", "answer": "5",
         "conversations": [{"from": "user", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]},
        {},
    ),
    "DeepScaleR": ({"problem": "2 + 3?", "solution": "$\\boxed{5}$", "answer": "5"}, {}),
    "MetaMath": (
        {"query": "2 + 3?", "response": "2+3=5.\nThe answer is: 5", "type": "GSM"},
        {"problem": "query", "solution": "response", "answer": "response"},
    ),
    "OpenMathInstruct": (
        {"problem": "2 + 3?", "generated_solution": "5", "expected_answer": "5"},
        {"solution": "generated_solution", "answer": "expected_answer"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("through", ["Python", "datasets", "parquet", "JSON lines"])
def test_what_the_hub_has_by_its_columns(name, through, tmp_path):
    record, columns = HUB[name]
    source = [record]
    if through == "datasets":
        source = datasets.Dataset.from_list([record])
    elif through == "parquet":
        source = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), source)
    elif through == "JSON lines":
        source = tmp_path / "a.jsonl"
        source.write_text(lines([record]))
    (row,) = load_rows(source, columns=columns)
    assert row.problem == "2 + 3?" and row.solution and row.answer.strip("$") == "5"
