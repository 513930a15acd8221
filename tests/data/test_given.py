"""Data from Python, and directories for `datasets`: classes, splits, frames, cards."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
import yaml
from helpers.data_shapes import RECORDS, USER

from opsd.common.errors import UserError
from opsd.data.rows import load_rows


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


def test_a_directory_of_several_kinds_of_files_is_refused(tmp_path, monkeypatch):
    """`datasets` would read the commonest kind and leave out the others without a word."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    pd.DataFrame(RECORDS).to_json(tmp_path / "data" / "a.jsonl", orient="records", lines=True)
    pd.DataFrame(RECORDS).to_csv(tmp_path / "data" / "b.csv", index=False)
    with pytest.raises(UserError, match=r"has \.csv and \.jsonl files, and one kind"):
        load_rows(str(tmp_path / "data"))
    card = "---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n"
    (tmp_path / "data" / "README.md").write_text(card)
    assert [row.texts for row in load_rows(str(tmp_path / "data"))] == RECORDS


@pytest.mark.parametrize(
    "names",
    [
        "../secret.jsonl",
        "{outside}/secret.jsonl",
        "file:{outside}/secret.jsonl",
        "local:secret.jsonl",
        "https://example.com/a.jsonl",
        "zip://a::b.zip",
    ],
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
        with pytest.raises(UserError, match=r"data.source: .* it names .* not in it"):
            load_rows(str(folder))


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_large_card_is_not_read(card, tmp_path):
    """It may name a file elsewhere behind what is read, or be a bomb of aliases."""
    (tmp_path / "train.jsonl").write_text('{"problem": "a", "solution": "b"}\n')
    (tmp_path / card).write_text("#" * (1 << 20) + "#")
    with pytest.raises(UserError, match=f"{card} has more than 1,048,576 bytes"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("how", ["a path", "a way up", "a split"])
def test_a_saved_directory_names_no_files_elsewhere(how, tmp_path):
    """`datasets` would read an arrow file of the user's."""
    for name in ("secret", "rows"):
        data = datasets.Dataset.from_list(RECORDS)
        datasets.DatasetDict(train=data).save_to_disk(tmp_path / name)
    secret, rows = tmp_path / "secret" / "train", tmp_path / "rows"
    assert [row.texts for row in load_rows(str(rows))] == RECORDS
    file, old, new = rows / "train" / "state.json", "data-00000", f"{secret}/data-00000"
    if how == "a way up":
        new = "../../secret/train/data-00000"
    elif how == "a split":
        file, old, new = rows / "dataset_dict.json", '"train"', '"../secret/train", "train"'
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"data.source: .* it names .* not in it"):
        load_rows(str(rows))


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
    "a transform": datasets.Dataset.from_list(
        [{"q": record["problem"], "a": record["answer"]} for record in TEXTS_ONLY]
    ).with_transform(lambda batch: {"problem": batch["q"], "answer": batch["a"]}),
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
        ([["1 + 1?", "2"]], "a list, not an object with columns; write it as {'problem'"),
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
