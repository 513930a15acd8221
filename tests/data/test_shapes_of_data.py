"""Data as people have them: files, chats, numbers, rows with holes, several sources."""

import csv
import gzip
import json
from decimal import Decimal
from fractions import Fraction

import datasets
import numpy as np
import pandas as pd
import pytest

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


@pytest.mark.parametrize(
    "messages, said",
    [
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, ANSWER],
         "parts that are no text: image"),
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
