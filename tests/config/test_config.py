"""The config: what is refused, in which words, and what is filled in."""

import copy
import re
import time
from pathlib import Path

import pytest
import yaml

from opsd.common.errors import UserError
from opsd.config.config import Config
from opsd.config.foreign import section_of
from opsd.config.load import describe, load_config, parse_config, save_config, with_overrides
from opsd.config.loss import GateSection, RewardSection, WeightsSection
from opsd.config.sections import (
    CollapseSection,
    LoraSection,
    MemberSection,
    RouteSection,
    TeacherSection,
)
from opsd.config.yaml import load_yaml

GOOD = {"model": {"path": "m"}, "data": {"source": "d.jsonl"}}


def write(path, values):
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


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


def test_words_and_numbers_are_yaml_1_2s():
    text = "[1:30, 010, on, no, yes, off, 1e-5, 1_000, 0o17, 0x1F, .5, ~, true, 1.5e3, 0b1]"
    numbers = ["1:30", 10, "on", "no", "yes", "off", 1e-5, "1_000", 15, 31, 0.5, None, True]
    assert load_yaml(text) == [*numbers, 1500.0, "0b1"]
    shared = load_yaml("a: &x {b: [1]}\nc: *x")
    assert shared["a"] == shared["c"] and shared["a"]["b"] is not shared["c"]["b"]


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
            + [("loss", f"gates.{n}") for n in GateSection.model_fields]
            + [("loss", f"reward.{n}") for n in RewardSection.model_fields]
            + [("teacher", f"mix.{n}") for n in MemberSection.model_fields]
            + [("teacher", f"routes.{n}") for n in RouteSection.model_fields]
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


@pytest.mark.parametrize(
    "flat, said",
    [
        ({"reward_funcs": len}, r"OPSDTrainer\(reward_funcs=…\)"),
        ({"push_to_hub": True}, "write the hub's name, owner/name"),
        ({"torch_compile": True}, "leave it out"),
        ({"temperature": 1.0}, r"rollout_temperature \(rollout.temperature\) or loss_temperature"),
        ({"columns": {}}, r"say data_columns \(data.columns\) or eval_columns"),
        ({"num_generations": 8}, r"unknown key 'num_generations': here it is group_size=8"),
        ({"lerning_rate": 1e-5}, r"did you mean learning_rate \(train.learning_rate\)\?"),
        ({"max_steps": 5, "num_generations": 2}, r"here it is steps=5; .* here it is group_size=2"),
        ({"steps": 0}, r"train.steps is 0"),
        ({"train": {"steps": 3}, "steps": 4}, r"train.steps is given twice"),
        ({"train": 3, "steps": 4}, r"train is 3: it must be a mapping"),
        ({"beta": 0.1}, r"loss.beta is 0.1: it is for loss.divergence 'jsd'"),
    ],
)
def test_a_flat_name_that_is_no_fields_or_several_says_whose(flat, said):
    with pytest.raises(UserError, match=said):
        Config(**flat)


def test_flat_names_are_fields_by_as_much_of_their_path_as_tells_them_apart():
    shared = {"path": "m", "lora": {}}
    config = Config(
        method="grpo",
        model=shared,
        lora_rank=8,
        output_dir="runs/mine",
        rollout_temperature=0.9,
        group_size=2,
        teacher=TeacherSection(policy="ema"),
        ema_decay=0.5,
        kl=0.1,
        format=".*",
        data=["a.jsonl", {"source": "b.jsonl", "weight": 2}],
    )
    assert config.model.lora.rank == 8 and shared == {"path": "m", "lora": {}}
    assert (config.output.dir, config.rollout.temperature) == ("runs/mine", 0.9)
    assert (config.teacher.policy, config.teacher.ema_decay) == ("ema", 0.5)
    assert config.loss.reward.format == ".*" and config.data.source[1].weight == 2
    again = parse_config(config.model_dump())
    assert again == config and type(again) is Config


