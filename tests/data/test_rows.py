"""Every kind of source gives the same rows, and what is wrong with one is named."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from opsd.common.errors import UserError
from opsd.data.rows import Row, load_rows, split_rows, varied

RECORDS = [
    {"problem": f"{n} + 1?", "solution": f"{n} + 1 = {n + 1}", "answer": str(n + 1), "level": n}
    for n in range(5)
]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def write(path: Path, records, *, as_list=False) -> str:
    if as_list:
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def save(kind: str, folder: Path) -> str:
    if kind == "jsonl":
        return write(folder / "data.jsonl", RECORDS)
    if kind == "json list":
        return write(folder / "data.json", RECORDS, as_list=True)
    if kind == "json lines":
        return write(folder / "data.json", RECORDS)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "data.parquet")
        return str(folder / "data.parquet")
    data = datasets.Dataset.from_list(RECORDS)
    if kind == "splits":
        data = datasets.DatasetDict(train=data, test=data.select([0]))
    data.save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


@pytest.mark.parametrize(
    "kind", ["jsonl", "json list", "json lines", "parquet", "directory", "splits"]
)
def test_every_kind_of_source_gives_the_same_rows(kind, tmp_path):
    source = save(kind, tmp_path)
    rows = load_rows(source)
    assert rows == [
        Row(record["problem"], record["solution"], record["answer"], record) for record in RECORDS
    ]
    assert load_rows(source, limit=2) == rows[:2]


def test_splits(tmp_path):
    source = save("splits", tmp_path)
    assert len(load_rows(source, split="test")) == 1
    with pytest.raises(UserError, match=r"data\.split: 'tset'.*did you mean 'test'.*'train'"):
        load_rows(source, split="tset")


def test_columns_reach_inside_and_integers_will_do_for_answers(tmp_path):
    record = {"q.text": "1+1?", "meta": {"cot": "two", "final": {"value": 2}}}
    source = write(tmp_path / "a.jsonl", [record])
    columns = {"problem": "q.text", "solution": "meta.cot", "answer": "meta.final.value"}
    assert load_rows(source, columns=columns) == [Row("1+1?", "two", "2", record)]
    for wrong in ("meta.final", "meta.cot.value", "meta.final.valu"):
        with pytest.raises(UserError, match=wrong):
            load_rows(source, columns={**columns, "answer": wrong})


@pytest.mark.parametrize(
    "written, answer",
    [
        ("He has 48/2 = <<48/2=24>>24 left.\n#### 1,024 ", "1,024"),
        ("So it is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("  7 ", "7"),
    ],
)
def test_answers_are_reduced_to_the_final_one(written, answer, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"problem": "?", "answer": written}])
    (row,) = load_rows(source, columns={"solution": "answer"})
    assert (row.answer, row.solution, row.columns["answer"]) == (answer, written, written)


def test_columns_that_are_not_required_may_be_missing_or_of_another_kind(tmp_path):
    records = [{"problem": "p", "answer": "1"}, {"problem": "p", "answer": "1", "solution": None}]
    records.append({"problem": "p", "answer": "1", "solution": ["step", "step"]})
    rows = load_rows(write(tmp_path / "a.jsonl", records), require=("problem", "answer"))
    assert [row.solution for row in rows] == ["", "", ""]
    # … but one that is mapped was asked for
    with pytest.raises(UserError, match=r"data\.columns\.solution.*'cot'"):
        load_rows(str(tmp_path / "a.jsonl"), columns={"solution": "cot"}, require=("problem",))


def test_bad_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"problem": "\xff"}')
    (tmp_path / "a.json").write_text('[{"problem": "p"}, ')
    (tmp_path / "b.json").write_text('{\n"data": []\n}')
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "a.csv").write_text("problem,\np,q\n")
    (tmp_path / "b.csv").write_text('problem,answer\n"1"+1,2\n')
    (tmp_path / "b.tsv").write_text('problem;answer\n"1"+1;2\n')
    columns = pyarrow.Table.from_arrays([pyarrow.array(["p"])] * 2, ["problem", "problem"])
    pyarrow.parquet.write_table(columns, tmp_path / "b.parquet")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("a.jsonl", "not UTF-8"),
        ("a.json", "not valid JSON"),
        ("b.json", "holds 'data': expected one JSON object a line"),
        ("a.parquet", "cannot be read as parquet"),
        ("b.parquet", "several columns 'problem'"),
        ("a.csv", "its first line must name the columns"),
        ("b.csv", "line 2 cannot be read"),
        ("b.tsv", "line 2 cannot be read"),
        ("folder", "not saved by `datasets`"),
        ("absent.jsonl", "no file or directory"),
        ("absent/folder", "no file or directory"),
    ]:
        with pytest.raises(UserError, match=rf"data\.source: .*{message}"):
            load_rows(str(tmp_path / name))
    names = [str(tmp_path / name) for name in ("a.json", "a.jsonl")]
    for section, wanted in [("data", "name all in a list: "), ("eval", "name one of ")]:
        with pytest.raises(UserError, match=re.escape(f"no wildcards: {wanted}{names}")):
            load_rows(str(tmp_path / "a.js*"), section=section)
    with pytest.raises(UserError, match=r"no file or directory 'data/train\.csv'"):
        load_rows("data/train.csv")  # not taken for a hub name


@pytest.mark.parametrize("between", [",", ";", "\t"])
def test_a_table_may_have_quotes_around_its_names(between, tmp_path):
    """As R's write.csv2 and pandas' QUOTE_ALL have them; a name may hold the other separators."""
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=between, quoting=csv.QUOTE_ALL)
        writer.writerows([["problem", "answer", "a;b,c"], ["1,5 + 1;2", "2,7", "x"]])
    (row,) = load_rows(str(tmp_path / "a.csv"), require=["problem", "answer"])
    assert (row.problem, row.answer, row.columns["a;b,c"]) == ("1,5 + 1;2", "2,7", "x")


def test_bad_arguments(tmp_path):
    source = save("jsonl", tmp_path)
    for arguments, message in [
        (
            {"columns": {"problme": "q"}},
            r"data\.columns: 'problme'.*did you mean data\.columns\.problem=q",
        ),
        ({"limit": 0}, r"data\.limit: 0"),
        ({"size": 10}, r"data\.size: only reasoning_gym"),
        ({"options": {"name": "main"}}, r"data\.options: 'name' is not known"),
        ({"section": "eval", "limit": -1}, r"eval\.limit"),
    ]:
        with pytest.raises(UserError, match=message):
            load_rows(source, **arguments)


def test_hub_names(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        if name == "owner/absent":
            raise ConnectionError("Couldn't reach 'owner/absent' on the Hub\nRetrying")
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one among ['main']")
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("opsd.common.hub_offline.why_absent", lambda *_: "")
    rows = load_rows("owner/data", split="test", options={"name": "main", "revision": "v1"})
    assert len(rows) == 5 and asked == [("owner/data", "main", "test", "v1")]
    with pytest.raises(UserError, match=r"'owner/absent'.*Couldn't reach.*connection"):
        load_rows("owner/absent")
    with pytest.raises(UserError, match=r"Config name is missing.*options: \{name"):
        load_rows("owner/data")
    with pytest.raises(UserError, match=r"data\.options: 'trust_remote_code'"):
        load_rows("owner/data", options={"trust_remote_code": True})


def test_reasoning_gym_draws_by_seed():
    options = {"min_terms": 3, "max_terms": 4}
    arguments = {"options": options, "require": ("problem", "answer")}
    rows = load_rows("reasoning_gym:chain_sum", size=60, seed=3, **arguments)
    assert rows == load_rows("reasoning_gym:chain_sum", size=60, seed=3, **arguments)
    assert rows[:7] == load_rows("reasoning_gym:chain_sum", limit=7, seed=3, **arguments)
    for row in rows:
        assert row.problem == row.columns["question"] and row.solution == ""
        assert eval(row.columns["metadata"]["expression"]) == int(row.answer)
        assert row.columns["metadata"]["num_terms"] in (3, 4)
    # The library's problem i of seed s is its problem i + 1 of seed s - 1.
    other = load_rows("reasoning_gym:chain_sum", size=60, seed=4, **arguments)
    assert not {row.problem for row in rows} & {row.problem for row in other}


def test_reasoning_gym_has_solutions_where_the_task_has():
    (row,) = load_rows("reasoning_gym:gsm_symbolic", size=1)
    assert row.solution == row.columns["metadata"]["answer_cot"] != ""
    with pytest.raises(UserError, match=r"data\.columns\.solution.*'metadata\.answer_cot'.*'quest"):
        load_rows("reasoning_gym:chain_sum", size=1)
    assert len(load_rows("reasoning_gym:chain_sum", require=("problem",))) == 1000


def test_reasoning_gym_errors():
    for task, options, message in [
        ("chain_sun", {}, r"data\.source: .*'chain_sun'; near it: chain_sum"),
        ("chain_sum", {"min_term": 3}, r"data\.options: 'min_term'.*'min_terms'"),
        ("chain_sum", {"seed": 3}, r"data\.options: 'seed' is not known"),
        ("chain_sum", {"min_terms": -1}, r"min_terms must be positive"),
        ("chain_sum", {"min_terms": "few"}, r"data\.options: .*'few'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_rows(f"reasoning_gym:{task}", size=2, options=options, require=("problem",))


def test_split_rows_shares_no_problem():
    rows = [Row(f"Problem {n % 40}", "", str(n), {"n": n}) for n in range(100)]
    rows.append(Row(" problem  7 ", "", "x", {}))
    train, heldout = split_rows(rows, 10, seed=0)
    assert len(heldout) == 10 == len({row.problem for row in heldout})
    texts = {" ".join(row.problem.lower().split()) for row in train}
    assert texts.isdisjoint(row.problem.lower() for row in heldout)
    assert len(texts) == 30
    assert train == [row for row in rows if row in train]  # every row of theirs, in order
    assert split_rows(rows, 10, seed=0) == (train, heldout)
    assert split_rows(rows, 10, seed=1) != (train, heldout)
    assert split_rows(rows, 0, seed=0) == (rows, [])
    with pytest.raises(UserError, match=r"eval\.problems: 40 .* 40 distinct problems \(0 to 39"):
        split_rows(rows, 40, seed=0)
    with pytest.raises(UserError, match=r"\(0 to 36 can\)"):
        split_rows(rows, 50, seed=0, step=4)


def test_variations_have_other_numbers_and_no_solution():
    texts = "Ann has 12 apples and 305 pears, 12 of them ripe", "No number", "0 or 07?"
    rows = [Row(text, "solution", "answer", {"question": text, "hint": [text]}) for text in texts]
    made = varied(rows, 40, seed=0)
    assert len(made) == 80 and all(one.held for one in made)
    assert {(one.solution, one.answer) for one in made} == {("", "")}
    hints = [[texts[0]]] * 40 + [[texts[2]]] * 40
    for one, hint in zip(made, hints, strict=True):
        assert one.columns == {"question": one.problem, "hint": hint}
    numbers = [re.findall(r"\d+", one.problem) for one in made]
    left = {re.sub(r"\d+", "", one.problem) for one in made}
    assert left == {"Ann has  apples and  pears,  of them ripe", " or ?"}
    for twelve, pears, again in numbers[:40]:
        assert twelve == again and 10 <= int(twelve) and 100 <= int(pears) and len(pears) == 3
    assert {(len(one), len(two)) for one, two in numbers[40:]} == {(1, 2)}
    assert len({tuple(those) for those in numbers[:40]}) > 35
    assert varied(rows, 40, seed=0) == made != varied(rows, 40, seed=1) and not varied(rows, 0, 0)


def test_import_needs_no_heavy_library():
    code = (
        "import sys, opsd.data, opsd.evaluate.benchmarks\n"
        "print(sorted({'torch', 'datasets', 'pyarrow', 'reasoning_gym', 'sympy'} & {*sys.modules}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_a_name_of_two_lines_makes_no_message_of_two(tmp_path):
    file = tmp_path / "ro\nws.jsonl"
    file.write_bytes(b"\xff\xfe{\0")
    with pytest.raises(UserError, match="UTF-16 -t UTF-8 FILE > utf8") as told:
        load_rows(str(file))
    assert "\n" not in str(told.value)
