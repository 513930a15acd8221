"""Data as people have them: files, numbers, rows with holes, several sources, shapes of the hub."""

import csv
import gzip
import json
from decimal import Decimal
from fractions import Fraction

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from helpers.data_shapes import RECORDS, ROWS, USER

from opsd.common.errors import UserError
from opsd.data.rows import load_rows, mixture


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


def test_blanks_after_the_commas_of_a_table_are_left_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('problem, solution, answer\n"1, 2?", "a, b", 3\n4?, c,5\n')
    found = [(row.problem, row.solution, row.answer) for row in load_rows(str(path))]
    assert found == [("1, 2?", "a, b", "3"), ("4?", "c", "5")]


def test_usual_names_are_found_in_any_case():
    with pytest.raises(UserError, match=r"did you mean 'Question'\? data.columns.problem=Question"):
        load_rows([{"Question": "1 + 1?", "Answer": "2"}])
    with pytest.raises(UserError, match=r"\? 'data.columns.problem= problem' data"):  # to paste
        load_rows([{" problem": "1 + 1?", "answer": "2"}])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "problem,answer\n1,2,3\n", "line 2 has 3 fields, and the first line names 2"),
        ("a.csv", "problem,problem\n1,2\n", "columns, each once: it names 'problem' twice"),
        ("a.csv", "problem,,answer\n1,x,2\n", "line 2 has text in a column without a name"),
        ("a.csv", ",\n1,2\n", r"first line must name the columns: \['', ''\]"),
        ("a.json", '{"a": [{"x": 1}],\n"b": [{"x": 2}]}', "several lists of rows, 'a', 'b': `jq"),
        (
            "a.json",
            '{"features": [{"x": 1}], "rows": [{"row": 2}, {}], "partial": false}',
            'rows"]',
        ),
        ("a.jsonl.gz", "no gzip", "cannot be read: Not a gzipped file"),
        ("a.parquet.gz", "no", "not a .jsonl"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path / name))


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
        (True, "True"),
        (np.bool_(False), "False"),
    ],
)
def test_numbers_are_answers(value, text):
    assert load_rows([{"problem": "?", "answer": value}], require=["answer"])[0].answer == text


@pytest.mark.parametrize("value", [None, float("nan"), " ", [], [None], "nan", "<NA>", {}])
def test_what_is_no_number_is_no_answer(value):
    with pytest.raises(UserError, match="no text in column 'answer'"):
        load_rows([{"problem": "?", "answer": value}], require=["answer"])


@pytest.mark.parametrize("column", ["problem", "solution"])
@pytest.mark.parametrize("value", ["nan", "None", " <NA>", "NULL"])
def test_a_missing_text_that_pandas_wrote_is_missing(column, value):
    with pytest.raises(UserError, match=f"row 1 of .* no text in column '{column}'.*it is empty"):
        load_rows([{**RECORDS[0], column: value}])


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
