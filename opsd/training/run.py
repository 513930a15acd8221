"""`opsd train`: from a checked config to a trained model in a run directory."""

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.files import read_lines, write_json
from opsd.common.hub_upload import push
from opsd.common.precision import best_precision, compute_dtype, weights_dtype
from opsd.common.system import machine, peak_memory, release_memory, share_one_heap, versions
from opsd.config.config import Config
from opsd.config.requirements import (
    held_out_teacher_role,
    is_graded,
    longest_answer,
    scores_by_teacher,
)
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.distributed.deepspeed import STAGES
from opsd.distributed.processes import SPLIT_WEIGHTS, Processes
from opsd.distributed.wrap import gathered_weights
from opsd.grading.grader import Grader
from opsd.grading.rewards import RewardFunction, check_verifier, make_verifier
from opsd.models.copies import copy_model
from opsd.models.dropout import switch_off_dropout
from opsd.models.generation_config import left_out
from opsd.models.head import head
from opsd.models.load import load_model, stop_ids, told_stops, window
from opsd.models.lora import add_adapters, is_adapted, trainable, without_adapters
from opsd.models.moving_average import MovingAverage
from opsd.models.teacher import check_teacher, make_teacher
from opsd.objectives import make_objective
from opsd.prefix import try_kernel, unpackable, use_kernel
from opsd.report import write_report
from opsd.rollout import (
    SAMPLERS,
    DistributedSampler,
    GenerateSampler,
    Sampling,
    ServerError,
    check_engine,
    make_sampler,
    training_server,
)
from opsd.rollout.vllm_client import VLLMServer
from opsd.runs.directory import (
    NotWritten,
    check_problems,
    claim_directory,
    locked,
    settle,
    step_of,
)
from opsd.runs.log import RunLog
from opsd.training.checkpoints import (
    check_pieces,
    checkpoint_bytes,
    save_model,
    save_trained,
)
from opsd.training.held_out import Evaluation, HeldOut
from opsd.training.learning_curve import LearningCurve
from opsd.training.load_data import fitting_data, load_data, sources
from opsd.training.preflight import check_launcher, check_machine, try_saving
from opsd.training.rescue import keep_elsewhere
from opsd.training.trainer import OPSDTrainer

Reward = Callable[[str, str], float]


def train(
    config: Config,
    display: Display | None = None,
    *,
    resume: bool = False,
    start_over: bool = False,
) -> Path:
    """A whole run: data, model, training, evaluation, report. Returns the run's directory.

    display: where progress is shown; none: the terminal.
    resume: go on from its last checkpoint.
    start_over: with `resume`, begin again where there is no checkpoint.

    Raises UserError for what the user can put right.
    """
    display = display or Display()
    check_launcher(config.train.sharding, config.rollout.engine)
    use_kernel(config.train.prefix_kernel)
    processes, directory = Processes(), Path(config.output.dir)
    config = processes.once(lambda: settle(config, directory, best_precision()))
    try:
        with ExitStack() as stack:
            processes.together(lambda: check_machine(config, makes=processes.first))
            processes.once(lambda: stack.enter_context(locked(directory, note=display.note)))
            return _train(config, display, resume, start_over, processes)
    finally:
        processes.close()


def _train(
    config: Config, display: Display, resume: bool, start_over: bool, processes: Processes
) -> Path:
    directory = Path(config.output.dir)
    checkpoint = processes.once(lambda: claim_directory(directory, config, resume, start_over))
    if checkpoint is not None and config.train.sharding in STAGES:
        processes.once(lambda: check_pieces(checkpoint, processes.count))
    processes.together(lambda: check_engine(config.rollout.engine))
    server = None
    if config.rollout.engine == "vllm_server":
        with display.stage(f"Reach {config.rollout.server}"):  # it may still be starting
            server = processes.together(lambda: training_server(config.rollout))
    if is_graded(config):
        processes.together(lambda: check_verifier(config.loss.reward))
    with display.stage(f"Read {', '.join(source.source for source in sources(config.data))}"):
        rows, held_out = processes.together(lambda: load_data(config, display.note))
    problems = {"data.source": rows, "eval.source": held_out}
    processes.once(lambda: check_problems(directory, problems, checkpoint))
    teachers_tokens = processes.together(lambda: check_teacher(config.teacher, config.model))
    # FSDP2 brings to a GPU what is to be there.
    device = "cpu" if config.train.sharding == "fsdp2" else processes.device
    dtype = weights_dtype(config.train.precision, adapted=config.model.lora is not None)
    with display.stage(f"Load {config.model.path}"):
        model, tokenizer = processes.together(lambda: load_model(config.model, device, dtype=dtype))
    tokenizer.teachers_tokens = teachers_tokens
    torch.manual_seed(config.train.seed)
    with Grader(strict=config.loss.reward.strict) as grader:
        run(
            config,
            model,
            tokenizer,
            rows,
            held_out,
            grader,
            display,
            checkpoint=checkpoint,
            server=server,
            processes=processes,
        )
    if processes.first:
        write_report(directory)
        publish(config, directory, display)
    processes.wait()
    return directory


