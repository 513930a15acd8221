"""OPSDTrainer does what `opsd train` does, with objects for names, as TRL's trainers are called."""

import os
import re
import subprocess
import sys
from io import StringIO

import datasets
import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import ROWS, quiet, short_config, short_values
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from opsd import OPSDConfig, OPSDTrainer, UserError, load_config, train
from opsd.common.display import Display
from opsd.models.load import load_model

RECORDS = [dict(row.columns) for row in ROWS]
pytestmark = pytest.mark.usefixtures("no_report")


def short(files, output, /, **flat) -> OPSDConfig:
    """`short_values` by flat names; model and rows are left to the trainer."""
    values = short_values(*files, output)
    usual = {
        "prompts": values["prompts"],
        "output_dir": str(output),
        "rollout_max_new_tokens": 6,
        **values["train"],
    }
    return OPSDConfig(**(usual | flat))


def trainer(files, output, /, model=None, rows=RECORDS, held_out=None, config=None, **given):
    made = short(files, output, **(config or {}))
    model = str(files[0]) if model is None else model
    return OPSDTrainer(model, made, rows, held_out, display=quiet(), **given)


class Seen(TrainerCallback):
    def __init__(self):
        self.steps, self.losses = [], []

    def on_step_end(self, args, state, control, model=None, **more):
        assert model is not None
        self.steps.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **more):
        self.losses.append(logs["loss"])


