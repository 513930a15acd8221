"""What somebody may have meant."""

import pytest

from opsd.common.near import near_model


@pytest.mark.parametrize(
    "files, meant",
    [
        (["config.yaml", "model/config.json", "best/model/config.json"], "model"),
        (["best/model/config.json"], "best/model"),
        (["checkpoint-500/config.json", "checkpoint-1000/config.json"], "checkpoint-1000"),
        (["checkpoint-20/adapter_config.json", "README.md"], "checkpoint-20"),  # peft's, TRL's
        (["default/adapter_config.json"], "default"),  # peft's, of several adapters
        (["final_model/config.json", "logs/events"], "final_model"),
        (["global_step_40/actor/huggingface/config.json", "a.txt"], None),  # verl's, too deep
        ([], None),
    ],
)
def test_the_model_inside_a_directory(files, meant, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert near_model(tmp_path) == (f"; did you mean {str(tmp_path / meant)!r}?" if meant else "")
