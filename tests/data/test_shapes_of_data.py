"""Data as people have them: files, chats, numbers, rows with holes, several sources."""

import csv
import gzip
import json

import datasets
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
    if name.endswith((".csv", ".tsv")):
        table(path, "," if name.endswith(".csv") else "\t")
    elif name == "under a key.json":
        path.write_text(json.dumps({"version": 1, "data": RECORDS}))
    elif name == "indented.json":
        path.write_text(json.dumps({"data": RECORDS}, indent=2))
    elif name == "list.json":
        path.write_text(json.dumps(RECORDS, indent=2))
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


def test_a_chat_without_a_user_is_none():
    assert read_chat([SYSTEM]) is None and read_chat([]) is None and read_chat(["a"]) is None


@pytest.mark.parametrize(
    "value, text", [(8.0, "8"), (8, "8"), (0.5, "0.5"), (-3.0, "-3"), (1e300, "1e+300")]
)
def test_numbers_are_answers(value, text):
    assert load_rows([{"problem": "?", "answer": value}], require=["answer"])[0].answer == text


@pytest.mark.parametrize("value", [None, float("nan"), True, " ", [8]])
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
