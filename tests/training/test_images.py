"""Runs on rows with images: each method, resumed bit for bit, saved, and measured."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.image_models import (
    make_tokenizer,
    picture,
    write_image_model,
    write_image_rows,
)
from helpers.lines import read_lines
from helpers.training_cases import ROWS, quiet, short_config
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.config.load import save_config
from opsd.data.images import read_images
from opsd.evaluate.subject import Subject
from opsd.models.images import ImageReader
from opsd.models.load import load_model
from opsd.objectives.groups import Sample, SampleGroup
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import GenerateSampler, Sampling
from opsd.training.failed_steps import failed_step, read_failed_step, save_failed_step
from opsd.training.run import train

IMAGES = "{{ images }}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows with none, one and two images, and a model whose predictions are far from uniform."""
    directory = tmp_path_factory.mktemp("images")
    model = write_image_model(directory / "model")
    images = [
        [picture(20 + 8 * n, 16, n)] * (n % 4 != 3) + [picture(12, 12, 99)] * (n % 3 == 0)
        for n in range(len(ROWS))
    ]
    rows = write_image_rows(directory, [dict(row.columns) for row in ROWS], images)
    return model, rows


def config_of(files, output, /, **sections):
    prompts = {"student": IMAGES + tiny.STUDENT_PROMPT, "teacher": IMAGES + tiny.TEACHER_PROMPT}
    sections.setdefault("rollout", {"group_size": 3})
    data = {"columns": {"images": "pictures"}}
    return short_config(*files, output, data=data, **{"prompts": prompts, **sections})


def weights(directory):
    return load_file(directory / "model.safetensors")


def figures(directory):
    names = ("loss", "divergence", "grad_norm", "rollout_length", "sharing_difference")
    return [{n: line.get(n) for n in names} for line in read_lines(directory / "metrics.jsonl")]


def test_a_run_is_resumed_bit_for_bit_and_its_model_is_whole(files, tmp_path):
    train(config_of(files, tmp_path / "run"), quiet())
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["sharing_difference"] < 1e-5 and lines[0]["token_ratio"] > 1.5
    again = config_of(files, tmp_path / "again", train={"steps": 2})
    train(again, quiet())
    train(config_of(files, tmp_path / "again"), quiet(), resume=True)
    one, two = (tmp_path / name / "model" for name in ("run", "again"))
    before, first, second = map(weights, (files[0], one, two))
    assert first.keys() == second.keys() == before.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    without_check = [{**line, "sharing_difference": 0} for line in figures(tmp_path / "run")]
    assert without_check == [
        {**line, "sharing_difference": 0} for line in figures(tmp_path / "again")
    ]
    changed = {name for name in first if not torch.equal(first[name], before[name])}
    assert changed and not any("visual" in name for name in changed)
    # As plain transformers reads it.
    _, told = AutoModelForImageTextToText.from_pretrained(one, output_loading_info=True)
    assert not any(told.values())
    assert AutoTokenizer.from_pretrained(one).chat_template == make_tokenizer().chat_template
    mine, its = (AutoImageProcessor.from_pretrained(place) for place in (one, files[0]))
    assert mine.to_dict() == its.to_dict()
    for place in ("model", "checkpoint-4"):
        file = tmp_path / "run" / place / "preprocessor_config.json"
        assert file.read_bytes() == (files[0] / file.name).read_bytes()


@pytest.mark.parametrize(
    "sections",
    [
        {"teacher": {"policy": "live"}},
        {"teacher": {"policy": "ema"}},
        {"method": "sft", "loss": {"roles": ["student", "teacher"]}},
        {"method": "grpo", "loss": {"kl": 0.1, "distil": 0.5}},
        {"model": {"lora": {"rank": 2}}, "output": {"merge": True}},
        {"train": {"micro_batch_tokens": 90}},
        {"train": {"precision": "bf16", "gradient_checkpointing": True}},
    ],
    ids=str,
)
def test_what_trains_on_images(sections, files, tmp_path):
    steps = {"steps": 2, "save_every": 0, **sections.get("train", {})}
    more = {"eval": {"problems": 2, "every": 2, "samples": 1}, **sections, "train": steps}
    train(config_of(files, tmp_path / "run", **more), quiet())
    first = figures(tmp_path / "run")[0]
    assert first["sharing_difference"] < 1e-5 and first["grad_norm"] > 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")
    assert model.config.model_type == "qwen3_vl"


