"""The chat template: turns, targets and stops of the families that people train."""

import datetime
from dataclasses import replace

import pytest
from helpers.chat_templates import (
    ANSWER,
    CHATML,
    END,
    ENDS,
    FAMILIES,
    FORMS,
    IM,
    IM_ROLES,
    PARTS,
    A,
    Family,
    turns,
)
from helpers.chat_tokenizers import context_ids, make_tokenizer, target_ids

from opsd.common.errors import UserError
from opsd.data.chat import ChatTemplate
from opsd.data.thoughts import open_thought

QUESTION = "What is 1 + 2?"
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def chat_of(family, **more):
    return ChatTemplate(make_tokenizer(family), family.arguments, **more)


@every_family
def test_a_target_is_what_the_template_writes(family):
    chat, tokenizer = chat_of(family), make_tokenizer(family)
    context, target = context_ids(chat, QUESTION), target_ids(chat, QUESTION, ANSWER)
    decoded = tokenizer.decode(context)
    assert QUESTION in decoded and decoded.endswith(family.given)
    end = family.end or family.eos
    after = tokenizer.decode([*context, *target]).removeprefix(decoded)
    assert after == family.before.removeprefix(family.given) + ANSWER + end
    assert target[-1] == tokenizer.convert_tokens_to_ids(family.stop or family.eos)


WRITTEN_OTHERWISE = {
    *("Gemma 4", "DeepSeek R1", "Nemotron 3", "GLM 4.5"),  # a thought is opened, or taken out
    *("no turn end", "no turn end, prompt with a space"),
}


@every_family
def test_the_target_has_the_tokens_of_the_whole_chat(family):
    """Where the template writes the generation prompt into a finished chat as it is."""
    chat, tokenizer = chat_of(family), make_tokenizer(family)
    message, answer = chat._message("user", QUESTION), chat._message("assistant", ANSWER)
    whole = tokenizer.apply_chat_template([message, answer], tokenize=False, **family.arguments)
    as_it_is = whole.startswith(chat.context(QUESTION)) and family.stop is not None
    assert as_it_is == (family.name not in WRITTEN_OTHERWISE)
    if not as_it_is:
        return
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    ours = [*context_ids(chat, QUESTION), *target_ids(chat, QUESTION, ANSWER)]
    assert ids[: len(ours)] == ours


@every_family
def test_the_turn_ends_where_the_template_ends_it(family):
    chat, tokenizer = chat_of(family), make_tokenizer(family)
    stop = family.stop and tokenizer.convert_tokens_to_ids(family.stop)
    assert chat.stops == (frozenset() if stop is None else {stop})


def test_an_added_token_of_white_space_ends_no_turn():
    """Gemma's tokenizers have them."""
    family = next(family for family in FAMILIES if family.name == "Gemma 3")
    tokenizer = make_tokenizer(Family(**{**vars(family), "name": "with white space"}))
    tokenizer.add_tokens(["\n", "\n\n"])
    assert ChatTemplate(tokenizer).turn_end[0] == "<end_of_turn>"


@every_family
def test_system_messages_stand_or_are_refused(family):
    chat = chat_of(family)
    if family.system:
        assert "Be brief." in chat.context(QUESTION, "Be brief.")
    else:
        with pytest.raises(UserError, match="refuses: System role"):
            chat.context(QUESTION, "Be brief.")


@every_family
def test_an_answer_with_a_thought_keeps_it(family):
    chat, tokenizer = chat_of(family), make_tokenizer(family)
    answer = f"<think>\nWe add.\n</think>\n\n{ANSWER}"
    context = context_ids(chat, QUESTION)
    text = tokenizer.decode([*context, *target_ids(chat, QUESTION, answer)])
    after = text[text.index(QUESTION) :]
    if "<channel|>" in family.given:
        assert "We add." not in after
        return
    assert after.count("<think>") == after.count("</think>") == 1
    if "</think>" in family.given:  # the context has said that there is no thought
        assert "We add." not in after
        return
    assert "We add." in after and after.index("</think>") < after.index(ANSWER)


