"""Rows → contexts: templates, the chat template, token ids."""

import pytest
from helpers.training_cases import ROWS, logits
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from opsd.common.errors import UserError
from opsd.config.loss import LossSection
from opsd.config.sections import PromptsSection
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.objectives import OPSD, Problem, Totals
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import Rollout

ROW = Row("1+1", "2=1+1", "2", {"problem": "1+1", "solution": "2=1+1", "answer": "2", "extra": "7"})


@pytest.fixture
def tokenizer():
    return tiny.make_tokenizer()


def prompts(tokenizer, **section):
    section = {"student": tiny.STUDENT_PROMPT, "teacher": tiny.TEACHER_PROMPT, **section}
    return Prompts(PromptsSection(**section), tokenizer)


def test_contexts_are_the_chat_template_around_the_templates(tokenizer):
    context = prompts(tokenizer).context(ROW)
    assert tokenizer.decode(context.student) == "<|user|>Q:1+1<|end|><|assistant|>"
    assert tokenizer.decode(context.teacher) == "<|user|>Q:1+1\nS:2=1+1<|end|><|assistant|>"
    shared = len(tokenizer("<|user|>Q:1+1").input_ids)
    assert context.student[:shared] == context.teacher[:shared]  # the problem stands first
    system = prompts(tokenizer, system="S:7").ids(ROW, "teacher")
    assert tokenizer.decode(system).startswith("<|system|>S:7<|end|><|user|>Q:1+1\nS:2")


def test_a_prompt_without_a_token_is_refused(tokenizer):
    """A damaged tokenizer may know no character of it."""
    tokenizer._tokenizer = Tokenizer(BPE({"é": 0}, []))
    with pytest.raises(UserError, match=r"makes no token of '<\|user\|>Q:1\+1"):
        prompts(tokenizer).context(ROW)


def test_the_solution_is_the_teachers_alone(tokenizer):
    for row in ROWS:
        context = prompts(tokenizer).context(row)
        assert row.solution in tokenizer.decode(context.teacher)
        assert row.solution not in tokenizer.decode(context.student)
        assert row.answer not in tokenizer.decode(context.student)


def test_templates_see_every_column(tokenizer):
    made = prompts(tokenizer, student="{{ extra }}{% if answer == '2' %}:{{ problem }}{% endif %}")
    assert made.render(ROW, "student") == "7:1+1"


def test_mapped_columns_win_over_columns_of_the_same_name(tokenizer):
    row = Row("1+1", "2", "2", {"problem": "number 9", "question": "1+1"})
    assert prompts(tokenizer).render(row, "student") == "Q:1+1"


def test_chat_arguments_reach_each_roles_template(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}{% if think %};{% else %}.{% endif %}"
    made = prompts(tokenizer, student_chat={"think": True})
    assert tokenizer.decode(made.ids(ROW, "student")) == "Q:1+1;"
    assert tokenizer.decode(made.ids(ROW, "teacher")) == "Q:1+1\nS:2=1+1."


def test_special_tokens_are_not_added_twice(tokenizer):
    """A tokenizer that puts a first token before any text, and a chat template that does too."""
    first = tokenizer.convert_tokens_to_ids("<|system|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", first)]
    )
    assert tokenizer("1").input_ids[0] == first
    tokenizer.chat_template = "<|system|>{{ messages[0].content }}"
    assert prompts(tokenizer).ids(ROW, "student").count(first) == 1
    assert first not in prompts(tokenizer).target(ROW)


def test_the_target_ends_the_turn(tokenizer):
    ids = prompts(tokenizer).target(ROW)
    assert tokenizer.decode(ids[:-1]) == "2=1+1" and ids[-1] == tokenizer.eos_token_id
    other = prompts(tokenizer, target="{{ answer }}").target(ROW)
    assert tokenizer.decode(other) == "2<|end|>"


def test_rollouts_are_appended_as_ids():
    """Ids that no tokenizer would make of their text stay as the model wrote them."""
    vocabulary = {"1": 0, "2": 1, "12": 2, "<e>": 3, "?": 4}
    pairs = Tokenizer(BPE(vocabulary, [("1", "2")], unk_token="?"))
    pairs.pre_tokenizer = Split(Regex(r"\n"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<e>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    made = prompts(tokenizer, student="12", teacher="2112")
    written = [0, 1, 0, 1, 3]
    assert tokenizer("1212", add_special_tokens=False).input_ids == [2, 2]  # not 0 1 0 1
    context = made.context(ROW)
    assert (context.student, context.teacher) == ([2], [1, 0, 2])
    problem = Problem(ROW, context, [Rollout(written, True)])
    (group,), _ = OPSD(LossSection(), teacher=None).sample_groups([problem])
    assert [sample.rollout for sample in group.samples] == [written]
    assert (group.student, group.teachers) == ([2], [[1, 0, 2]])


@pytest.mark.parametrize(
    "template",
    [
        "{{ problem.__class__ }}",
        "{{ problem.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ problem['__class__'] }}",
        "{{ problem.format.__self__ }}",
    ],
)
def test_templates_cannot_reach_into_python(template, tokenizer):
    """A config may come from a stranger: filling in its template must not run their code."""
    with pytest.raises(UserError, match=r"prompts\.student cannot be filled in"):
        prompts(tokenizer, student=template).context(ROW)


def test_templates_cannot_change_a_row(tokenizer):
    row = Row("1", "2", "2", {"steps": ["1"]})
    with pytest.raises(UserError, match=r"prompts\.student cannot be filled in"):
        prompts(tokenizer, student="{{ steps.append('2') }}").context(row)
    assert row.columns == {"steps": ["1"]}


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{{ problm }}", "'problm' is undefined; columns: answer, extra, problem, solution"),
        ("{{ problem + 1 }}", "prompts.student cannot be filled in"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'x' %}", "prompts.student cannot be filled in"),
    ],
)
def test_templates_that_fail_are_the_users(template, wanted, tokenizer):
    with pytest.raises(UserError) as raised:
        prompts(tokenizer, student=template).context(ROW)
    assert wanted in str(raised.value)


