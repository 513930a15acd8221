"""`opsd train`: from a checked config to a trained model in a run directory."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.checkpoints import save_model
from opsd.config import Config, save_config
from opsd.data import Row, load_rows, split_rows
from opsd.display import Display
from opsd.environment import machine, peak_memory, release_memory, share_one_heap, versions
from opsd.errors import UserError
from opsd.evaluate.grading import Grader
from opsd.evaluate.run import Evaluation, Grades, HeldOut, decode
from opsd.models import copy_model, head, load_model, stop_ids, window
from opsd.objectives import GRPO, OPSD, SFT, Distill, Objective
from opsd.prefix import use_kernel
from opsd.prompts import Prompts
from opsd.report import write_report
from opsd.rollout import (
    SAMPLERS,
    GenerateSampler,
    Sampling,
    ServerGoneError,
    check_engine,
    make_sampler,
    training_server,
)
from opsd.rollout.client import VLLMServer
from opsd.runlog import RunLog, read_lines
from opsd.samples import sample_records
from opsd.teacher import make_teacher
from opsd.trainer import OPSDTrainer

Reward = Callable[[str, str], float]


def train(config: Config, display: Display, *, resume: bool = False) -> Path:
    """A whole run: data, model, training, evaluation, report. Returns the run's directory."""
    use_kernel(config.train.prefix_kernel)
    directory = Path(config.output.dir)
    checkpoint = claim_directory(directory, config, resume)
    check_engine(config.rollout.engine)
    server = training_server(config)
    seed = config.train.seed
    rows, held_out = load_data(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with display.stage(f"Load {config.model.path}"):
        model, tokenizer = load_model(config.model, device)
    torch.manual_seed(seed)
    with Grader() as grader:
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
        )
    write_report(directory)
    return directory


def load_data(config: Config) -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out ones, with no problem in both."""
    data, held = config.data, config.eval
    rows = load_rows(
        data.source,
        columns=data.columns,
        split=data.split,
        limit=data.limit,
        size=data.size,
        seed=config.train.seed,
        options=data.options,
    )
    if held.problems == 0:
        return rows, []
    if held.source is None:
        return split_rows(rows, held.problems, config.train.seed)
    held_out = load_rows(
        held.source,
        columns=data.columns if held.columns is None else held.columns,
        split=held.split,
        limit=held.problems,
        seed=config.train.seed + 1,
        options=data.options if held.options is None else held.options,
        require=("problem", "answer"),
        section="eval",
    )
    known = {row.problem for row in held_out}
    return [row for row in rows if row.problem not in known], held_out


def claim_directory(directory: Path, config: Config, resume: bool) -> Path | None:
    """Make the run's directory, or check that it is this run's; returns its last checkpoint.

    Raises UserError when the directory belongs to another run, or to something else.
    """
    mine = directory / "config.yaml"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output.dir is {str(directory)!r}: a file is in the way")
    # With a config alone nothing has been run yet: an error in the data or the model came first.
    if directory.exists() and any(path != mine for path in directory.iterdir()):
        if not mine.is_file():
            raise UserError(
                f"output.dir is {str(directory)!r}: it holds files that are not a run's; "
                "choose another"
            )
        if yaml.safe_load(mine.read_text()) != config.model_dump():
            raise UserError(
                f"output.dir is {str(directory)!r}: it belongs to a run with another config "
                "(see its config.yaml); choose another directory"
            )
        if not resume:
            raise UserError(
                f"output.dir is {str(directory)!r}: this run has been started before; go on "
                "with --resume, or choose another directory"
            )
        return last_checkpoint(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_config(config, mine)
    except OSError as error:
        raise UserError(
            f"output.dir is {str(directory)!r}: cannot write there ({error.strerror})"
        ) from None
    return None


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to the end, or None."""
    # trainer_state.json is the last file that Trainer writes.
    whole = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


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
) -> dict:
    """Train `model` in place by `config.method`, in the claimed directory `config.output.dir`.

    Args:
        grader: decides which held-out answers, and GRPO's rollouts, are right.
        before: the evaluations of step 0, by role, where they are known already.
        reward: (completion, answer) → reward, for GRPO; none: 1 for a right answer, else 0.
        save: whether to write the trained model to model/.
        server: who samples under rollout.engine vllm_server.

    Returns the run's summary, which is also written to summary.json.
    """
    share_one_heap()
    directory = Path(config.output.dir)
    prompts = Prompts(config.prompts, tokenizer)
    rows = fitting_rows(rows, prompts, config, model, display)
    if len(rows) < config.train.problems_per_step:
        raise UserError(
            f"data.source has {len(rows)} training rows: train.problems_per_step "
            f"({config.train.problems_per_step}) may be at most that"
        )
    check_disk_space(directory, config, model)
    begun = time.monotonic()
    low_precision = config.train.precision == "bf16"
    dtype = torch.bfloat16 if low_precision else torch.float32
    # What decodes: a bf16 copy where training is in bf16, since casting the masters for each new
    # token would cost as much as the token.
    decodes = config.rollout.engine in SAMPLERS and (config.method != "sft" or bool(held_out))
    twin = copy_model(model, dtype) if low_precision and decodes else None
    decoder = twin if twin is not None else model
    # Made before a checkpoint is loaded: the weights of step 0. Without OPSD, a teacher is only
    # asked for its view of the sample completions.
    scores = config.method in ("opsd", "distill")
    teacher, average = decoder, None
    if scores or (held_out and config.eval.samples):
        teacher, average = make_teacher(config, model, tokenizer, decoder)
    stops = stop_ids(model, tokenizer)
    sampler = make_sampler(config, decoder, stops, dtype, server)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    log = RunLog(directory, checkpoint_step(checkpoint))
    # A live teacher is the model itself, so that both roles' common start runs once.
    scorer = model if config.teacher.policy == "live" else teacher
    objective = make_objective(config, scorer, prompts, tokenizer, grader, reward)
    teacher_role = objective.teacher_role
    engine = config.rollout.engine if config.rollout.engine in SAMPLERS else "generate"
    test = HeldOut(held_out, prompts, grader, evaluation_sampling(config), engine)

    def answer() -> Evaluation:
        sampler.follow(model)
        return test.evaluate(decoder, display, sampler=sampler)

    def record(step: int, role: str, result: Evaluation) -> dict:
        counters = log.counters
        place = {
            "step": step,
            "generated_tokens": counters.generated_tokens,
            "trained_tokens": counters.trained_tokens,
        }
        line = {**place, "role": role, **result.record()}
        log.evaluation(line)
        if role == "student":
            for sample in sample_records(
                decoder, teacher, prompts, held_out, result, config.eval.samples, teacher_role
            ):
                log.sample({**place, "method": config.method, **sample})
        return line

    def evaluate(step: int) -> dict:
        return record(step, "student", answer())

    if held_out and checkpoint is None:
        if before is None:
            before = {"student": answer()}
            if config.eval.teacher:
                before["teacher"] = test.evaluate(teacher, display, teacher_role, "teacher")
        for role, result in before.items():
            record(0, role, result)

    with display.stage(f"Train by {config.method.upper()}", total=config.train.steps) as stage:
        trainer = OPSDTrainer(
            config,
            model,
            rows,
            prompts,
            objective,
            sampler,
            log,
            evaluate=evaluate if held_out else None,
            on_step=lambda line: stage.update(completed=line["step"], **shown(line)),
            note=display.note,
            average=average if scores else None,
            teacher_sampler=GenerateSampler(teacher, stops, len(head(model)[0])),
        )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    del trainer  # and with it the optimizer's moments
    model.zero_grad(set_to_none=True)
    release_memory()
    evaluated = [
        line
        for line in read_lines(directory / "evaluations.jsonl")
        if line["role"] == "student" and line["step"] == step
    ]
    if save:
        save_model(model, tokenizer, directory)
    if held_out and not evaluated:
        try:
            evaluate(step)
        except ServerGoneError as error:
            raise ServerGoneError(
                f"{error}. Training is done and {directory / 'model'} is saved, but its last "
                "evaluation is missing: measure it with `opsd eval`"
            ) from error
    return write_summary(config, log, directory, time.monotonic() - begun)


