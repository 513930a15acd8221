"""What another trainer's names are called here: each has an answer, which can be typed as it is."""

import dataclasses
import re
from pathlib import Path

import peft
import pytest
import transformers
import trl
from trl.experimental.gkd import GKDConfig
from trl.experimental.online_dpo import OnlineDPOConfig
from trl.experimental.sdft import SDFTConfig
from trl.experimental.sdpo import SDPOConfig

from opsd.common.errors import UserError
from opsd.config.config import Config
from opsd.config.foreign import ELSEWHERE, NOWHERE, OPEN, VAGUE, answer, fields_of, here, reason
from opsd.config.load import merge, parse_config, with_overrides

ROOT = Path(__file__).parents[2]
GOOD = {"model": {"path": "m"}, "data": {"source": "d.jsonl"}}
THEIRS = [
    transformers.TrainingArguments,
    trl.ModelConfig,
    trl.ScriptArguments,
    trl.SFTConfig,
    trl.GRPOConfig,
    trl.DPOConfig,
    GKDConfig,
    OnlineDPOConfig,
    SDFTConfig,
    SDPOConfig,
    peft.LoraConfig,
]
KNOWN = {*fields_of(Config), "model.lora"}


def can_be_typed(said: str) -> None:
    """Each `field=value` of an answer is a value that the field takes."""
    for field, value in re.findall(r"\b([a-z]+(?:\.\w+)+)=((?:\{.*?\}|\[.*?\]|[^\s,)`])+)", said):
        assert field in KNOWN or field.startswith(OPEN), said
        try:
            parse_config(merge(GOOD, with_overrides({}, [f"{field}={value}"])))
        except UserError as error:  # what does not go together is said elsewhere
            assert not re.search(rf"unknown key|{field} is .*: input|valid", str(error)), error


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda kind: kind.__name__)
def test_each_field_of_another_trainer_has_an_answer(theirs):
    fields = {field.name: field.default for field in dataclasses.fields(theirs)}
    unknown = []
    for name, default in fields.items():
        value = 1 if default in (None, dataclasses.MISSING) else default
        value = value if isinstance(value, bool | int | float | str) else str(value)
        said = answer(name, value, Config)
        can_be_typed(said)
        if not said and name not in KNOWN:
            unknown.append(name)
    few = {"auto_mapping", "runtime_config", "arrow_config", "model_adapter_name"}
    few |= {"use_transformers_paged", "transformers_continuous_batching_config"}
    assert not {*unknown} - few, unknown


def test_a_name_from_elsewhere_is_told_ours():
    for theirs, ours in [pair for pair in ELSEWHERE.items() if "." in pair[1]]:
        fields = ours.partition(", ")[0].partition(":")[0].split(" or ")
        for field in fields:
            assert field in KNOWN or field == "data.columns" or field.startswith(OPEN), theirs
        for value in (1, "text"):
            said = answer(theirs, value, Config)
            assert said.startswith(tuple(f"here it is {field}" for field in fields)), theirs
            can_be_typed(said)


OURS = [field for field in fields_of(Config) if field.count(".") and field.split(".")[1] != "mix"]
SHARED = {"batch_size": "train.problems_per_step", "beta": "loss.kl", "dtype": "train.precision"}
SHARED |= {"quantize": "model.lora.quantize", "path": "model.path", "source": "data.source"}
SHARED |= {"teacher": "eval.teacher", "student": "model.path", "rollout_batch_size": "train.prob"}
"""Names that mean another field of ours where no section tells."""


@pytest.mark.parametrize("field", OURS)
def test_our_own_field_is_told_in_a_section_that_is_none(field):
    *sections, last = field.split(".")
    said = answer(f"twice.{last}", 1, Config)
    assert field in said or SHARED.get(last, "none") in said or last in VAGUE or "routes" in field
    for start in range(len(sections)):
        tail = field.split(".")[start:]
        for name in (".".join(tail), "_".join(tail)):
            said = answer(f"twice.{name}", 1, Config)
            assert field in said or SHARED.get(name, "none") in said, said


def test_no_name_is_both_here_and_nowhere():
    assert not {*ELSEWHERE} & {*NOWHERE} and not {*NOWHERE} & {*fields_of(Config)}