def test_a_prefill_is_no_part_of_the_target():
    family = FAMILIES[0]
    tokenizer, chat = make_tokenizer(family), chat_of(family, prefill="So ")
    context = context_ids(chat, QUESTION)
    assert tokenizer.decode(context).endswith("assistant\nSo ")
    target = target_ids(chat, QUESTION, "1 + 2 is 3.")
    assert tokenizer.decode([*context, *target]).endswith("assistant\nSo 1 + 2 is 3.<|im_end|>")


@pytest.mark.parametrize(
    "template", ["{{ 'Hello' }}", CHATML.replace("m['content']", "m['content'][:12]")]
)
def test_a_template_without_the_message_is_refused(template):
    family = Family("empty", template, IM, "<|im_end|>", "", "", "", None)
    with pytest.raises(UserError, match="leaves the user's message out, or cuts it"):
        chat_of(family)


def test_several_templates_without_a_default_are_refused():
    tokenizer = make_tokenizer(Family("several", CHATML, IM, "<|im_end|>", "", "", "", None))
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\)"):
        ChatTemplate(tokenizer)


def test_parts_are_given_where_a_template_wants_them():
    family = next(family for family in FAMILIES if family.template == PARTS)
    plain = next(family for family in FAMILIES if family.template == CHATML)
    assert chat_of(family).context(QUESTION) == chat_of(plain).context(QUESTION)


def test_the_date_is_the_one_given():
    family = next(family for family in FAMILIES if family.name == "Llama 3")
    day = datetime.date(2025, 2, 3)
    assert "Today Date: 03 Feb 2025" in chat_of(family, date=day).context(QUESTION)
    today = datetime.date.today().strftime("Today Date: %d %b %Y")
    assert today in chat_of(family).context(QUESTION)
    plain = make_tokenizer(family).apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    assert chat_of(family).context(QUESTION) == plain


@pytest.mark.parametrize(
    "written",
    ["'%d %b %Y'", "'%A, %B %-d, %Y'", "'%d' ~ ' ' ~ '%B'", "'100%% %y %%d'", "'%c'", "'%H:%M %p'"],
)
def test_a_date_of_any_format_is_the_one_given(written):
    template = f"{{%- set format = {written} -%}}{{{{ strftime_now(format) + '!' }}}}{CHATML}"
    day = datetime.date(2025, 2, 3)
    context = chat_of(Family("", template, IM, "<|im_end|>", "", "", "", None), date=day).context(
        "?"
    )
    assert context.split("!<|im_start|>")[0] == day.strftime(eval(written.replace("~", "+")))


def test_a_template_that_refuses_plain_strings_is_given_parts():
    template = PARTS.replace("part['type'] == 'text'", "part.type.upper() == 'TEXT'")
    chat = chat_of(Family("", template, IM, "<|im_end|>", "", "", "", None))
    assert chat.in_parts and QUESTION in chat.context(QUESTION)


