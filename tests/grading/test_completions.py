"""The part of a completion that is graded, with tags as text and as special tokens."""

import pytest
from helpers.chat_templates import FAMILIES
from helpers.chat_tokenizers import make_tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast

from opsd.data.thoughts import final_part
from opsd.grading.completions import completions
from opsd.rollout.base import Rollout

TEXTS = {
    "<think>2 + 4 is \\boxed{6}. No: 7.</think>\n\nThe answer is 7.": "\n\nThe answer is 7.",
    "<think>Perhaps \\boxed{5}?</think>It is **6**.": "It is **6**.",
    "<think>Let me try \\boxed{6}? Check the other way": "",
    "\n<think>The user wants the answer in \\boxed{}. 2+4=6.": "",
    "[THINK]a[/THINK]b": "b",
    "<thinking>a</thinking>b": "b",
    "<seed:think>a</seed:think>b": "b",
    "<THINK>a</THINK>b": "b",
    "<|channel>thought\na<channel|>b": "b",
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b": "b",
    "<|channel|>analysis<|message|>a": "",
    "<|channel|>final<|message|>b": "b",
    "<think>a</think>b<think>c</think>d": "d",
    "So \\boxed{3}. A tag such as <think> is text here.": None,
    "<think>a</think>A tag such as `<think>` is text here, \\boxed{3}.": (
        "A tag such as `<think>` is text here, \\boxed{3}."
    ),
    '<think>I shall end with "</think>" and \\boxed{6}. Now': "",
    '<think>It is "a"</think>"b"': '"b"',
    "Sure. <think>Perhaps \\boxed{6}": "Sure.",
    "<think>a</think>b<think>c": "b",
    "[THINK]a[/THINK]b[THINK]c": "b",
    "So \\boxed{3}.": None,
    "": None,
}


@pytest.mark.parametrize("text", TEXTS)
def test_what_follows_the_thought_is_graded(text):
    assert final_part(text) == (text if TEXTS[text] is None else TEXTS[text])


def test_a_thought_that_the_context_began():
    assert final_part("We add.</think>So 3.", in_thought=True) == "So 3."
    assert final_part("We add \\boxed{3}", in_thought=True) == ""


def tokenizer_with(tags, special):
    tokenizer = make_tokenizer(FAMILIES[0])
    copied = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer.__class__.from_str(tokenizer._tokenizer.to_str()),
        eos_token=tokenizer.eos_token,
    )
    copied.add_tokens([AddedToken(tag, special=special) for tag in tags])
    return copied


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    "text", ["<think>Try \\boxed{6}? No.</think>I cannot say.", "[THINK]a[/THINK]b", "So 3."]
)
def test_tags_count_as_text_and_as_special_tokens(text, special):
    tokenizer = tokenizer_with(["<think>", "</think>", "[THINK]", "[/THINK]"], special)
    ids = tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids
    (found,) = completions(tokenizer, [Rollout(ids, True)])
    assert found == text
    (cut,) = completions(tokenizer, [Rollout(ids[:-1], False)])
    assert cut == text


def test_all_special_tokens_for_a_verifier_that_asks_for_them():
    tokenizer = tokenizer_with(["<step>"], True)
    ids = tokenizer("<step>1<|endoftext|>2<|im_end|>", add_special_tokens=False).input_ids
    rollouts = [Rollout(ids, True)]
    assert completions(tokenizer, rollouts) == ["12"]
    assert completions(tokenizer, rollouts, keep_special_tokens=True) == ["<step>1<|endoftext|>2"]