def evaluation_sampling(config: Config) -> Sampling:
    """Greedy answers to the held-out problems."""
    longest = config.eval.max_new_tokens or config.rollout.max_new_tokens
    return Sampling(longest, temperature=0, batch_size=config.eval.batch_size)


def make_objective(
    config: Config,
    teacher: PreTrainedModel,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grades,
    reward: Reward | None,
) -> Objective:
    """The objective of `config.method`."""
    if config.method == "opsd":
        return OPSD(config.loss, teacher)
    if config.method == "distill":
        return Distill(config.loss, teacher)
    if config.method == "sft":
        return SFT(config.loss, prompts)

    def rewards(rollouts, answers):
        completions = decode(tokenizer, rollouts)
        if reward is not None:
            return [reward(c, a) for c, a in zip(completions, answers, strict=True)]
        return [float(grade.correct) for grade in grader.grade(completions, answers)]

    return GRPO(config.loss, rewards)


def fitting_rows(
    rows: Sequence[Row],
    prompts: Prompts,
    config: Config,
    model: PreTrainedModel,
    display: Display,
) -> list[Row]:
    """The rows whose longest context and rollout fit the model's window.

    The others are an error, or left out and counted, as `prompts.too_long` says; never cut.
    """
    limit = window(model)
    if limit is None:
        return list(rows)
    kept, first = [], None
    roles = config.loss.roles if config.method == "sft" else ["student"]
    if config.method == "opsd":
        roles = ["student", "teacher"]
    given = config.method == "sft" or config.rollout.source == "reference"
    for number, row in enumerate(rows, start=1):
        answer = config.rollout.max_new_tokens
        if given:
            answer = len(prompts.target(row))
        longest = max(len(prompts.ids(row, role)) for role in roles) + answer
        if longest <= limit:
            kept.append(row)
        elif first is None:
            first = (number, longest)
    if first is None:
        return kept
    number, longest = first
    what = f"row {number} needs {longest} tokens with its answer, the model's window is {limit}"
    if config.prompts.too_long == "error":
        raise UserError(
            f"data.source: {what}; shorten rollout.max_new_tokens, or leave such rows out with "
            "prompts.too_long: skip"
        )
    display.note(f"{len(rows) - len(kept)} of {len(rows)} rows are left out: {what}")
    return kept


def check_disk_space(directory: Path, config: Config, model: PreTrainedModel) -> None:
    """Raises UserError if the model and the checkpoints (weights and two moments) will not fit."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    checkpoints = config.train.save_total_limit + 1 if config.train.save_every else 0
    needed = weights + 3 * weights * checkpoints
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"output.dir is {str(directory)!r}: {free / 1e9:.1f} GB are free there, "
            f"the run needs {needed / 1e9:.1f} GB"
        )


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


def write_json(path: Path, value: dict) -> None:
    """Write beside, then rename."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    part.replace(path)
