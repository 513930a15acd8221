"""The config: what is refused, in which words, and what is filled in."""

import pytest
import yaml

from opsd.config import Config, describe, load_config, parse_config, save_config
from opsd.errors import UserError
from opsd.sections import CollapseSection, LoraSection, RewardSection, WeightsSection

GOOD = {"model": {"path": "m"}, "data": {"source": "d.jsonl"}}


def write(path, values):
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        # Unknown names suggest the nearest.
        ("trian.steps=3", ["'trian' at the top", "did you mean 'train'?"]),
        ("train.learning_rat=1", ["'learning_rat' in section 'train'", "'learning_rate'?"]),
        ("rollout.zzzzzz=1", ["'zzzzzz' in section 'rollout'", "known: engine, source"]),
        # Wrong types.
        ("train.steps=many", ["train.steps is 'many'", "valid integer"]),
        ("train.steps=2.5", ["train.steps is 2.5", "integer"]),
        ("train.learning_rate=[1]", ["train.learning_rate is [1]", "number"]),
        ("model.path=7", ["model.path is 7", "valid string"]),
        ("model.path=null", ["model.path is None", "valid string"]),
        ("train=3", ["train is 3", "dictionary"]),
        ("data.columns=[a]", ["data.columns is ['a']", "dictionary"]),
        ("eval.teacher=perhaps", ["eval.teacher is 'perhaps'", "boolean"]),
        # Values out of range.
        ("train.steps=0", ["train.steps is 0", "greater than or equal to 1"]),
        ("train.learning_rate=-1.0", ["train.learning_rate is -1.0", "greater than 0"]),
        ("train.learning_rate=.inf", ["train.learning_rate is inf", "finite"]),
        ("rollout.temperature=.nan", ["rollout.temperature is nan"]),
        ("rollout.top_p=1.5", ["rollout.top_p is 1.5", "less than or equal to 1"]),
        ("loss.beta=1.0", ["loss.beta is 1.0", "less than 1"]),
        ("loss.memory_budget=5", ["loss.memory_budget is 5", "1048576"]),
        ("eval.problems=-1", ["eval.problems is -1"]),
        ("loss.roles=[]", ["loss.roles is []", "at least 1 item"]),
        # Choices.
        ("method=dpo", ["method is 'dpo'", "'opsd', 'grpo', 'sft' or 'distill'"]),
        ("loss.divergence=kl", ["loss.divergence is 'kl'", "'jsd' or 'sampled_token'"]),
        ("loss.roles=[judge]", ["loss.roles.0 is 'judge'", "'student' or 'teacher'"]),
        ("prompts.too_long=cut", ["prompts.too_long is 'cut'", "'error' or 'skip'"]),
        # Fields that do not go together.
        ("method=grpo", ["rollout.per_problem is 1", "at least 2"]),
        ("train.warmup_steps=200", ["train.warmup_steps is 200", "train.steps (100)"]),
        # Sections inside sections.
        ("loss.weights.corect=1", ["'corect' in section 'loss.weights'", "did you mean 'correct'"]),
        ("loss.weights.maths=-1.0", ["loss.weights.maths is -1.0", "greater than or equal to 0"]),
        ("loss.weights.position=[1]", ["loss.weights.position is [1]", "at least 2 items"]),
        ("loss.weights.position=[0, 0]", ["loss.weights.position", "one of them more"]),
        ("loss.reward.format=(", ["loss.reward.format is '('", "no regular expression"]),
        ("train.collapse.on=maybe", ["train.collapse.on is 'maybe'", "'warn', 'stop' or 'off'"]),
        # Overrides that are none.
        ("train.steps", ["override is 'train.steps'", "must look like"]),
        ("=5", ["override is '=5'", "must look like"]),
        ("train..steps=5", ["override is 'train..steps=5'", "must look like"]),
        ("method.name=opsd", ["override is 'method.name=opsd'", "'method' is not a section"]),
    ],
)
def test_bad_values_are_refused(override, wanted, tmp_path):
    path = write(tmp_path / "c.yaml", {"method": "opsd", **GOOD})
    with pytest.raises(UserError) as raised:
        load_config(path, [override])
    message = str(raised.value)
    assert "\n" not in message and "pydantic" not in message
    for part in wanted:
        assert part in message


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("model: [", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("", "holds NoneType"),
        ("- model", "holds list"),
        ("data: {source: d}", "model is missing"),
        ("model: {path: m}\ndata:", "data is missing"),
        ("model: {path: m}\ndata: {}", "data.source is missing"),
        ("model: {path: m}\ndata: d.jsonl", "data is 'd.jsonl'"),
        ("1: 2\nmodel: {path: m}\ndata: {source: d}", "1"),
    ],
)
def test_bad_files_are_refused(text, wanted, tmp_path):
    with pytest.raises(UserError) as raised:
        load_config(write(tmp_path / "c.yaml", text))
    assert wanted in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(UserError, match=r"CONFIG is '.*none.yaml': no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(UserError, match="is not YAML"):
        load_config(tmp_path / "c.yaml")


def test_all_errors_are_named_at_once():
    with pytest.raises(UserError) as raised:
        parse_config({**GOOD, "train": {"steps": 0, "sed": 1}})
    assert "train.steps is 0" in str(raised.value) and "did you mean 'seed'" in str(raised.value)


def test_overrides_are_yaml_and_win(tmp_path):
    path = write(tmp_path / "c.yaml", {**GOOD, "train": {"steps": 5, "seed": 1}})
    overrides = ["train.steps=7", "train.learning_rate=1e-5", "rollout.top_p=0.9"]
    overrides += [
        "method=sft",
        "loss.roles=[student, teacher]",
        "eval.teacher=true",
        "data.columns.problem=q",
    ]
    overrides += ["prompts.system=Answer a=b"]
    config = load_config(path, overrides)
    assert (config.train.steps, config.train.seed, config.train.learning_rate) == (7, 1, 1e-5)
    assert config.rollout.top_p == 0.9 and config.loss.roles == ["student", "teacher"]
    assert config.eval.teacher is True and config.data.columns == {"problem": "q"}
    assert config.prompts.system == "Answer a=b"


def test_an_override_may_fill_an_empty_section(tmp_path):
    path = write(tmp_path / "c.yaml", "model: {path: m}\ndata: {source: d}\ntrain:\n")
    assert load_config(path, ["train.steps=7"]).train.steps == 7


def test_a_saved_config_is_the_same_config(tmp_path):
    config = parse_config({**GOOD, "prompts": {"system": "Ünïcode: 'yes'\n"}})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == set(Config.model_fields)


def test_every_field_is_described():
    fields = {
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        if section != "method"
        for name in field.annotation.model_fields
    } | {
        f"{section}.{name}"
        for section, name in (
            [("model", f"lora.{n}") for n in LoraSection.model_fields]
            + [("loss", f"weights.{n}") for n in WeightsSection.model_fields]
            + [("loss", f"reward.{n}") for n in RewardSection.model_fields]
            + [("train", f"collapse.{n}") for n in CollapseSection.model_fields]
        )
    }
    described = {
        f"{section}.{name}": (default, text)
        for section, name, default, text in describe()
        if section
    }
    assert set(described) == fields
    assert all(len(text) > 10 for _, text in described.values())
    assert described["model.path"][0] == "required"
    assert "(forward_kl | reverse_kl | jsd | sampled_token)" in described["loss.divergence"][1]
