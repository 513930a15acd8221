"""The tiny quickstart's task, tokenizer and base model."""

import operator
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from opsd.quickstart import tiny_model as tiny
from opsd.quickstart.worksheet import (
    ITEMS,
    WorksheetGrader,
    is_held_out,
    right_share,
    worksheet_rows,
)

SHORT = replace(tiny.BaseTraining(), steps=4, batch_size=4)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


def test_every_row_is_right():
    for row in worksheet_rows(500, seed=1):
        results = []
        parts = (row.problem.split(";"), row.solution.split(","), row.columns["worked"].split(";"))
        for question, foreign, worked in zip(*parts, strict=True):
            a, sign, b = re.fullmatch(r"(\d+)([-+*])(\d+)", question).groups()
            result = str(OPERATORS[sign](int(a), int(b)))
            assert foreign == f"{result}={question}" and worked == f"{question}={result}"
            results.append(result)
        assert len(results) == ITEMS and row.answer == ";".join(results)
        for name in ("problem", "solution", "answer"):
            assert row.columns[name] == getattr(row, name)


def test_rows_depend_on_the_seed_only():
    rows = worksheet_rows(50, seed=3)
    assert rows == worksheet_rows(50, seed=3)
    assert rows == worksheet_rows(80, seed=3)[:50]
    assert len({row.problem for row in rows}) == 50
    assert not {r.problem for r in rows} & {r.problem for r in worksheet_rows(50, seed=4)}


def test_held_out_rows_are_never_trained_on():
    assert all(is_held_out(row.problem) for row in worksheet_rows(300, seed=0, held_out=True))
    assert not any(is_held_out(row.problem) for row in worksheet_rows(300, seed=0))
    base = tiny._endless_rows(0)
    assert not any(is_held_out(next(base).problem) for _ in range(5000))  # beyond one block


@pytest.mark.parametrize(
    ("completion", "correct", "share"),
    [
        ("12+7=19;5*8=40;46-8=38;9*7=63", True, 1.0),
        ("12+7=19;5*8=45;46-8=38;9*7=63", False, 0.75),
        ("12+7=19;46-8=38;5*8=40;9*7=63", False, 0.5),  # the order counts
        ("12+7=19;5*8=40;46-8=38", False, 0.75),
        ("12+7=19;5*8=40;46-8=38;9*7=63;9*7=63", False, 1.0),  # one too many
        ("12+7=190;5*8=40;46-8=38;9*7=63", False, 0.75),
        ("19;40;38;63", False, 0.0),  # results without their items are no statements
        ("19=12+7,40=5*8,38=46-8,63=9*7", True, 1.0),
        ("19=12+7,45=5*8,38=46-8,63=9*7", False, 0.75),
        ("19=12+7;40=5*8;46-8=38;9*7=63", True, 1.0),  # a form for each
        ("", False, 0.0),
    ],
)
def test_grades(completion, correct, share):
    (grade,) = WorksheetGrader().grade([completion], ["19;40;38;63"])
    assert grade.correct is correct
    assert right_share(completion, "19;40;38;63") == share


def test_grade_says_what_it_read():
    read, nothing = WorksheetGrader().grade(["1+2=3;4+4=9", "?"], ["3;8", "3;8"])
    assert read.extracted == "3;9" and nothing.extracted is None
    with pytest.raises(ValueError, match="1 completions but 2 answers"):
        WorksheetGrader().grade(["1+2=3"], ["3", "4"])


def test_one_token_a_character_and_back(tokenizer):
    for row in worksheet_rows(20, seed=0):
        text = f"Q:{row.problem}\nS:{row.solution}"
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
        assert tokenizer.pad_token_id not in ids  # also what an unknown character becomes


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "Q:12+7"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|user|>Q:12+7<|end|><|assistant|>"
    assert len(ids) == 3 + len("Q:12+7")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Q:12+7"


def test_teacher_context_begins_like_the_students(tokenizer):
    row = worksheet_rows(1, seed=0)[0]
    inputs = {p: tiny.encode([row], tokenizer, p)[0][0].tolist() for p in PROMPTS}
    shared = 1 + len(f"Q:{row.problem}")
    assert inputs[tiny.STUDENT_PROMPT][:shared] == inputs[tiny.TEACHER_PROMPT][:shared]