def test_templates_that_are_none(tokenizer):
    for name in ("student", "teacher", "target"):
        with pytest.raises(UserError, match=rf"prompts\.{name} is not a Jinja template"):
            prompts(tokenizer, **{name: "{% if %}"})


def test_chat_templates_that_refuse_are_the_users(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ messages[0].content }}"
    )
    assert prompts(tokenizer).ids(ROW, "student")
    with pytest.raises(UserError, match="System role not supported"):
        prompts(tokenizer, system="1").ids(ROW, "student")


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="without a chat template"):
        prompts(tokenizer)


# Thinking tags. The template closes an empty thought where thinking is off, as Qwen3's does, and
# opens one where it is asked to, as those of models that always think do.

THINKING = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% elif opens is defined and opens %}<think>\n{% endif %}{% endif %}"
)


@pytest.fixture
def thinking(tokenizer):
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    tokenizer.chat_template = THINKING
    return tokenizer


@pytest.mark.parametrize(
    ("chat", "ending"),
    [
        ({"enable_thinking": False}, "<|end|><|assistant|>\n<think>\n\n</think>\n\n"),
        ({"opens": True}, "<|end|><|assistant|>\n<think>\n"),
        ({"enable_thinking": True}, "<|end|><|assistant|>\n"),
    ],
)
def test_the_first_token_after_a_thinking_tag_is_judged_alike_in_both_roles(chat, ending, thinking):
    """By the state at the context's last token, which is the tag's, or the new line after it."""
    made = prompts(thinking, student_chat=chat, teacher_chat=chat)
    assert made.ending("student") == made.ending("teacher") == ending
    context, tail = made.context(ROW), thinking(ending, add_special_tokens=False).input_ids
    written = [thinking.convert_tokens_to_ids(token) for token in ("\n", "7", "</think>")]
    problem = Problem(ROW, context, [Rollout(written, True)])
    model, teacher = (tiny.make_model(seed, thinking) for seed in (1, 2))
    objective = OPSD(LossSection(), teacher)
    groups, _ = objective.sample_groups([problem])
    (group,) = groups
    assert (group.student, group.teachers) == (context.student, [context.teacher])
    assert all(ids[-len(tail) :] == tail for ids in (context.student, context.teacher))
    assert [sample.rollout for sample in group.samples] == [written]
    totals = Totals()
    loss = objective.loss(model, groups, totals)
    assert totals.tokens == 3
    log_s = logits(model, context.student, written).log_softmax(-1)
    log_t = logits(teacher, context.teacher, written).log_softmax(-1)
    each = (log_t.exp() * (log_t - log_s)).sum(-1)
    assert each[0] > 1e-3
    assert loss.item() == pytest.approx(each.mean().item(), rel=1e-4)


def test_roles_that_begin_differently_are_told_and_can_be_prefilled(thinking):
    chat = {"student_chat": {"enable_thinking": False}, "teacher_chat": {"enable_thinking": True}}
    made = prompts(thinking, **chat)
    told = made.different_endings()
    assert (
        "'<|end|><|assistant|>\\n<think>\\n\\n</think>\\n\\n'" in told and "teacher_prefill" in told
    )
    filled = prompts(thinking, **chat, teacher_prefill="<think>\n\n</think>\n\n")
    assert filled.different_endings() is None
    context = filled.context(ROW)
    assert context.student[-5:] == context.teacher[-5:] and thinking.decode(
        context.teacher
    ).endswith("</think>\n\n")


def test_a_prefill_and_a_rollout_are_not_merged():
    """The prefill's last token and the rollout's first would be one token, tokenised together."""
    vocabulary = {"1": 0, "2": 1, "12": 2, "<e>": 3, "?": 4}
    pairs = Tokenizer(BPE(vocabulary, [("1", "2")], unk_token="?"))
    pairs.pre_tokenizer = Split(Regex(r"\n"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<e>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    made = prompts(tokenizer, student="2", teacher="22", student_prefill="1", teacher_prefill="1")
    context = made.context(ROW)
    assert (context.student, context.teacher) == ([1, 0], [1, 1, 0])
    problem = Problem(ROW, context, [Rollout([1, 3], True)])
    (group,), _ = OPSD(LossSection(), teacher=None).sample_groups([problem])
    (sample,) = group.samples
    assert [*group.student, *sample.rollout] == [1, 0, 1, 3]
    assert [*group.teachers[0], *sample.rollout] == [1, 1, 0, 1, 3]


def test_each_role_may_have_a_system_message_of_its_own(tokenizer):
    made = prompts(tokenizer, teacher_system="7")
    assert tokenizer.decode(made.ids(ROW, "teacher")).startswith("<|system|>7<|end|>")
    assert "<|system|>" not in tokenizer.decode(made.ids(ROW, "student"))
    both = prompts(tokenizer, system="1", student_system="2")
    assert tokenizer.decode(both.ids(ROW, "student")).startswith("<|system|>2<|end|>")
    assert tokenizer.decode(both.ids(ROW, "teacher")).startswith("<|system|>1<|end|>")
