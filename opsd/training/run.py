"""`opsd train`: from a checked config to a trained model in a run directory."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.common.display import Display
from opsd.common.files import read_lines, write_json
from opsd.common.hub_upload import push
from opsd.common.system import machine, peak_memory, release_memory, share_one_heap, versions
from opsd.config.config import Config
from opsd.config.requirements import is_graded, scores_by_teacher
from opsd.data.length_filter import (
    different_endings,
    fitting_held_out,
    fitting_rows,
    longest_answer,
    longest_sequence,
    shown_role,
)
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.distributed.deepspeed import STAGES
from opsd.distributed.processes import SPLIT_WEIGHTS, Processes
from opsd.grading.grader import Grader
from opsd.grading.rewards import Judge, check_verifier, make_verifier
from opsd.models.copies import copy_model
from opsd.models.head import head
from opsd.models.load import load_model, stop_ids, window
from opsd.models.lora import add_adapters, trainable
from opsd.models.teacher import check_teacher, make_teacher
from opsd.objectives.make import make_objective
from opsd.prefix import try_kernel, unpackable, use_kernel
from opsd.report import write_report
from opsd.rollout import (
    SAMPLERS,
    DistributedSampler,
    GenerateSampler,
    Sampling,
    ServerGoneError,
    check_engine,
    make_sampler,
    training_server,
)
from opsd.rollout.vllm_client import VLLMServer
from opsd.runs.directory import check_problems, claim_directory, held
from opsd.runs.log import RunLog
from opsd.training.checkpoints import check_pieces, save_trained
from opsd.training.held_out import Evaluation, Grades, HeldOut
from opsd.training.learning_curve import LearningCurve
from opsd.training.load_data import load_data
from opsd.training.preflight import check_disk_space, check_launcher, check_machine
from opsd.training.trainer import OPSDTrainer

Reward = Callable[[str, str], float]


def train(config: Config, display: Display, *, resume: bool = False) -> Path:
    """A whole run: data, model, training, evaluation, report. Returns the run's directory.

    resume: go on from its last checkpoint. What is shown goes to `display`. Raises UserError for
    what the user can put right.
    """
    check_launcher(config)
    use_kernel(config.train.prefix_kernel)
    processes, directory = Processes(), Path(config.output.dir)
    try:
        with ExitStack() as stack:
            processes.together(lambda: check_machine(config))
            processes.once(lambda: stack.enter_context(held(directory)))
            return _train(config, display, resume, processes)
    finally:
        processes.close()


def _train(config: Config, display: Display, resume: bool, processes: Processes) -> Path:
    directory = Path(config.output.dir)
    checkpoint = processes.once(lambda: claim_directory(directory, config, resume))
    if checkpoint is not None and config.train.sharding in STAGES:
        processes.once(lambda: check_pieces(checkpoint, processes.count))
    processes.together(lambda: check_engine(config.rollout.engine))
    server = None
    if config.rollout.engine == "vllm_server":
        with display.stage(f"Reach {config.rollout.server}"):  # it may still be starting
            server = processes.together(lambda: training_server(config))
    if is_graded(config):
        processes.together(lambda: check_verifier(config.loss.reward))
    rows, held_out = processes.together(lambda: load_data(config))
    problems = {"data.source": rows, "eval.source": held_out}
    processes.once(lambda: check_problems(directory, problems, checkpoint))
    processes.together(lambda: check_teacher(config))
    # FSDP2 brings to a GPU what is to be there.
    device = "cpu" if config.train.sharding == "fsdp2" else processes.device
    dtype = weights_dtype(config)
    with display.stage(f"Load {config.model.path}"):
        model, tokenizer = processes.together(lambda: load_model(config.model, device, dtype=dtype))
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


def weights_dtype(config: Config) -> torch.dtype:
    """What the model is loaded in: fp32 where it trains, what the step computes in where adapters
    do."""
    low = config.model.lora is not None and config.train.precision == "bf16"
    return torch.bfloat16 if low else torch.float32


def run(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    grader: Grades,
    display: Display,
    *,
    checkpoint: Path | None = None,
    before: dict[str, Evaluation] | None = None,
    reward: Reward | None = None,
    save: bool = True,
    server: VLLMServer | None = None,
    processes: Processes | None = None,
) -> dict:
    """Train `model` in place by `config.method`, in the claimed directory `config.output.dir`.

    Args:
        grader: decides which held-out answers, and GRPO's rollouts, are right.
        before: the evaluations of step 0, by role, where they are known already.
        reward: (completion, answer) → score of a rollout, instead of loss.reward's verifier.
        save: whether to write the trained model to model/.
        server: who samples under rollout.engine vllm_server.
        processes: those that train together; none: this one alone.

    Returns the run's summary, which is also written to summary.json.
    """
    share_one_heap()
    processes = processes or Processes()
    directory = Path(config.output.dir)
    prompts = Prompts(config.prompts, tokenizer)
    if config.model.lora is not None:
        model = add_adapters(model, config.model)
        display.note(f"Adapters: {trainable(model):.2%} of the parameters train")
    limit = window(model.config)
    rows = fitting_rows(rows, prompts, config, limit, display.note)
    held_out = fitting_held_out(held_out, prompts, config, limit, display.note)
    if (differ := different_endings(prompts, config)) is not None:
        display.note(differ)
    check_disk_space(directory, config, model)
    begun = time.monotonic()
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    if config.train.share_prefixes and unpackable(model) is None:
        try_kernel(model, dtype, processes.device)  # which may be an error, before an evaluation
    split = config.train.sharding in SPLIT_WEIGHTS  # over processes; a whole copy decodes
    inference_copy = None
    if split or needs_inference_copy(config, bool(held_out)):
        inference_copy = copy_model(model, dtype, processes.device)
    decoder = inference_copy if inference_copy is not None else model
    # Made before a checkpoint is loaded: the weights of step 0. Without OPSD, a teacher is only
    # asked for its view of the sample completions.
    scores = scores_by_teacher(config)
    teacher, average = decoder, None
    if scores or (held_out and config.eval.samples):
        teacher, average = make_teacher(config, model, tokenizer, decoder)
    stops = stop_ids(model, tokenizer)
    longest = None
    if config.rollout.engine == "vllm":
        longest = longest_sequence([*rows, *held_out], prompts, config)
    sampler = make_sampler(config, decoder, stops, dtype, server, longest)
    sampler = DistributedSampler(sampler, processes, whole=inference_copy if split else None)
    checkpoint_activations(config, model)
    log = open_log(directory, checkpoint, processes)
    # A live teacher is the model itself, so that both roles' common start runs once.
    scorer = model if config.teacher.policy == "live" else teacher
    objective = make_objective(config, scorer, prompts)
    judge = None
    if is_graded(config):
        verifier = make_verifier(config.loss.reward, grader, reward)
        judge = Judge(config.loss.reward, tokenizer, verifier, config.rollout.max_new_tokens)
    teacher_role = shown_role(config, prompts)  # what a report's completions are held against
    engine = config.rollout.engine if config.rollout.engine in SAMPLERS else "generate"
    test = HeldOut(held_out, prompts, grader, evaluation_sampling(config), engine, processes)
    curve = LearningCurve(
        config, test, model, sampler, decoder, teacher, teacher_role, log, display
    )
    if held_out and checkpoint is None:
        curve.begin(before)

    with display.stage(f"Train by {config.method.upper()}", total=config.train.steps) as stage:
        trainer = OPSDTrainer(
            config,
            model,
            rows,
            prompts,
            objective,
            sampler,
            log,
            evaluate=curve if held_out else None,
            on_step=lambda line: stage.update(completed=line["step"], **shown(line)),
            note=display.note,
            average=average if scores else None,
            teacher_sampler=GenerateSampler(teacher, stops, len(head(model)[0])),
            processes=processes,
            judge=judge,
        )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    state = whole_weights(trainer, decoder) if split and save else None
    del trainer  # and with it the optimizer's moments
    model.zero_grad(set_to_none=True)
    release_memory()
    if save and processes.first:
        save_trained(config, model, tokenizer, directory, state)
    if held_out and not processes.once(lambda: log.is_evaluated(step)):
        try:
            curve(step)
        except ServerGoneError as error:
            raise ServerGoneError(
                f"{error}. Training is done and {directory / 'model'} is saved, but its last "
                "evaluation is missing: measure it with `opsd eval`"
            ) from error
    seconds = time.monotonic() - begun
    return processes.once(lambda: write_summary(config, log, directory, seconds))


def open_log(directory: Path, checkpoint: Path | None, processes: Processes) -> RunLog:
    """The log of a run that is no longer, or not yet, whole; the first process writes it."""
    step = checkpoint_step(checkpoint)
    if processes.first:
        (directory / "summary.json").unlink(missing_ok=True)  # says that a run is whole
        log = RunLog(directory, step)
    processes.wait()  # for the lines that the first drops
    return log if processes.first else RunLog(directory, step, writes=False)


def needs_inference_copy(config: Config, evaluates: bool) -> bool:
    """Whether a bf16 copy of the model decodes, in training in bf16: to cast the masters for each
    new token would cost as much as the token. Beside adapters the weights are in bf16 already."""
    decodes = config.rollout.engine in SAMPLERS and (config.method != "sft" or evaluates)
    return decodes and config.train.precision == "bf16" and config.model.lora is None


def whole_weights(trainer: OPSDTrainer, whole: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that are split over processes, tied ones once; named as in the copy that is not.

    All processes take part; the first alone gets them.
    """
    names = {name for name, _ in [*whole.named_parameters(), *whole.named_buffers()]}
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return {name: tensor for name, tensor in gathered.items() if name in names}


def checkpoint_activations(config: Config, model: PreTrainedModel) -> None:
    """Switch gradient checkpointing on, as the config has it."""
    kind = config.train.gradient_checkpointing
    if not kind:
        return
    model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    if kind == "reentrant" and config.model.lora is not None:
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


def evaluation_sampling(config: Config) -> Sampling:
    """Greedy answers to the held-out problems."""
    return Sampling(longest_answer(config), temperature=0, batch_size=config.eval.batch_size)


def checkpoint_step(checkpoint: Path | None) -> int:
    """The step a checkpoint was written at; 0 without one."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


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
