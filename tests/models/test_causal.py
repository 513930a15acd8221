"""Models that no run can train are refused when they are loaded, by what they do."""

import pytest
from helpers.tiny_models import tiny_model

from opsd.common.errors import UserError
from opsd.config.sections import ModelSection
from opsd.models.causal import check_causal
from opsd.models.load import load_model
from opsd.quickstart.tiny_model import make_tokenizer


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("bert", {}, "a token sees those that follow it"),
        ("xlnet", {}, "a token sees those that follow it"),
        ("bert", {"is_decoder": True}, "makes its logits otherwise"),  # by a layer before the head
        ("modernbert-decoder", {}, "makes its logits otherwise"),
        ("gemma4_unified_assistant", {}, "does not run on tokens alone"),
    ],
)
def test_what_cannot_be_trained_is_refused(model_type, fields, reason):
    with pytest.raises(UserError, match=rf"^model.path is x: .*{reason}") as found:
        check_causal(tiny_model(model_type, **fields), "model.path is x")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen3", {}),
        ("bert-generation", {"is_decoder": True}),
        ("falcon_h1", {"lm_head_multiplier": 0.5}),
        ("granite", {"logits_scaling": 4.0}),
        ("hyperclovax", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 0.1}),
        ("recurrent_gemma", {"logits_soft_cap": 0.1}),
        ("inkling_text", {}),
    ],
)
def test_logits_are_made_as_the_model_makes_them(model_type, fields):
    model = tiny_model(model_type, **fields).train()
    check_causal(model, "model")
    assert model.training


def test_a_directory_is_refused_when_it_is_loaded(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BertLMHeadModel a token sees those that follow it"):
        load_model(ModelSection(path=str(tmp_path)))