@pytest.fixture(scope="module")
def by_command(files, tmp_path_factory):
    """The losses of `opsd train`, of six steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opsd.training.run.write_report", lambda directory: None)
        config = short_config(*files, tmp_path_factory.mktemp("run") / "run", train={"steps": 6})
        directory = train(config, quiet())
    return [line["loss"] for line in read_lines(directory / "metrics.jsonl")]


def test_its_losses_are_those_of_opsd_train(files, by_command, tmp_path):
    seen, model = Seen(), AutoModelForCausalLM.from_pretrained(files[0])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = trainer(
        files,
        tmp_path / "run",
        model=model,
        rows=datasets.Dataset.from_list(RECORDS),
        processing_class=AutoTokenizer.from_pretrained(files[0]),
        callbacks=seen,
        config={"steps": 6, "eval_problems": 4, "eval_every": 2, "eval_samples": 2},
    )
    assert made.evaluate()["eval_problems"] == 4  # which changes nothing of what follows
    output = made.train()
    assert seen.losses == by_command == [line["loss"] for line in made.state.log_history]
    assert seen.steps == [1, 2, 3, 4, 5, 6] and output.global_step == 6
    assert output.training_loss == pytest.approx(sum(by_command) / 6)
    lines = read_lines(tmp_path / "run" / "evaluations.jsonl")
    measured = made.evaluate()
    assert measured["eval_mean_length"] == lines[-1]["mean_length"]
    assert 0 <= measured["eval_low"] <= measured["eval_accuracy"] <= measured["eval_high"] <= 1
    trained = made.model.state_dict()
    assert made.model is model and any(not before[n].equal(trained[n]) for n in before)
    made.save_model(tmp_path / "mine")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine").state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(weight.equal(again[n]) and weight.equal(saved[n]) for n, weight in trained.items())
    with pytest.raises(UserError, match="this trainer has trained"):
        made.train()


def test_a_run_goes_on_from_its_checkpoint(files, by_command, tmp_path):
    held_out = {"eval_problems": 4, "eval_every": 2, "eval_samples": 2}
    trainer(files, tmp_path / "run", config=held_out).train()
    more = trainer(files, tmp_path / "run", config={"steps": 6, **held_out})
    with pytest.raises(UserError, match=r"started before; .*Python: resume_from_checkpoint=True"):
        more.train()
    with pytest.raises(UserError, match=r"on from the last checkpoint .*-4'; True names it"):
        more.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    more.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-4")
    assert [line["loss"] for line in more.state.log_history] == by_command
    with pytest.raises(UserError, match="the problems are not those"):
        trainer(files, tmp_path / "run", rows=RECORDS[1:], config=held_out).train(True)


def test_a_field_given_to_train_is_set_in_its_config(tmp_path):
    with pytest.raises(UserError, match=r"load_config\('mine.yaml', \['train.steps=2'\]\)"):
        train("mine.yaml", steps=2)
    with pytest.raises(UserError, match=r"train has no argument 'colour': help\(train\)"):
        train("mine.yaml", colour=2)


def test_the_yaml_form_is_the_same_object(files, tmp_path):
    flat = short(files, tmp_path / "run", model=str(files[0]), data=str(files[1]))
    assert flat == short_config(
        *files, tmp_path / "run", eval={"problems": 200, "every": 0, "samples": 3}
    )
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: m}\ndata: {source: rows.jsonl}\n")
    assert isinstance(load_config(file), OPSDConfig)
    assert OPSDTrainer(
        args=flat.model_copy(update={"eval": flat.eval.model_copy(update={"problems": 2})}),
        display=quiet(),
    )._run.held_out


def share_of_digits(completions, answer, **columns):
    assert len(answer) == len(completions) == len(columns["prompts"])
    return [sum(map(str.isdigit, text)) / 6 for text in completions]


def test_grpo_learns_from_reward_functions_of_both_kinds(files, tmp_path):
    told = []

    def long(completion, row):
        told.append(row["problem"])
        return float(len(completion) > 3), "too short"

    grpo = {"method": "grpo", "group_size": 4, "steps": 1}
    made = trainer(files, tmp_path / "run", reward_funcs=[share_of_digits, long], config=grpo)
    made.train()
    kept = read_lines(tmp_path / "run" / "rollouts.jsonl")
    for line in kept:
        text = line["completion"]
        wanted = sum(map(str.isdigit, text)) / 6 + (len(text) > 3)
        assert line["reward"] == pytest.approx(wanted)
    assert len(set(told)) == 3 and {line["reward"] for line in kept} != {0.0}
    said = load_config(tmp_path / "run" / "config.yaml").loss.reward.verifier
    assert said == "reward_funcs: share_of_digits, long"


def test_held_out_rows_are_all_answered(files, tmp_path):
    made = trainer(files, tmp_path / "run", rows=RECORDS[:12], held_out=RECORDS[10:])
    assert made.evaluate()["eval_problems"] == 6
    assert made.evaluate(datasets.Dataset.from_list(RECORDS[:2]))["eval_problems"] == 2
    made = trainer(files, tmp_path / "run", rows=RECORDS)
    with pytest.raises(UserError, match="give it an eval_dataset"):
        made.evaluate()


def test_an_evaluation_says_why_most_answers_score_0(files, tmp_path):
    shown = StringIO()
    config = short(files, tmp_path / "run")
    rows, display = (RECORDS[:12], RECORDS[12:]), Display(file=shown)
    OPSDTrainer(str(files[0]), config, *rows, display=display).evaluate()
    said = r"4 of 4 answers score 0: no \\boxed answer \(\d cut off at 6 tokens\)"
    assert re.search(said, shown.getvalue())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_in_memory_keeps_its_dtype_in_files(dtype, files, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(files[0], dtype=dtype)
    made = trainer(files, tmp_path / "run", model=model, config={"steps": 1})
    assert made.model.dtype == torch.float32  # it trains so
    made.train()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").dtype == dtype


def test_adapters_find_a_model_that_is_in_no_directory(files, tmp_path):
    import peft

    model, tokenizer = load_model(short_config(*files, tmp_path).model)
    model.config.name_or_path = model.name_or_path = ""  # made in memory
    config = {"lora_rank": 4, "targets": ["q_proj"]}
    run = tmp_path / "run"
    made = trainer(files, run, model=model, processing_class=tokenizer, config=config)
    made.train()
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        wanted = made.model.eval()(ids).logits
        again = peft.AutoPeftModelForCausalLM.from_pretrained(run / "model")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(run / "base")(ids).logits
    assert torch.allclose(again, wanted, atol=1e-5) and not torch.allclose(base, wanted, atol=1e-4)
    with pytest.raises(UserError, match="model is of type PeftModelForCausalLM: it must be"):
        OPSDTrainer(made.model, train_dataset=RECORDS)


def test_a_peft_config_makes_the_adapters_that_peft_makes_of_it(files, tmp_path):
    import peft

    asked = peft.LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.25, target_modules=["v_proj", "q_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    config = {"method": "sft", "steps": 1}
    made = trainer(files, tmp_path / "run", config=config, peft_config=asked)
    made.train()
    wanted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(files[0]), asked)
    ours, theirs = (
        {name: x.shape for name, x in peft.get_peft_model_state_dict(m).items()}
        for m in (made.model, wanted)
    )
    assert ours == theirs
    kept = peft.LoraConfig.from_pretrained(tmp_path / "run" / "model")
    assert (kept.lora_alpha, kept.lora_dropout) == (5, 0.25)
    with pytest.raises(UserError, match=r"model.lora is .* in the config, and the trainer was"):
        trainer(files, tmp_path / "b", config={**config, "lora_rank": 3}, peft_config=asked)


@pytest.mark.parametrize(
    "asked, said",
    [
        ({}, "target_modules is None: name the layers"),
        ({"target_modules": ".*_proj"}, r"target_modules is '\.\*_proj': name the layers"),
        ({"target_modules": "all-linear", "use_dora": True}, "use_dora is True: model.lora has no"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"target_modules": ["q_proj"], "use_rslora": True}, "use_rslora is True"),
        ({"target_modules": ["nose"]}, "model.lora.targets has 'nose'"),
    ],
)
def test_a_peft_config_that_no_section_makes_is_refused(asked, said, files, tmp_path):
    import peft

    with pytest.raises(UserError, match=said):
        trainer(files, tmp_path / "run", peft_config=peft.LoraConfig(**asked)).train()
    with pytest.raises(UserError, match="peft_config is of type IA3Config"):
        trainer(files, tmp_path / "run", peft_config=peft.IA3Config())


def test_the_hub_gets_what_train_left(files, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("opsd.training.api.push", lambda *what: pushed.append(what) or "address")
    made = trainer(files, tmp_path / "run", config={"steps": 1})
    with pytest.raises(UserError, match="name a repository"):
        made.push_to_hub()
    with pytest.raises(UserError, match="there is no"):
        made.push_to_hub("me/mine")
    made.train()
    assert made.push_to_hub("me/mine", private=False) == "address"
    assert pushed == [("me/mine", tmp_path / "run" / "model", False)]


@pytest.mark.parametrize(
    "given, config, said",
    [
        ({"model": 3}, {}, "model is of type int: it must be a model of transformers"),
        ({"rows": None}, {}, "data.source is missing"),
        ({"rows": "none.jsonl"}, {}, "there is no file or directory 'none.jsonl'"),
        ({"rows": []}, {}, "has no rows"),
        ({"rows": [{"question": "1+1?"}]}, {}, "data.columns"),
        (
            {"model": "other"},
            {"model": "m"},
            "model.path is 'm' in the config, and the trainer was",
        ),
        (
            {"reward_funcs": share_of_digits},
            {},
            "opsd grades no rollouts but for",
        ),
        ({"reward_funcs": ["m"]}, {}, "reward_funcs: 'm': it must be a function"),
        (
            {"reward_funcs": share_of_digits},
            {"verifier": "mine.py:f", "method": "grpo", "group_size": 2},
            "loss.reward.verifier is 'mine.py:f' in the config",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once(given, config, said, files, tmp_path):
    with pytest.raises(UserError, match=said):
        trainer(files, tmp_path / "run", config=config, **given)
    assert not (tmp_path / "run").exists()


def test_streams_and_models_without_tokenizers_are_refused(files, tmp_path):
    stream = datasets.Dataset.from_list(RECORDS).to_iterable_dataset()
    with pytest.raises(
        UserError, match=r"IterableDataset, perhaps without an end: say in data\.limit"
    ):
        trainer(files, tmp_path / "run", rows=stream)
    rows = {"rows": stream, "held_out": stream.take(3)}
    with pytest.raises(UserError, match=r"without an end: say in eval\.problems"):
        trainer(files, tmp_path / "run", **rows, config={"data_limit": 6})
    made = trainer(files, tmp_path / "run", **rows, config={"data_limit": 6, "eval_problems": 2})
    assert len(made._run.held_out) == 2 and len(made._run.rows) == 4
    model = AutoModelForCausalLM.from_pretrained(files[0])
    model.config.name_or_path = model.name_or_path = str(tmp_path)
    with pytest.raises(UserError, match=r"model\.path is .*: a directory without config.json"):
        trainer(files, tmp_path / "run", model=model)
    with pytest.raises(UserError, match=r"model\.path is missing"):
        train(OPSDConfig(data="rows.jsonl"), quiet())


HELD_OUT = RECORDS[:3]


@pytest.mark.parametrize(
    "held_out",
    [
        HELD_OUT,
        {name: [record[name] for record in HELD_OUT] for name in HELD_OUT[0]},
        datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_list(RECORDS),
                "test": datasets.Dataset.from_list(HELD_OUT),
            }
        ),
        datasets.Dataset.from_list(HELD_OUT).with_format("arrow"),
    ],
)
def test_all_rows_of_an_eval_dataset_are_held_out(held_out, files, tmp_path):
    """Columns in a dictionary and splits have a length too, which is no number of rows."""
    made = trainer(files, tmp_path / "run", held_out=held_out)
    assert made.args.eval.problems == len(made._run.held_out) == 3


def test_libraries_settings_are_made_before_torch_is_imported():
    code = (
        "import opsd.training, os, sys; assert 'torch' not in sys.modules;"
        "print(os.environ['GOMP_SPINCOUNT'], os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    )
    names = ("GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["3000", "48"], done.stderr


@pytest.mark.parametrize(
    "given, said",
    [
        ({"args": {"steps": 1}}, r"args is of type dict: .* as OPSDConfig\(\*\*args\)"),
        ({"args": "mine.yaml"}, r"load_config\('mine.yaml'\)"),
        ({"args": TrainingArguments("x")}, r"it must be an OPSDConfig, as OPSDConfig\(steps"),
        ({"tokenizer": None}, r"OPSDTrainer\(processing_class=…\)"),
        ({"dataset": RECORDS}, r"OPSDTrainer\(train_dataset=…\)"),
        ({"config": None}, r"OPSDTrainer\(args=…\)"),
        ({"reward_functions": ()}, r"OPSDTrainer\(reward_funcs=…\)"),
        ({"traindataset": RECORDS}, r"OPSDTrainer\(train_dataset=…\)"),
        ({"learning_rate": 1e-5}, r"it is a field of OPSDConfig, learning_rate"),
        ({"ref_model": None}, r"it is a field of OPSDConfig, teacher_policy"),
        ({"teacher_model": "m"}, r"OPSDConfig, teacher_path, with teacher.policy=model"),
        ({"compute_metrics": None}, r"held-out answers are graded"),
        ({"no_such": None}, r"help\(OPSDTrainer\) lists them"),
        ({"processing_class": "m"}, r"AutoTokenizer.from_pretrained makes it"),
        ({"reward_funcs": "accuracy"}, r"reward_funcs: 'accuracy': it must be a function"),
    ],
)
def test_what_users_of_other_trainers_hand_over(given, said):
    with pytest.raises(UserError, match=said):
        OPSDTrainer(**{"model": "m", "train_dataset": RECORDS, **given})


def test_train_takes_no_file():
    with pytest.raises(UserError, match=r"config is of type str: .* as load_config\('c.yaml'\)"):
        train("c.yaml")