PROMPTS = (tiny.STUDENT_PROMPT, tiny.TEACHER_PROMPT)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_labels_are_the_solution_and_its_end(tokenizer, prompt):
    rows = worksheet_rows(8, seed=0)
    inputs, labels = tiny.encode(rows, tokenizer, prompt)
    for row, x, y in zip(rows, inputs, labels, strict=True):
        supervised = y[y != -100]
        assert tokenizer.decode(supervised) == row.columns["worked"] + "<|end|>"
        (positions,) = (y != -100).nonzero(as_tuple=True)
        assert x[positions + 1].tolist() == supervised.tolist()  # a label is the next input


def test_corruption_touches_digits_of_the_response_only(tokenizer):
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    inputs, labels = tiny.encode(worksheet_rows(200, seed=0), tokenizer, tiny.TEACHER_PROMPT)
    generator = torch.Generator().manual_seed(0)
    corrupted = tiny.corrupt(inputs, labels, digits, 0.5, generator)
    changed = corrupted != inputs
    response = torch.zeros_like(changed)
    response[:, 1:] = labels[:, :-1] != -100
    candidates = response & torch.isin(inputs, digits)
    assert not (changed & ~candidates).any()
    assert torch.isin(corrupted[changed], digits).all()
    # Half of the digits are drawn again, and one draw in ten gives the digit that was there.
    assert changed.sum() / candidates.sum() == pytest.approx(0.45, abs=0.02)
    assert torch.equal(tiny.corrupt(inputs, labels, digits, 0.0, generator), inputs)


def test_size(tokenizer):
    model = tiny.make_model(0, tokenizer)
    assert 700_000 < sum(p.numel() for p in model.parameters()) < 900_000
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_seed_decides_the_base_and_leaves_the_global_one_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    weights = [tiny.train_base(seed, SHORT)[0].state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_training_learns():
    """After a few dozen steps it knows a worksheet from noise."""
    losses = []
    recipe = replace(tiny.BaseTraining(), steps=60)
    model, tokenizer = tiny.train_base(0, recipe, progress=lambda step, loss: losses.append(loss))
    assert len(losses) == 60
    inputs, labels = tiny.encode(worksheet_rows(64, seed=0, held_out=True), tokenizer, PROMPTS[0])
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert loss < 1.8  # nats a token; over 3 untrained, 1.55 seen


def test_cache_is_found_again_and_loads_plainly(tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path / "cache"))
    directory = tiny.cached_base(0, SHORT)
    assert directory.parent == tmp_path / "cache"
    assert [p.name for p in directory.parent.iterdir()] == [directory.name]  # nothing half-done
    monkeypatch.setattr(tiny, "train_base", lambda *_, **__: pytest.fail("trained again"))
    assert tiny.cached_base(0, SHORT) == directory
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer
    tokenizer = tokenizer.from_pretrained(directory)
    assert tokenizer.is_fast and tokenizer.chat_template and len(tokenizer) == 27
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token == "<|pad|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q:12+7"}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > prompt["input_ids"].shape[1]


def test_a_damaged_cache_is_noticed(tmp_path):
    directory = tiny.cached_base(0, SHORT, cache=tmp_path)
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(bytes(len(whole)))
    assert tiny.cached_base(0, SHORT, cache=tmp_path) == directory  # it is made again
    assert (directory / "model.safetensors").read_bytes() == whole


def test_cache_tells_seeds_and_recipes_apart(tmp_path):
    places = {
        tiny.cached_base(0, SHORT, cache=tmp_path),
        tiny.cached_base(1, SHORT, cache=tmp_path),
        tiny.cached_base(0, replace(SHORT, steps=5), cache=tmp_path),
    }
    assert len(places) == 3


def test_interrupted_training_leaves_no_cache(tmp_path):
    def interrupt(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.cached_base(0, SHORT, cache=tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_leaves_no_cache(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Qwen3ForCausalLM, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.cached_base(0, SHORT, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