def run(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    grader: Grader,  # decides which held-out answers, and GRPO's rollouts, are right
    display: Display,
    *,
    checkpoint: Path | None = None,
    # The evaluations of step 0, by role, where they are known already
    before: dict[str, Evaluation] | None = None,
    # (completion, answer) → score of a rollout, instead of loss.reward's verifier
    reward: Reward | None = None,
    save: bool = True,  # whether to write the trained model to model/
    server: VLLMServer | None = None,  # who samples under rollout.engine vllm_server
    processes: Processes | None = None,  # those that train together; none: this one alone
) -> dict:
    """Train `model` in place by `config.method`, in the claimed directory `config.output.dir`.

    Returns the run's summary, which is also written to summary.json.
    """
    share_one_heap()
    begun = time.monotonic()
    processes = processes or Processes()
    directory = Path(config.output.dir)
    prompts = Prompts(config.prompts, tokenizer)
    base = _own_base(config, model, directory)
    if config.model.lora is not None:
        model = add_adapters(model, config.model, base)
        display.note(f"Adapters: {trainable(model):.2%} of the parameters train")
    rows, held_out = fitting_data(config, rows, held_out, prompts, window(model.config), display)
    if save or config.train.save_every:
        processes.once(lambda: try_saving(config, model, tokenizer, base is not None))
    if base is not None and processes.first and (checkpoint is None or not base.exists()):
        save_model(without_adapters(model), tokenizer, directory, base.name)
    models = _make_models(config, model, tokenizer, bool(held_out), processes)
    sampler = _make_sampler(config, models, prompts, [*rows, *held_out], server, processes)
    _say_what_is_shipped(model, tokenizer, display)
    checkpoint_activations(model, config.train.gradient_checkpointing)
    log = open_log(directory, checkpoint, processes)
    if log.dropped:
        display.note(f"{log.dropped} steps were not saved: they, and their lines, are made again")
    curve = None
    if held_out:
        curve = _learning_curve(
            config, models, prompts, held_out, grader, sampler, log, display, processes
        )
        if checkpoint is None:
            curve.begin(before)

    objective = make_objective(
        config.method, config.loss, models.scorer, prompts, Sampling.of(config.rollout)
    )
    with display.stage(f"Train by {config.method.upper()}", total=config.train.steps) as stage:
        trainer = OPSDTrainer(
            config,
            model,
            rows,
            prompts,
            objective,
            sampler,
            log,
            evaluate=curve,
            on_step=lambda line: stage.update(completed=line["step"], **shown(line)),
            note=display.note,
            average=models.average,
            teacher_sampler=_teacher_sampler(models, tokenizer),
            processes=processes,
            reward_function=_make_reward_function(config, prompts, grader, reward),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
    step = trainer.state.global_step
    weights = None
    if models.split and save:
        weights = gathered_weights(trainer.accelerator, trainer.wrapped, models.inference)
    del trainer  # and with it the optimizer's moments
    model.zero_grad(set_to_none=True)
    release_memory()
    if save and processes.first:
        _save(config, model, tokenizer, weights, log)
    if curve is not None and not processes.once(lambda: log.is_evaluated(step)):
        _evaluate_last(curve, step, directory, log)
    seconds = time.monotonic() - begun
    return processes.once(lambda: write_summary(config, log, directory, seconds))


def _own_base(config: Config, model: PreTrainedModel, directory: Path) -> Path | None:
    """Where the run keeps the model that its adapters stand on: None, unless model.path is itself
    an adapter. peft and transformers load no adapter on an adapter: of two they drop one."""
    if config.model.lora is None or not getattr(model, "has_merged_adapters", False):
        return None
    if config.output.push_to_hub is not None and not config.output.merge:
        raise UserError(
            f"output.push_to_hub is {config.output.push_to_hub!r}: model.path is "
            f"{config.model.path!r}, an adapter, so that the new one stands on a model which the "
            "hub has not; set output.merge: true"
        )
    return directory / "base"


def _save(config: Config, model, tokenizer, weights: dict | None, log: RunLog) -> None:
    """The trained model, in the run's directory or, where that cannot be written, elsewhere."""

    def write(directory: Path) -> None:
        save_trained(model, tokenizer, directory, config.output, weights, config.model)

    try:
        write(Path(config.output.dir))
    except NotWritten as error:
        place = keep_elsewhere(config, log, checkpoint_bytes(model), write)
        if place is None:
            raise
        move = shlex.join(["mv", str(place / "model"), config.output.dir])
        raise UserError(f"{error.what}. It is kept in {place}; when it fits, `{move}`") from error


@dataclass(frozen=True)
class Models:
    """A run's models."""

    student: PreTrainedModel  # what trains
    # The student's weights as sampling and evaluation read them: a copy, or itself.
    inference: PreTrainedModel
    teacher: PreTrainedModel  # whose view of sample completions is shown
    scorer: PreTrainedModel  # what the objective asks
    average: MovingAverage | None  # an `ema` teacher that training moves
    split: bool  # the student's weights are split over processes, the inference copy's are not


def _make_models(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluates: bool,
    processes: Processes,
) -> Models:
    """Copies and teacher. They are made before a checkpoint is loaded: of the weights of step 0."""
    dtype = compute_dtype(config.train.precision)
    if config.method != "sft":
        switch_off_dropout(model)
    if config.train.share_prefixes and unpackable(model) is None:
        try_kernel(model, dtype, processes.device)  # which may be an error, before an evaluation
    split = config.train.sharding in SPLIT_WEIGHTS
    inference = model
    if split or needs_inference_copy(config, evaluates):
        inference = copy_model(model, dtype, processes.device)
    # Without OPSD, a teacher is only asked for its view of the sample completions.
    scores = scores_by_teacher(config)
    teacher, average = inference, None
    if scores or (evaluates and config.eval.samples):
        teacher, average = make_teacher(
            config.teacher, config.model, dtype, model, tokenizer, inference
        )
    # A live teacher is the model itself, so that both roles' common start runs once.
    scorer = model if config.teacher.policy == "live" else teacher
    return Models(model, inference, teacher, scorer, average if scores else None, split)


def _make_sampler(
    config: Config,
    models: Models,
    prompts: Prompts,
    rows: Sequence[Row],
    server: VLLMServer | None,
    processes: Processes,
) -> DistributedSampler:
    """Who samples rollouts and held-out answers with the student's weights."""
    longest = None
    if config.rollout.engine == "vllm":
        contexts = max(prompts.lengths(rows, "student"), default=0)
        longest = contexts + max(config.rollout.max_new_tokens, longest_answer(config))
    stops = stop_ids(models.student, prompts.tokenizer)
    dtype = compute_dtype(config.train.precision)
    sampler = make_sampler(
        config.rollout,
        config.model,
        models.inference,
        stops,
        dtype,
        server,
        Path(config.output.dir),
        longest,
    )
    return DistributedSampler(sampler, processes, models.inference if models.split else None)


def _say_what_is_shipped(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, display: Display
) -> None:
    """What ends a rollout, and what the model's generation config says in vain."""
    display.note(told_stops(tokenizer, stop_ids(model, tokenizer)))
    if (unused := left_out(model)) is not None:
        display.note(unused)


def _teacher_sampler(models: Models, tokenizer: PreTrainedTokenizerBase) -> GenerateSampler:
    """Who samples from the teacher, for rollout.source teacher."""
    stops = stop_ids(models.student, tokenizer)
    return GenerateSampler(models.teacher, stops, len(head(models.student)[0]))


def _make_reward_function(
    config: Config, prompts: Prompts, grader: Grader, reward: Reward | None
) -> RewardFunction | None:
    """Who grades rollouts, where the method or the log needs it."""
    if not is_graded(config):
        return None
    verifier = make_verifier(config.loss.reward, grader, reward)
    return RewardFunction(
        config.loss.reward,
        prompts.tokenizer,
        verifier,
        config.rollout.max_new_tokens,
        prompts.chats["student"].opens_thought,
    )


def _learning_curve(
    config: Config,
    models: Models,
    prompts: Prompts,
    held_out: Sequence[Row],
    grader: Grader,
    sampler: DistributedSampler,
    log: RunLog,
    display: Display,
    processes: Processes,
) -> LearningCurve:
    """The held-out evaluations of a run."""
    greedy = Sampling(longest_answer(config), temperature=0, batch_size=config.eval.batch_size)
    engine = config.rollout.engine if config.rollout.engine in SAMPLERS else "generate"
    return LearningCurve(
        config.method,
        config.eval,
        HeldOut(held_out, prompts, grader, greedy, engine, processes),
        models.student,
        sampler,
        models.inference,
        models.teacher,
        held_out_teacher_role(config),
        log,
        display,
    )


def _evaluate_last(curve: LearningCurve, step: int, directory: Path, log: RunLog) -> None:
    """The trained model, which is saved already."""
    try:
        curve(step)
        log.check()
    except (ServerError, NotWritten) as error:
        raise type(error)(
            f"{error}. Training is done and {directory / 'model'} is saved, but its last "
            "evaluation is missing: measure it with `opsd eval`"
        ) from error


def open_log(directory: Path, checkpoint: Path | None, processes: Processes) -> RunLog:
    """The log of a run that begins or goes on; the first process writes it."""
    step = step_of(checkpoint)
    if processes.first:
        (directory / "summary.json").unlink(missing_ok=True)  # which says that a run has ended
        log = RunLog(directory, step)
    processes.wait()  # for the lines that the first drops
    return log if processes.first else RunLog(directory, step, writes=False)


def needs_inference_copy(config: Config, evaluates: bool) -> bool:
    """Whether a bf16 copy of the model samples, in training in bf16: to cast the masters for each
    new token would cost as much as the token. Beside adapters the weights are in bf16 already."""
    samples = config.rollout.engine in SAMPLERS and (config.method != "sft" or evaluates)
    bf16 = compute_dtype(config.train.precision) == torch.bfloat16
    return samples and bf16 and config.model.lora is None


def checkpoint_activations(model: PreTrainedModel, kind: bool | Literal["reentrant"]) -> None:
    """Switch gradient checkpointing on, as train.gradient_checkpointing has it."""
    if not kind:
        return
    model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    if kind == "reentrant" and is_adapted(model):
        # This form finds no gradient to compute where its inputs need none, as beside a frozen
        # embedding.
        model.enable_input_require_grads()


def publish(config: Config, directory: Path, display: Display) -> None:
    """Upload model/, where output.push_to_hub says so; a failure is told, for all is saved."""
    repository = config.output.push_to_hub
    if repository is None:
        return
    try:
        with display.stage(f"Upload to {repository}"):
            address = push(repository, directory / "model", config.output.hub_private)
    except Exception as error:  # of whatever client it uses
        place = directory / "model"
        command = f"hf upload {repository} {place}"
        display.note(f"The upload failed ({error}); all is in {place}: {command}")
        return
    display.note(f"Uploaded: {address}")


def shown(line: dict) -> dict:
    """What the progress bar shows of a step."""
    names = ("loss", "divergence", "reward", "tokens_per_second")
    return {name: line[name] for name in names if line.get(name) is not None}


def write_summary(config: Config, log: RunLog, directory: Path, seconds: float) -> dict:
    """summary.json of a run."""
    evaluations = [
        line for line in read_lines(directory / "evaluations.jsonl") if line["role"] == "student"
    ]
    summary = {
        "method": config.method,
        "model": config.model.path,
        "accuracy": {
            "before": evaluations[0]["accuracy"] if evaluations else None,
            "after": evaluations[-1]["accuracy"] if evaluations else None,
        },
        "generated_tokens": log.counters.generated_tokens,
        "trained_tokens": log.counters.trained_tokens,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "machine": machine(),
    }
    write_json(directory / "summary.json", summary)
    return summary
