"""Which rows fit, with as few of them tokenised as their sizes allow."""

import pytest
from helpers.training_cases import prompts_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from opsd.common.errors import UserError
from opsd.data import prompts as prompts_module
from opsd.data.length_filter import fitting_rows, tokens_needed
from opsd.data.rows import Row
from opsd.data.token_bound import token_bound
from opsd.quickstart import tiny_model as tiny

N, P = normalizers, pre_tokenizers


def byte_level(normalizer=None, first_space=False):
    """A tokenizer of single bytes: the most tokens that a text can have."""
    alphabet = sorted(P.ByteLevel.alphabet())
    backend = Tokenizer(BPE({token: i for i, token in enumerate(alphabet)}, []))
    if normalizer is not None:
        backend.normalizer = normalizer
    split = P.Split(Regex(r"\d"), "isolated")
    backend.pre_tokenizer = P.Sequence([split, P.ByteLevel(add_prefix_space=first_space)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_fallback(normalizer=None, pre_tokenizer=None):
    """One with a mark for spaces, and bytes for all else, as Llama 2's and Gemma's."""
    tokens = ["<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = BPE(
        {token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True
    )
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZERS = {
    "bytes": byte_level(),
    "NFC": byte_level(N.NFC()),
    "NFKC": byte_level(N.NFKC()),
    "NFD, lower case": byte_level(N.Sequence([N.NFD(), N.Lowercase()])),
    "first space": byte_level(first_space=True),
    "Llama": byte_fallback(N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")])),
    "Metaspace": byte_fallback(pre_tokenizer=P.Metaspace(prepend_scheme="always")),
    "neither": byte_fallback(),
}


@given(text=st.text() | st.text(st.sampled_from(" 1aé\u0344\ufdfa\u1e9b\u0390İ▁")))
def test_no_text_has_more_tokens_than_its_bound(text):
    for name, tokenizer in TOKENIZERS.items():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) <= token_bound(tokenizer)(text), name


def test_steps_that_are_not_known_have_no_bound():
    assert token_bound(byte_fallback(N.Replace("a", "aaaa"))) is None
    assert token_bound(byte_fallback(N.Sequence([N.NFC(), N.Nmt()]))) is None
    assert token_bound(byte_fallback(pre_tokenizer=P.Metaspace(replacement="_"))) is None


def rows_of(lengths):
    return [Row("1+1" * n, "2" * n, "2", {}) for n in lengths]


@pytest.fixture
def counted():
    """Prompts, and the texts that they have tokenised."""
    tokenizer, texts = tiny.make_tokenizer(), []
    prompts = prompts_of(tokenizer, too_long="skip")
    tokenise = prompts._ids
    prompts._ids = lambda batch: (texts.extend(batch), tokenise(batch))[1]
    return prompts, texts


@pytest.mark.parametrize("answer", [20, None])
def test_only_rows_in_doubt_are_tokenised(counted, answer):
    prompts, texts = counted
    rows, roles, told = rows_of([*range(1, 400), 9]), ["student", "teacher"], []
    exact = tokens_needed(rows, prompts_of(prompts.tokenizer), roles, answer)
    window, done = sorted(exact)[350], []
    kept = fitting_rows(rows, prompts, roles, answer, window, told.append, done.append)
    assert kept == [row for row, needed in zip(rows, exact, strict=True) if needed <= window]
    assert 0 < len(kept) < len(rows) and sum(done) == len(rows) and "49 of 400" in told[0]
    assert 0 < len(texts) < 0.8 * len(rows) * len(roles)
    strict = prompts_of(prompts.tokenizer)
    with pytest.raises(UserError, match=rf"row \d+ needs \d+ tokens.*{window} \(49 of 400"):
        fitting_rows(rows, strict, roles, answer, window, told.append)


def test_a_row_is_tokenised_once_a_role(counted):
    prompts, texts = counted
    rows = rows_of(range(1, 300))
    contexts = prompts.contexts(rows)
    assert len(texts) == 2 * len(rows)
    assert prompts.lengths(rows, "student") == [len(context.student) for context in contexts]
    for row, context in zip(rows, contexts, strict=True):
        assert prompts.context(row) == context and prompts.ids(row, "teacher") == context.teacher
    assert len(texts) == 2 * len(rows)
    targets = [prompts.target(row) for row in rows]
    assert prompts.all_ids(rows, "student target") == targets
    several = len(texts)
    assert prompts.all_ids(rows, "student target") == targets and len(texts) == several
    alone = prompts_of(prompts.tokenizer)
    assert [alone.context(row) for row in rows] == contexts  # as each text by itself


def test_what_is_remembered_is_bounded(counted, monkeypatch):
    prompts, texts = counted
    monkeypatch.setattr(prompts_module, "KEPT_TOKENS", 100)
    rows = rows_of([9] * 40)
    first = prompts.all_ids(rows, "student")
    assert prompts._known_tokens <= 100 and len(texts) == 40
    assert prompts.all_ids(rows, "student") == first and 40 < len(texts) < 80


@pytest.mark.parametrize(
    ("template", "bounded"),
    [
        ("{{ messages[0].content | trim }}", True),
        ("{{ messages[0].content | tojson }}", False),
        ("{{ messages[0].content | upper }}", False),
        ("{{ messages[0].content }}{{ messages[0].content }}", True),
        (
            "{% if '1' in messages[0].content %}{{ 'a long constant' }}{% endif %}"
            "{{ messages[0].content }}",
            True,
        ),
    ],
)
def test_chat_templates_that_rewrite_a_message_have_no_bound(template, bounded):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    prompts = prompts_of(tokenizer)
    for row in rows_of([1, 30]):
        (most,) = prompts.longest([row], "student")
        assert (most is not None) == bounded
        assert most is None or len(prompts.ids(row, "student")) <= most