def test_a_config_without_names_is_told_how_a_file_is_read():
    with pytest.raises(UserError, match=r"load_config\('mine.yaml'\) reads a file"):
        Config("mine.yaml")


def test_a_path_is_taken_for_its_text():
    assert Config(output_dir=Path("runs/x")).output.dir == "runs/x"


def test_a_file_has_no_flat_names():
    with pytest.raises(UserError, match="unknown key 'learning_rate': here"):
        parse_config({**GOOD, "learning_rate": 1e-5})


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=f"{path}.*: it cannot be read .Input/output error"):
        load_config(path)


def test_several_sources_are_the_same_from_the_saved_config(tmp_path):
    """A field that a source leaves out is data's, also in the config that a resumed run reads."""
    sources = ["a.jsonl", {"source": "b.jsonl", "limit": 3}]
    data = {"source": sources, "columns": {"problem": "q"}, "split": "dev", "limit": 9}
    config = parse_config({**GOOD, "data": data})
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    for one in (config, again):
        assert [source.columns for source in one.data.source] == [{"problem": "q"}] * 2
        assert [(source.split, source.limit) for source in one.data.source] == [
            ("dev", 9),
            ("dev", 3),
        ]


OF_LISTS = {
    "data.source=[]": "data.source is []: it must be a source's name, or a list of sources",
    "data.source=null": "it must be a source's name, or a list of sources",
    "data.source=[{source: a, wieght: 2}]": "in section 'data.source.0'; did you mean 'weight'?",
    "data.source=[{source: a, weight: x}]": "data.source.0.weight is 'x': input should be a valid",
    "data.source=[1]": "data.source.0 is 1: input should be a valid dictionary",
    "loss.gates=[share]": "each has fields, as in loss.gates=[{gate: share}]",
    "teacher.mix=[{coefficient: [1, a]}]": "teacher.mix.0.coefficient.1 is 'a'",
    "teacher.routes={x: 5}": "each has fields, as in teacher.routes={x: {policy: …}}",
    "prompts.contexts=[a]": "write prompts.contexts={name: value}",
    "train=2026-11-28": "it is a section",
}


@pytest.mark.parametrize("override", OF_LISTS)
def test_the_item_of_a_list_is_named(override):
    with pytest.raises(UserError) as raised:
        parse_config(with_overrides(copy.deepcopy(GOOD), [override]))
    assert OF_LISTS[override] in str(raised.value)
    assert "list[" not in str(raised.value) and ".str" not in str(raised.value)


ODD = [[], ["a"], [{}], {"a": {"b": 1}}, True, None, "", "a/b", "1,2", "a: b", 10**30, {1}]


def _names(model, prefix=""):
    """The fields that hold sections, lists or names with values, and each section's first."""
    for number, (name, field) in enumerate(model.model_fields.items()):
        inside = section_of(field.annotation)
        if inside:
            yield from _names(inside, f"{prefix}{name}.")
        if inside or number == 0 or re.search("list|dict", str(field.annotation)):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("name", [*_names(Config), "train.learning_rate", "loss.divergence"])
def test_no_value_of_a_field_is_an_internal_error(name):
    for value in ODD:
        values = copy.deepcopy(GOOD)
        *above, last = name.split(".")
        place = values
        for part in above:
            place = place.setdefault(part, {})
        place[last] = copy.deepcopy(value)
        try:
            parse_config(values)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["teacher", "lr", "train.learning_rate", "train.steps"])
@pytest.mark.parametrize("value", [[0] * 10**6, {str(key): 0 for key in range(10**6)}, "a" * 10**7])
def test_a_mistake_of_megabytes_is_told_at_once(name, value):
    """A failed step's file of a stranger had such a section: guesses at it took four minutes."""
    begun = time.process_time()
    with pytest.raises(UserError) as told:
        parse_config({"model": {"path": "m"}, "data": {"source": "d"}, **nested(name, value)})
    assert time.process_time() - begun < 10 and len(str(told.value)) < 2000


def nested(name, value):
    """A config in which the field of this name has this value."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return value