def test_sharing_changes_no_step_but_by_rounding(files, tmp_path):
    """Of equal seeds, and so of the same rollouts."""
    for share in (True, False):
        steps = {"steps": 2, "save_every": 0, "share_prefixes": share}
        config = config_of(files, tmp_path / str(share), train=steps, eval={"problems": 0})
        train(config, quiet())
    shared, alone = (figures(tmp_path / str(share)) for share in (True, False))
    for one, other in zip(shared, alone, strict=True):
        assert one["rollout_length"] == other["rollout_length"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-4)


def test_another_model_teaches_by_the_same_images(files, tmp_path):
    teacher = {"policy": "model", "path": str(files[0])}
    more = {"method": "distill", "teacher": teacher, "eval": {"problems": 0}}
    config = config_of(files, tmp_path / "run", train={"steps": 1, "save_every": 0}, **more)
    train(config, quiet())
    assert figures(tmp_path / "run")[0]["divergence"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("field", ["patch_size", "temporal_patch_size", "spatial_merge_size"])
def test_a_teacher_that_takes_other_images_is_refused(field, files):
    section = config_of(files, files[0]).model
    config = AutoConfig.from_pretrained(files[0])
    reader = ImageReader(section, AutoConfig.from_pretrained(files[0]), make_tokenizer())
    reader.check_teacher(config, "other")
    setattr(config.vision_config, field, 7)
    said = rf"teacher.path is 'other': .* \(qwen3_vl, {field} 7 and not \d\)"
    with pytest.raises(UserError, match=said):
        reader.check_teacher(config, "other")
    with pytest.raises(UserError, match=r"takes other images than the student \(qwen3,"):
        reader.check_teacher(AutoConfig.for_model("qwen3"), "other")


@pytest.fixture(scope="module")
def model_and_contexts(files):
    model, tokenizer = load_model(config_of(files, files[0]).model)
    reader = ImageReader(config_of(files, files[0]).model, model.config, tokenizer)
    one = "<|vision_start|><|image_pad|><|vision_end|>"
    encoded = read_images([picture(40, 20, 1), picture(16, 16, 2), picture(24, 40, 3)], None)
    contexts = [
        reader.context(f"<|user|>{one}1+2=<|end|><|assistant|>", encoded[:1]),
        [3, 9, 8, 7, 1, 4],
        reader.context(f"<|user|>{one}{one}3-4=<|end|><|assistant|>", encoded[1:]),
    ]
    with torch.no_grad():  # so that what it writes depends on what it sees
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model, tokenizer, reader, contexts


def test_rollouts_are_those_of_transformers_for_each_context_alone(model_and_contexts):
    model, tokenizer, reader, contexts = model_and_contexts
    calls = []
    hook = model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    sampler = GenerateSampler(model, frozenset([tokenizer.eos_token_id]))
    asked = [contexts[n] for n in (0, 1, 2, 0, 2)]
    greedy = Sampling(12, temperature=0.0)
    rollouts = [rollout.ids for rollout in sampler.sample(asked, greedy)]
    hook.remove()
    assert len(calls) == 1  # for the whole batch
    for context, rollout in zip(asked, rollouts, strict=True):
        ids = torch.tensor([list(context)])
        more = context.inputs() if context is not contexts[1] else {}
        wanted = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=[reader.token_id],
            **more,
        )[0, ids.shape[1] :].tolist()
        assert rollout == wanted[: len(rollout)]
    blind = [rollout.ids for rollout in sampler.sample([list(contexts[0])], greedy)]
    assert blind[0] != rollouts[0]  # the images decide


