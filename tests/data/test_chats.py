"""Chats and instruction data, in the forms that people have them in."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from helpers.data_shapes import ANSWER, RECORDS, USER
from helpers.image_models import picture

from opsd.common.errors import UserError
from opsd.data.chats import read_chat
from opsd.data.rows import Row, load_rows

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
    "columns",
    [
        {"tools": [{"type": "function", "function": {"name": "add"}}]},
        {"tools": '[{"name": "add"}]'},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"documents": [{"title": "Sums", "text": "1 + 1 is 2."}]},
    ],
)
def test_what_other_trainers_give_to_the_chat_template_is_refused_by_row(columns):
    chat = {"messages": [USER, ANSWER], "answer": "2"}
    with pytest.raises(UserError, match=f"row 2 .* has '{next(iter(columns))}', which its prompt"):
        load_rows([chat, {**chat, **columns}])
    empty = [{**chat, "tools": nothing} for nothing in (None, [], "[]", "")]
    assert len(load_rows([*empty, {**columns, **RECORDS[0]}])) == 5  # the last is no chat


@pytest.mark.parametrize("sign", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_an_answer_that_is_not_to_be_learnt_is_no_solution(sign):
    """OpenAI's and Axolotl's signs."""
    first = [USER, {**ANSWER, **sign}]
    with pytest.raises(UserError, match="nor does its chat end with an answer to learn"):
        load_rows([{"messages": first}], require=["problem", "solution"])
    more = [*first, USER, {**ANSWER, "weight": 1, "train": None}]
    (row,) = load_rows([{"messages": more}], require=["problem", "solution"])
    assert row.solution == ANSWER["content"] and len(row.history) == 2


def test_a_chat_without_an_answer_lacks_neither_problem_nor_solution():
    with pytest.raises(UserError, match=r"has no column 'answer' \(rows without answers"):
        load_rows([{"messages": [USER, ANSWER]}], require=["problem", "solution", "answer"])


def test_a_chat_without_a_user_is_none():
    assert read_chat([SYSTEM]) is None and read_chat([]) is None and read_chat(["a"]) is None


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


def test_a_chat_that_pandas_wrote_without_commas_is_named(tmp_path):
    pd.DataFrame({"messages": [np.array([USER, ANSWER])], "answer": "2"}).to_csv(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"row 1 .*'messages' is no chat with a user's message"):
        load_rows(tmp_path / "a.csv")