@pytest.mark.parametrize("opening", ["Here are my reasoning steps:\n", "<scratchpad>\n"])
def test_a_beginning_that_no_answer_has_is_refused_as_a_target(opening):
    """Its context is fine for what the model writes itself."""
    roles = [f"<|im_start|>{role}\n§<|im_end|>\n" for role in ("user", "system", "assistant")]
    template = turns(*roles, f"<|im_start|>assistant\n{opening}")
    family = Family("", template, IM, "<|im_end|>", "", "", "", None)
    assert chat_of(family).context(QUESTION).endswith(opening)
    with pytest.raises(UserError, match=r"begins an answer with .*is unknown"):
        target_ids(chat_of(family), QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("written", "between"),
    [("<|im_start|>assistant\n\n", "\n"), ("\n<|im_start|>assistant\n ", "")],
)
@pytest.mark.parametrize("last", ["", "Add the numbers.\n\n"])
def test_a_prompt_may_differ_in_space_and_before_the_question(written, between, last):
    """As in vLLM's templates for Alpaca, Llama 4, and Mistral with its system message last."""
    template = (
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<|im_start|>user\n' }}"
        f"{{{{ {last!r} if loop.last else '' }}}}{{{{ m.content + '<|im_end|>' }}}}"
        f"{{%- else -%}}{{{{ {written!r} + m.content + '<|im_end|>' }}}}{{%- endif -%}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )
    chat = chat_of(Family("", template, IM, "<|im_end|>", "", "", "", None))
    target = chat.tokenizer.decode(target_ids(chat, QUESTION, ANSWER))
    assert target == between + ANSWER + "<|im_end|>"


@pytest.mark.parametrize("template", FORMS, ids=range(len(FORMS)))
def test_a_thought_is_written_as_the_template_writes_it(template):
    tokens = (*IM, "<|START_THINKING|>", "<|END_THINKING|>", "<|START_TEXT|>")
    family = Family("", template, tokens, END, "", "", END, END)
    chat, tokenizer = chat_of(family), make_tokenizer(family)
    found = [
        tokenizer.decode(target_ids(chat, QUESTION, answer))
        for answer in (f"<think>\nWe add.\n</think>\n\n{ANSWER}", ANSWER)
    ]
    assert found == list(FORMS[template])


@pytest.mark.parametrize("template", ENDS, ids=range(len(ENDS)))
def test_a_turn_ends_before_the_next_begins(template):
    family = Family("", template, (*IM, "<|stop|>"), END, "", "", "", None)
    chat, tokenizer = chat_of(family), make_tokenizer(family)
    target = tokenizer.decode(target_ids(chat, QUESTION, ANSWER))
    assert (chat.turn_end[0], target) == ENDS[template]


def test_a_generation_prompt_that_nobody_asked_for_is_no_end():
    """LLaDA's: all turns begin with one token, EOS ends none, and the prompt is always there."""
    ends = ("<|begin|>§<|eot|>", "<|begin|>§<|eot|>", "<|begin|>assistant:§<|eot|>")
    template = turns(*ends, "", "<s>") + "{{ '<|begin|>assistant:' }}"
    family = Family("", template, ("<|begin|>", "<|eot|>", "</s>", "<s>"), "</s>", "", "", "", None)
    chat = chat_of(replace(family, bos="<s>"))
    assert chat.turn_end[0] == "<|eot|>" and not chat.unprompted
    assert chat.tokenizer.decode(target_ids(chat, QUESTION, ANSWER)) == f"{ANSWER}<|eot|>"


def test_a_template_without_a_generation_prompt_is_found():
    silent = turns(*IM_ROLES, f"{A}§{END}", "")
    assert chat_of(replace(FAMILIES[0], template=silent)).unprompted == A
    for family in FAMILIES:
        assert chat_of(family).unprompted == "", family.name


def test_a_prefill_that_opens_a_thought_is_not_opened_twice():
    chat = chat_of(FAMILIES[0], prefill="<think>\n")
    target = target_ids(chat, QUESTION, f"<think>\nWe add.\n</think>\n\n{ANSWER}")
    written = make_tokenizer(FAMILIES[0]).decode(target)
    assert written == f"We add.\n</think>\n\n{ANSWER}<|im_end|>"


def test_a_thought_in_a_channel_that_is_closed_already_is_left_out():
    family = next(family for family in FAMILIES if family.name == "Gemma 4")
    target = target_ids(chat_of(family), QUESTION, f"<|channel>thought\nWe add.<channel|>{ANSWER}")
    assert make_tokenizer(family).decode(target) == ANSWER + "<turn|>"


def test_a_problem_that_talks_of_tags_opens_no_thought():
    assert open_thought("What does <think> mean?<|im_end|>\n<|im_start|>assistant\n") is None
    assert open_thought("[THINK]") == ("[THINK]", "[/THINK]")