def test_no_rollout_draws_the_token_of_an_image(model_and_contexts):
    model, _, reader, contexts = model_and_contexts
    sampler = GenerateSampler(model, frozenset([1]))
    torch.manual_seed(0)
    hot = Sampling(100, temperature=100.0)
    drawn = [token for r in sampler.sample(contexts[:1] * 4, hot) for token in r.ids]
    assert len(drawn) > 40 and reader.token_id not in drawn


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rollout": {"engine": "continuous"}}, "rollout.engine is 'continuous': of rows with"),
        ({"teacher": {"policy": "model", "path": "http://localhost:1"}}, "teacher.path is 'http"),
        ({"teacher": {"quantize": "int8"}}, "teacher.quantize is 'int8': it is not tried"),
        ({"teacher": {"offload": True}}, "teacher.offload is true: it is not tried"),
        ({"train": {"sharding": "zero2"}}, "train.sharding is 'zero2': rows with images"),
        ({"model": {"lora": {"quantize": "nf4"}}}, "model.lora.quantize is 'nf4': it is not tried"),
        ({"loss": {"router_aux": 0.1}}, "loss.router_aux is 0.1: it is not tried"),
        ({"model": {"gguf_file": "a.gguf"}}, "model.gguf_file is 'a.gguf': it has no processor"),
    ],
)
def test_what_does_not_go_with_images_is_refused_by_the_config(sections, said, files, tmp_path):
    with pytest.raises(UserError) as told:
        config_of(files, tmp_path, **sections)
    assert said in str(told.value)


def test_several_processes_are_refused(files, tmp_path, monkeypatch):
    from opsd.training.preflight import check_machine

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"data.columns is .*: rows with images train in one"):
        check_machine(config_of(files, tmp_path), makes=False)


def test_a_failed_step_says_that_it_holds_no_images(files, model_and_contexts, tmp_path):
    model, _, _, contexts = model_and_contexts
    group = SampleGroup(contexts[0], [Sample([4, 5], 1.0)], [contexts[2]])
    failed = failed_step(config_of(files, tmp_path), 3, [group], model, None)
    path = save_failed_step(tmp_path, failed)
    with pytest.raises(UserError, match="its rows have images, which it does not hold"):
        read_failed_step(path)
    plain = SampleGroup([1, 2], [Sample([4, 5], 1.0)], [[3]])
    failed = failed_step(config_of(files, tmp_path), 3, [plain], model, None)
    (group,) = read_failed_step(save_failed_step(tmp_path, failed)).groups
    assert group.student == [1, 2]


def test_another_processor_makes_another_model_of_an_evaluation(files, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(files[0], place)
    before = Subject(str(place)).digest
    settings = json.loads((place / "preprocessor_config.json").read_text())
    (place / "preprocessor_config.json").write_text(
        json.dumps(settings | {"image_mean": [0.1] * 3})
    )
    assert Subject(str(place)).digest != before


def opsd(capsys, *words):
    code = main([str(word) for word in words])
    return code, capsys.readouterr()


def test_the_commands(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(files, Path("run"), train={"steps": 1, "save_every": 0})
    save_config(config, Path("run.yaml"))
    code, said = opsd(capsys, "train", "run.yaml", "--dry-run")
    assert code == 0 and said.out.count("<|image_pad|>") + said.err.count("<|image_pad|>") >= 16
    assert opsd(capsys, "train", "run.yaml")[0] == 0
    benchmark = ["eval", "run/model", "--benchmark", files[1], "--problems", 3]
    columns = ["--columns", "images=pictures", "--prompt", IMAGES + tiny.STUDENT_PROMPT]
    few = ["--max-new-tokens", 4, "--output"]
    assert opsd(capsys, *benchmark, *columns, *few, "seen")[0] == 0
    answers = read_lines(Path("seen/answers.jsonl"))
    assert len(answers) == 3 and all(answer["tokens"] == 4 for answer in answers)
    assert opsd(capsys, "eval", "run", *few, "held-out")[0] == 0
    code, said = opsd(capsys, *benchmark, *columns, "--engine", "continuous")
    assert code != 0 and "--engine is 'continuous': only 'generate' samples from images" in said.err