@pytest.mark.parametrize("off", [False, None, "false", "none", ""])
def test_what_is_off_elsewhere_is_not_switched_on_here(off):
    for name in ("use_vllm", "load_in_4bit", "use_peft", "fsdp", "seq_kd", "use_wandb"):
        assert answer(name, off, Config) == "leave it out: that is off"
    for name in ("push_to_hub", "mask_truncated_completions", "use_kl_loss"):
        assert answer(name, False, Config) == "leave it out: that is off"


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("use_vllm", True, "here it is rollout.engine=vllm"),
        ("bf16", False, "here it is train.precision=fp32"),
        ("teacher_update_rate", 0.05, "here it is teacher.ema_decay=0.95"),
        ("report_to", "wandb", "here it is output.report_to=wandb"),
        ("trainer.logger", ["console", "wandb"], 'here it is output.report_to=["wandb"]'),
        ("lora_target_modules", "q_proj,v_proj", "here it is model.lora.targets=[q_proj,v_proj]"),
        ("lora_target", "all", "here it is model.lora.targets=all-linear"),
        ("finetuning_type", "full", "leave it out: all weights train without model.lora"),
        ("adapter", "qlora", "here it is model.lora={quantize: nf4}"),
        ("prompt_key", "question", "here it is data.columns.problem=question"),
        ("no_thinking", True, "here it is prompts.student_chat.enable_thinking=false"),
        ("dataset_config", "main", "here it is data.options.name=main"),
        ("optim.optimizer", "AdamW", "here it is train.optimizer=adamw_torch_fused"),
        ("zero_stage", 3, "here it is train.sharding=zero3"),
        ("rollout.top_k", -1, "here it is rollout.top_k=0"),
        ("rollout-max-response-len", 512, "here it is rollout.max_new_tokens=512"),
        (
            "a.ref.fsdp_config.param_offload",
            True,
            "here it is teacher.offload=true",
        ),
        ("actor_rollout_ref.rollout.temperature", 0.7, "here it is rollout.temperature=0.7"),
        ("ref.model_name_or_path", "m", "here it is teacher.path=m teacher.policy=model"),
        ("beta", 0.04, "here it is loss.kl (GRPO's; GKD's is loss.divergence, with loss.beta)"),
        ("num_generation", 4, "here it is rollout.group_size=4"),  # a slip in another's name
        ("lerning_rate", 1e-5, "here it is train.learning_rate=1e-05"),
        ("path", "m", "here it is model.path=m or teacher.path=m"),
        ("twice.student", "Solve {{ problem }}", "here it is prompts.student=Solve {{ problem }}"),
        ("twice.student", "Qwen/Qwen3-8B", "here it is model.path=Qwen/Qwen3-8B"),
        ("train.backend", "triton", "here it is loss.backend=triton"),
        ("train.backend", "vllm", "here it is rollout.engine=vllm"),
        ("train.eval_every", 10, "here it is eval.every=10"),
        ("reward.strict", False, "here it is loss.reward.strict=false"),
        ("reward.verifier", "mine.py:f", "here it is loss.reward.verifier=mine.py:f"),
        ("train.lora_targets", "all", "here it is model.lora.targets=all-linear"),
        ("train.freeze_router", True, "here it is model.freeze_router=true"),
        ("output.path", "runs/x", "here it is output.dir=runs/x"),
        ("validation.dataset_name", "aime", "here it is eval.source=aime"),
        (
            "total_max_epochs",
            2,
            "here it is train.steps (in steps: an epoch has rows ÷ "
            "train.problems_per_step of them)",
        ),
        ("max_samples_total", 5, ""),  # of rows or of rollouts: max_samples and n_samples differ
        ("twice.mix.damping", 2, "here it is teacher.mix.damping"),  # of a list: it has no value
        ("system_prompt", "Be brief.", "here it is prompts.system=Be brief."),
        ("system_prompt", "Be\nbrief.", "here it is prompts.system"),  # an error is one line
        ("system_prompt", "Be brief." * 99, "here it is prompts.system"),
        ("critic.optim.lr", 1e-5, "leave it out: methods here have no critic"),
        ("vllm_max_num_seqs", 8, "it is a flag of `vllm serve`"),
        (
            "algo.kl.target",
            6,
            "leave it out: GRPO's loss has loss.epsilon, loss.epsilon_high and loss.kl",
        ),
    ],
)
def test_the_value_comes_along(name, value, said):
    assert answer(name, value, Config) == said


@pytest.mark.parametrize("name", ["frobnicate", "algo.target", "length", "rollout_is", "stridex"])
def test_a_name_of_nobodys_gets_no_answer(name):
    assert answer(name, 1, Config) == ""


def test_each_name_of_a_foreign_section_is_told():
    with pytest.raises(UserError) as raised:
        parse_config({**GOOD, "trainer": {"save_freq": 5, "project_name": "x", "nnodes": 2}})
    for said in ("train.save_every=5", "output.project=x", "--nnodes 2"):
        assert said in str(raised.value)


def test_names_of_a_foreign_section_without_an_answer_are_told_too():
    with pytest.raises(UserError) as raised:
        parse_config({**GOOD, "trainer": {"total_epochs": 3, "steps": 5, "frobs": 2}})
    for said in ("'trainer.total_epochs': here", "here it is train.steps", "key 'trainer.frobs'"):
        assert said in str(raised.value)


def test_each_name_on_the_page_from_trl_has_an_answer():
    page = (ROOT / "docs" / "from-trl.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    theirs = {name for row in rows for name in re.findall(r"`([a-z]\w+)[`:]", row)}
    values = {"live", "ema", "none", "grpo", "dr_grpo"}  # of the name before them
    assert "num_loss_tokens_to_skip" in theirs and len(theirs) > 80
    assert not {n for n in theirs - values if not here(n, Config) and not reason(n)}
