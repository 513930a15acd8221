"""What a row says reaches the contexts, or the run is refused before its first step."""

from contextlib import nullcontext

import pytest
from helpers.chat_templates import CHATML, FAMILIES, IM, PARTS, Family, turns
from helpers.chat_tokenizers import make_tokenizer

from opsd.common import templates
from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.config.config import Config
from opsd.config.load import parse_config
from opsd.config.sections import PromptsSection
from opsd.data.context_check import ContextCheck
from opsd.data.length_filter import fitting_rows
from opsd.data.prompts import Prompts
from opsd.data.rows import Row, load_rows
from opsd.training.load_data import fitting_data

PROBLEM, SOLUTION = (
    "  What is 1 + 2,\nplease?\n",
    'We add \'em: 1 + 2 = 3 < 4 & "so" it is \\boxed{3}.',
)
RECORD = {"problem": PROBLEM, "solution": SOLUTION, "answer": "3", "hint": "add", "level": 2}
RECORDS = [RECORD, {**RECORD, "problem": "2 + 2?", "solution": "4", "level": 5}]
BOTH = "{{ problem }}\n{{ solution }}"


def check(student="{{ problem }}", teacher=BOTH, chat=CHATML, records=RECORDS, **more):
    """Both roles' rows, as before a run of `method`."""
    method = more.pop("method", "opsd")
    values = {
        "method": method,
        "model": {"path": "none"},
        "data": {"source": "none"},
        "prompts": {"student": student, "teacher": teacher, **more.pop("prompts", {})},
        "train": {"problems_per_step": 1, "steps": 1},
        "eval": {"problems": 0},
        "rollout": {} if method == "sft" else {"max_new_tokens": 8, "group_size": 2},
        **more,
    }
    config: Config = parse_config({name: section for name, section in values.items() if section})
    tokenizer = make_tokenizer(Family("", chat, IM, "<|im_end|>", "", "", "", None))
    rows = load_rows(records, require=["problem"], columns=config.data.columns)
    return fitting_data(
        config, rows, [], Prompts(config.prompts, tokenizer), None, Display(quiet=True)
    )


