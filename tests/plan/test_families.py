"""Plans of models whose layers differ, and of those with experts or without sdpa."""

import pytest
import transformers
from helpers.prefix_models import GPT_OSS, SIZES, gemma_4

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.plan.fake_run import Peaks, over_layers

GEMMA_4 = gemma_4(["sliding_attention", "sliding_attention", "full_attention"] * 2)

KINDS = ["linear_attention"] * 3 + ["full_attention"]
HYBRID = transformers.Qwen3_5TextConfig(
    **{**SIZES, "num_hidden_layers": 8},
    head_dim=8,
    layer_types=KINDS * 2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (HYBRID, "linear_attention: planned with each rollout's own"),
        (GEMMA_4, None),
        (GPT_OSS, None),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_models_are_planned(config, reason, tmp_path, capsys):
    config.save_pretrained(tmp_path)
    lengths = ("--prompt-tokens", "5", "--solution-tokens", "9")
    asked = [str(tmp_path), *lengths, "rollout.max_new_tokens=8", "train.precision=fp32"]
    assert main(["plan", *asked]) == 0
    shown = capsys.readouterr().out
    assert "activations" in shown and "Traceback" not in shown
    assert (reason or "times fewer") in shown and ("own prefix" in shown) == (reason is not None)


@pytest.mark.parametrize("config", [HYBRID, GEMMA_4, GPT_OSS], ids=lambda c: c.model_type)
def test_a_few_layers_tell_of_all(config):
    """Each layer adds what its own settings say, and few layers are looked at."""
    depths = []

    def cost(short):
        text = short.get_text_config()
        depths.append(text.num_hidden_layers)
        heads = [layer.head_dim for layer in text.per_layer_config]
        kinds = [100 if kind == "full_attention" else 7 for kind in text.layer_types]
        return Peaks(1000 + sum(heads) + sum(kinds), 5 + sum(kinds))

    assert over_layers(config, cost) == cost(config)
    assert max(depths[:-1]) <= 3


def test_layers_that_share_are_measured_whole():
    config = transformers.Gemma4TextConfig(**SIZES, num_kv_shared_layers=1)
    assert over_layers(config, lambda whole: Peaks(int(whole is config), 0)).most == 1

    def fails(short):
        raise RuntimeError("data-dependent")

    with pytest.raises(UserError, match=r"cannot run gemma4_text without data .*data-dependent"):
        over_layers(config, fails)