REFUSED = {
    "single braces": (
        {"student": "{problem}"},
        r"prompts.student leaves the problem out .\{problem\} is plain text.: write {{ problem }}",
    ),
    "another column in single braces": ({"student": "Q: {hint}"}, "write {{ hint }}"),
    "no problem": (
        {"student": "Solve it."},
        "prompts.student leaves the problem out .*write {{ problem }}",
    ),
    "no problem for the teacher": (
        {"teacher": "{{ solution }}"},
        "prompts.teacher leaves the problem out",
    ),
    "no problem in one row": ({"student": "{% if level < 3 %}{{ problem }}{% endif %}"}, "row 2 "),
    "sft": ({"student": "{problem}", "method": "sft"}, "prompts.student leaves the problem"),
    "grpo": ({"student": "{problem}", "method": "grpo"}, "prompts.student leaves the problem"),
    "a target in single braces": (
        {"method": "sft", "prompts": {"target": "{{ problem }} {solution}"}},
        r"prompts.target leaves the solution out .\{solution\} is plain",
    ),
    "a constant target": (
        {"method": "sft", "prompts": {"target": "Solved."}},
        "leaves the solution out .'Solved.' is plain",
    ),
    "a solution in single braces": (
        {"teacher": "{{ problem }} {solution}"},
        r"prompts.teacher leaves the solution out .\{solution\} is plain",
    ),
    "no solution in one row": (
        {"teacher": "{{ problem }}{% if level < 3 %}{{ solution }}{% endif %}!"},
        "leaves the solution out .*row 2 ",
    ),
    "a problem in single braces, over rollouts": (
        {"teacher": "{problem} {{ rollout.feedback }}"},
        r"prompts.teacher leaves the problem out .\{problem\} is plain",
    ),
    "equal contexts": (
        {"teacher": "{{ problem }}"},
        "prompts.teacher: both roles' contexts are equal.*write {{ solution }}",
    ),
    "equal in one row": (
        {"teacher": "{{ problem }}{% if level < 3 %} {{ hint }}{% endif %}"},
        "contexts are equal.* row 2 ",
    ),
    "equal but for what a template ignores": (
        {"teacher": "{{ problem }}", "prompts": {"teacher_chat": {"enable_thinking": True}}},
        "contexts are equal",
    ),
    "an average of its own": (
        {"teacher": "{{ problem }}", "teacher_section": "ema"},
        "contexts are equal",
    ),
    "credit": (
        {"teacher": "{{ problem }}", "method": "grpo", "loss": {"credit": 0.5}},
        "contexts are equal",
    ),
    "a chat template that cuts": (
        {"chat": CHATML.replace("m['content']", "m['content'][:20]")},
        "chat template that leaves the user message out, or cuts it",
    ),
    "a chat template that cuts long ones": (
        {"chat": CHATML.replace("m['content']", "m['content'][:60]")},
        "chat template .*cuts it",
    ),
    "a chat template that takes the first line": (
        {"chat": CHATML.replace("m['content']", "m['content'].split('\\n')[0]")},
        "chat template .*cuts it",
    ),
    "a chat template without a system message": (
        {
            "chat": turns("U: §", "", "A: §", "A: ").replace("system", "nobody"),
            "prompts": {"system": "Be brief."},
        },
        "leaves the system message out",
    ),
    "a chat template that knows one message": (
        {"chat": "{{ 'user: hello' }}"},
        "leaves the user's message out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_arrive_is_refused_in_one_line(name):
    asked, message = REFUSED[name]
    asked = dict(asked)
    if asked.pop("teacher_section", None):
        asked["teacher_policy"] = {"policy": "ema"}
    with pytest.raises(UserError, match=message) as raised:
        policy = asked.pop("teacher_policy", None)
        run = check(**asked) if policy is None else check_policy(policy, **asked)
        assert run is None
    assert "\n" not in str(raised.value)


def check_policy(policy, teacher, contexts=None):
    """As `check`, with a section `teacher` beside the template of that name."""
    tokenizer = make_tokenizer(FAMILIES[0])
    config = parse_config(
        {
            "model": {"path": "none"},
            "data": {"source": "none"},
            "prompts": {
                "student": "{{ problem }}",
                "teacher": teacher,
                "contexts": contexts or {},
            },
            "teacher": policy,
            "train": {"problems_per_step": 1},
            "eval": {"problems": 0},
        }
    )
    rows = load_rows(RECORDS)
    return fitting_data(
        config, rows, [], Prompts(config.prompts, tokenizer), None, Display(quiet=True)
    )


FINE = {
    "as they are": {},
    "trimmed": {
        "student": "{{ problem | trim }}",
        "teacher": "{{ problem | trim }} {{ solution[:20] }}",
    },
    "escaped": {
        "student": "{{ problem | tojson }}",
        "teacher": "{{ [problem, solution] | tojson }}",
    },
    "of other case": {
        "student": "{{ problem | upper }}",
        "teacher": "{{ problem | lower }}{{ solution | e }}",
    },
    "spaces made one": {
        "student": "{{ problem.split() | join(' ') }}",
        "teacher": "{{ problem.split() | join(' ') }} {{ solution.split() | join }}",
    },
    "a piece of it": {
        "student": "{{ problem.splitlines()[-1] }}",
        "teacher": "{{ problem.split('?')[0] }} {{ solution.split()[:2] | join(' ') }}",
    },
    "the answer alone": {"teacher": "{{ problem }} It is {{ answer }}."},
    "the answer reckoned with": {"teacher": "{{ problem }} It is {{ answer | int }}, {{ level }}."},
    "a hint": {"teacher": "{{ problem }}{{ hint }}"},
    "a hint or the solution": {
        "teacher": "{{ problem }}{% if level < 3 %}{{ hint }}{% else %}{{ solution }}{% endif %}"
    },
    "other words": {"teacher": "Be brief. {{ problem }}"},
    "a system message": {"teacher": "{{ problem }}", "prompts": {"teacher_system": "Be brief."}},
    "boxes": {
        "student": "{{ problem }} \\boxed{answer} \\text{solution}",
        "teacher": BOTH + " \\boxed{answer}",
    },
    "grpo has no teacher": {"teacher": "{{ problem }}", "method": "grpo"},
    "sft has none": {"teacher": "{solution}", "method": "sft"},
    "over rollouts": {
        "teacher": "{{ problem }}{% if rollout.feedback %}{{ rollout.feedback }}{% endif %}"
    },
    "escaped by the chat template": {
        "chat": CHATML.replace("m['content']", "m['content'] | tojson")
    },
    "trimmed by the chat template": {
        "chat": CHATML.replace("m['content']", "m['content'] | trim | upper")
    },
    "in parts": {"chat": PARTS, "prompts": {"system": "Be brief."}},
}


@pytest.mark.parametrize("name", FINE)
def test_what_arrives_changed_is_let_pass(name):
    assert len(check(**FINE[name])[0]) == len(RECORDS)


def test_another_models_contexts_may_be_equal():
    policy = {"policy": "model", "path": "other"}
    assert len(check_policy(policy, "{{ problem }}")[0]) == len(RECORDS)


@pytest.mark.parametrize(
    ("template", "refused"),
    [
        ("{{ solution }}", None),  # Purified OPSD's
        ("{{ hint }}", None),
        ("{{ problem }} {{ hint }}", None),
        ("{solution}", r"contexts.card leaves the problem out of its context in row 1 .*{{ sol"),
        ("Be brief.", "write {{ problem }}"),
        ("{% if level < 3 %}{{ problem }}{% else %}{{ hint }}{% endif %}", "row 2 "),
    ],
)
def test_a_mixtures_context_may_leave_the_problem_out(template, refused):
    mix = [{}, {"context": "student"}, {"context": "card", "coefficient": -1}]
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        assert check_policy({"mix": mix}, BOTH, {"card": template})


@pytest.mark.parametrize("columns", [{"problem": "question"}, {"problem": "chat.0.content"}])
def test_the_problem_may_come_by_another_columns_name(columns):
    records = [
        {"question": PROBLEM, "chat": [{"content": PROBLEM}], "solution": SOLUTION, "answer": "3"}
    ]
    name = "question" if "question" in columns.values() else "chat[0].content"
    both = {
        "student": f"{{{{ {name} | upper }}}}",
        "teacher": f"{{{{ {name} | e }}}} {{{{ answer }}}}",
    }
    assert check(**both, records=records, data={"source": "none", "columns": columns})


def test_an_earlier_answer_may_lose_its_thought():
    template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    answer = {"role": "assistant", "content": "<think>Hm.</think>Hello."}
    chat = [{"role": "user", "content": "Hi"}, answer, {"role": "user", "content": "1 + 2?"}]
    (row,) = load_rows([{"messages": chat, "solution": "So 3.", "answer": "3"}])
    tokenizer = make_tokenizer(Family("", template, IM, "<|im_end|>", "", "", "", None))
    section = parse_config({"model": {"path": "none"}, "data": {"source": "none"}}).prompts
    prompts = Prompts(section, tokenizer)
    ContextCheck(prompts, ["student", "teacher"], differ=True)(1, row)
    assert "Hm." not in tokenizer.decode(prompts.ids(row, "student"))


def test_a_check_costs_no_second_filling_in(monkeypatch):
    """50 000 rows are filled in once a role before training, as they were without a check."""
    tokenizer = make_tokenizer(FAMILIES[0])
    prompts = Prompts(
        parse_config({"model": {"path": "-"}, "data": {"source": "-"}}).prompts, tokenizer
    )
    rows = [Row(f"{PROBLEM} {number}", SOLUTION * 3, "3", {}) for number in range(300)]
    roles, filled_in = ["student", "teacher"], []

    def fill_in_columns(field, text, values):
        filled_in.extend(values)
        return templates.fill_in_columns(field, text, values)

    monkeypatch.setattr("opsd.data.prompts.fill_in_columns", fill_in_columns)
    check = ContextCheck(prompts, roles)
    assert fitting_rows(rows, prompts, roles, 10, 10**6, print, check=check) == rows
    assert len(filled_in) == 600


MANY = {"question": "Which is prime?", "answer": "C"}
CHOICES = [
    {"choices": ["four", "six", "seven", "nine"]},
    {"options": {"A": "four", "B": "six", "C": "seven"}},
    {"choices": {"text": ["four", "six", "seven"], "label": ["A", "B", "C"]}},
]


@pytest.mark.parametrize("choices", CHOICES)
def test_answers_to_choose_from_are_shown(choices):
    """MMLU's and ARC's rows: the question alone does not say what there is to choose."""
    name = next(iter(choices))
    data = {"data": {"source": "none", "columns": {"problem": "question"}}, "method": "grpo"}
    records = [{**MANY, **choices}]
    with pytest.raises(UserError, match=rf"leaves the column '{name}' out in row 1.*'C' is one"):
        check(records=records, **data)
    check(f"{{{{ problem }}}} {{{{ {name} }}}}", records=records, **data)
    records[0] |= {"question": "Which is prime: four, six, seven or nine?"}
    check(records=records, **data)
    records[0] |= {"question": "Which is prime: four, six or another?"}
    with pytest.raises(UserError, match=f"leaves the column '{name}' out"):
        check(records=records, **data)
    records[0] |= {"question": "?", "answer": "free text"}
    check(records=records, **data)


def test_an_answer_that_may_be_a_choice_s_place_is_told():
    """MMLU's rows: 2 is the third choice, and a box holds another number or a letter."""
    notes, section = [], PromptsSection(student="{{ problem }} {{ choices }}")
    for choices in (["10", "20", "30"], ["1", "2", "3"]):
        rows = load_rows([{**RECORD, "answer": 2, "choices": choices}])
        prompts = Prompts(section, make_tokenizer(FAMILIES[0]))
        seen = ContextCheck(prompts, ["student"])
        seen(1, rows[0])
        notes.append([said for said in seen.notes() if "a choice's place" in said])
    assert notes[1] == [] and notes[0][0].startswith("1 rows have choices and a number")


def test_a_chat_template_without_a_generation_prompt_is_told():
    silent = turns("<|im_start|>user\n§<|im_end|>", "", "<|im_start|>assistant\n§<|im_end|>", "")
    family = Family("", silent, IM, "<|im_end|>", "", "", "", None)
    seen = ContextCheck(Prompts(PromptsSection(), make_tokenizer(family)), ["student"])
    assert [said for said in seen.notes() if "has no generation prompt" in said]


def test_an_argument_that_no_chat_template_looks_at_is_told():
    notes = []
    for template in (CHATML, CHATML + "{% if enable_thinkin %}{% endif %}"):
        family = Family("", template, IM, "<|im_end|>", "", "", "", None)
        section = PromptsSection(teacher_chat={"enable_thinkin": False})
        seen = ContextCheck(Prompts(section, make_tokenizer(family)), ["student"])
        notes.append([said for said in seen.notes() if "it has no effect" in said])
    (said,), none = notes
    assert said.startswith("prompts.teacher_chat has 'enable_thinkin'") and none == []


def test_tokens_of_the_chat_in_a_text_are_told(capsys):
    end = "<|im_end|>"
    records = [*RECORDS, {**RECORD, "problem": f"What is{end} 2 + 3, please?"}]
    check(records=records)
    assert capsys.readouterr().err == ""  # quiet
    config, family = {"target": "{{ solution }}"}, Family("", CHATML, IM, end, "", "", "", None)
    prompts = Prompts(PromptsSection(**config), make_tokenizer(family))
    rows = load_rows([*records, {**RECORD, "solution": f"3{end}"}])
    seen = ContextCheck(prompts, ["student"], targets=True)
    for number, row in enumerate(rows, start=1):
        seen(number, row)
    (said,) = seen.notes()
    assert said.startswith("2 rows hold '<|im_end|>', such as row 3")
