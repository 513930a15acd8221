"""`opsd train`: runs a checked config and leaves a trained model in the run's directory."""

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.precision import compute_dtype, weights_dtype
from opsd.common.system import release_memory, share_one_heap
from opsd.config.compatibility import refused
from opsd.config.config import IN_PYTHON, Config
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
from opsd.grading.rewards import Verifier, check_code, reward_function
from opsd.models.copies import copy_model
from opsd.models.dropout import switch_off_dropout
from opsd.models.experts import check_router_loss, untrained
from opsd.models.generation_config import left_out
from opsd.models.head import head
from opsd.models.load import (
    checkpoint_activations,
    given_model,
    load_model,
    stop_ids,
    told_stops,
    window,
)
from opsd.models.lora import add_adapters, trainable, without_adapters
from opsd.models.teacher import Member, make_members
from opsd.objectives import make_objective
from opsd.prefix import try_kernel, unpackable
from opsd.report import write_report
from opsd.rollout import (
    SAMPLERS,
    DistributedSampler,
    GenerateSampler,
    RolloutServer,
    Sampling,
    ServerError,
    check_engine,
    make_sampler,
    training_server,
)
from opsd.runs.directory import NotWritten, check_problems, claim_directory, locked, step_of
from opsd.runs.log import RunLog
from opsd.training.checkpoints import check_pieces, checkpoint_bytes, save_model, save_trained
from opsd.training.held_out import Evaluation, HeldOut
from opsd.training.learning_curve import LearningCurve
from opsd.training.load_data import fitting_data, load_data, make_prompts, sources
from opsd.training.preflight import begin, check_arguments, try_saving
from opsd.training.publish import publish, write_summary
from opsd.training.reporters import Reports
from opsd.training.rescue import keep_elsewhere
from opsd.training.trainer import TrainingLoop


def train(
    config: Config,
    display: Display | None = None,
    *,
    resume: bool = False,
    start_over: bool = False,
    **others: Any,
) -> Path:
    """Do a whole run: data, model, training, evaluation, report. Returns the run's directory.

    display: where progress is shown; None: the terminal.
    resume: resume from the last checkpoint.
    start_over: with `resume`, begin again if there is no checkpoint.

    Raises UserError for errors that the user can correct.
    """
    check_arguments(config, others)
    display, processes = display or Display(), Processes()
    try:
        config = begin(config, processes)
        return train_in_directory(config, display, processes, resume, start_over).directory
    finally:
        processes.close()


def train_in_directory(
    config: Config,
    display: Display,
    processes: Processes,
    resume: bool,
    start_over: bool = False,
    run: "Run | None" = None,
) -> "Run":
    """Claim the directory, train, write the report, upload. run: reuse this loaded run."""
    directory = Path(config.output.dir)
    with ExitStack() as stack:
        processes.once(lambda: stack.enter_context(locked(directory, note=display.note)))
        checkpoint = processes.once(lambda: claim_directory(directory, config, resume, start_over))
        if checkpoint is not None and config.train.sharding in STAGES:
            processes.once(lambda: check_pieces(checkpoint, processes.count))

        def check(problems: dict[str, Sequence[Row]]) -> None:
            processes.once(lambda: check_problems(directory, problems, checkpoint))

        if run is None:
            run = load_run(config, display, processes, Given(), check)
        else:
            check(run.problems)
        run.checkpoint = checkpoint
        with run.grader:
            run.train()
        if processes.first:
            with display.stage("Write the report"):
                write_report(directory)
            publish(config, directory, display)
        processes.wait()
    return run


@dataclass
class Given:
    """Objects from Python code, used instead of what the config names."""

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    rows: Any = None  # records
    held_out: Any = None  # records
    verifier: Verifier | None = None
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = ()


def load_run(
    config: Config,
    display: Display,
    processes: Processes,
    given: Given,
    check: Callable[[dict[str, Sequence[Row]]], None] = lambda problems: None,
) -> "Run":
    """Read the run's rows, pass them to `check`, and load its model."""
    for name, here in (("model.path", given.model), ("data.source", given.rows)):
        if here is None and reduce(getattr, name.split("."), config) == IN_PYTHON:
            raise UserError(f"{name} is missing: name it, or hand it to OPSDTrainer")
    processes.together(lambda: check_engine(config.rollout.engine))
    server = None
    if (section := config.rollout).server is not None:
        with display.stage(f"Reach {section.server}"):  # the server may still be starting
            reach = partial(training_server, section, config.model, given.model, display.note)
            server = processes.together(reach)
    own_verifier = is_graded(config) and given.verifier is None
    processes.together(lambda: check_code(config.loss, own_verifier))
    with display.stage(f"Read {', '.join(source.source for source in sources(config.data))}"):
        read = partial(load_data, config, display.note, given.rows, given.held_out)
        rows, held_out = processes.together(read)
    run = Run(
        config,
        given.model,
        given.tokenizer,
        rows,
        held_out,
        Grader(strict=config.loss.reward.strict),
        display,
        verifier=given.verifier,
        callbacks=given.callbacks,
        server=server,
        processes=processes,
    )
    check(run.problems)
    # Under FSDP2 the model is loaded on the CPU; FSDP2 moves it to the GPU.
    device = "cpu" if config.train.sharding == "fsdp2" else processes.device
    dtype = weights_dtype(config.train.precision, adapted=config.model.lora is not None)
    if given.model is not None:
        made = given_model(config.model, device, dtype, given.model, given.tokenizer)
        processes.together(lambda: run.fit(given.model.config, given.tokenizer))
    else:
        with display.stage(f"Load {config.model.path}"):
            how: Any = {"dtype": dtype, "tokenizer": given.tokenizer, "look": run.fit}
            made = processes.together(partial(load_model, config.model, device, **how))
    run.model, run.tokenizer = made
    torch.manual_seed(config.train.seed)
    return run


def run(*what: Any, **more: Any) -> dict:
    """Make a Run with these arguments and train it."""
    return Run(*what, **more).train()


@dataclass
class Run:
    """Trains `model` in place by `config.method`, in the claimed directory `config.output.dir`."""

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]
    held_out: Sequence[Row]
    grader: Grader  # grades held-out answers and rollouts
    display: Display
    _: KW_ONLY
    checkpoint: Path | None = None
    # The evaluations at step 0, by role, if they are already known
    before: dict[str, Evaluation] | None = None
    verifier: Verifier | None = None  # used instead of loss.reward.verifier
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = ()
    save: bool = True  # write the trained model to model/
    server: RolloutServer | None = None  # samples, if rollout.engine is a server
    processes: Processes = field(default_factory=Processes)
    # The loop, only during training; and the last gathered weights, if they are split
    loop: TrainingLoop | None = field(default=None, init=False)
    weights: dict | None = field(default=None, init=False)
    sampler: DistributedSampler | None = field(default=None, init=False)
    # The training's result and state, as transformers' Trainer has them
    output: TrainOutput | None = field(default=None, init=False)
    state: TrainerState = field(default_factory=TrainerState, init=False)

    def __post_init__(self):
        self.directory = Path(self.config.output.dir)
        self.prompts: Prompts | None = None
        self.problems = {"data.source": self.rows, "eval.source": self.held_out}  # all of them

    def fit(self, architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the prompts, and leave out rows that do not fit the window. Raises UserError."""
        self.prompts = make_prompts(self.config, architecture, tokenizer)
        data = self.rows, self.held_out, self.prompts, window(architecture)
        self.rows, self.held_out = fitting_data(self.config, *data, self.display)

    def train(self) -> dict:
        """Train, evaluate and save. Returns the run's summary, which is also in summary.json."""
        self.reports = Reports(self.config.output, held=True)
        begun = time.monotonic()
        self.prepare(saves=True)
        self._open_log()
        if lost := self.log.dropped:
            self.display.note(f"{lost} steps were not saved: they, and their lines, are made again")
        curve = self._learning_curve() if self.held_out else None
        if curve is not None and self.checkpoint is None:
            curve.begin(self.before)
        step = self._train(curve)
        self.model.zero_grad(set_to_none=True)
        release_memory()
        if self.save and self.config.output.keep != "best":
            self.processes.once(lambda: self._save(self.directory))
        if curve is not None and not self.processes.once(lambda: self.log.is_evaluated(step)):
            self._evaluate_last(curve, step)
        self.reports.close()
        seconds = time.monotonic() - begun
        return self.processes.once(lambda: write_summary(self.config, self.log, seconds, step))

    def prepare(self, saves: bool = False) -> None:
        """Add adapters, make teacher and sampler; once. saves: check
        before the last two that the result can be saved."""
        config, base = self.config, self._own_base()
        new = self.sampler is None
        if new:
            share_one_heap()
            check_router_loss(self.model, config.loss.router_aux)
            if config.model.lora is not None:
                self.model = add_adapters(self.model, config.model, base)
                self.display.note(f"Adapters: {trainable(self.model):.2%} of the parameters train")
            if self.prompts is None:
                self.fit(self.model.config, self.tokenizer)
        if saves:
            self.processes.once(lambda: self._check_saving(base))
        if not new:
            return
        self.stops = stop_ids(self.model, self.tokenizer)
        with self.display.stage("Prepare teacher and sampler"):
            self._make_teacher()
            self.sampler = self._make_sampler()
        self.display.note(told_stops(self.tokenizer, self.stops))
        parts = untrained(self.model, config.loss.router_aux)
        for line in filter(None, (self.sampler.said, left_out(self.model), *parts)):
            self.display.note(line)
        checkpoint_activations(self.model, config.train.gradient_checkpointing)

    def _check_saving(self, base: Path | None) -> None:
        if self.save or self.config.train.save_every:
            try_saving(self.config, self.model, self.tokenizer, base is not None)
        if base is not None and (self.checkpoint is None or not base.exists()):
            save_model(without_adapters(self.model), self.tokenizer, base.parent, base.name)

    def _own_base(self) -> Path | None:
        """The directory in which the run saves its base model, or None. Only a base that exists in
        no directory is saved, as of a merged adapter: peft loads no adapter on an adapter."""
        config = self.config
        if config.model.lora is None or not getattr(self.model, "in_no_directory", False):
            return None
        if config.output.push_to_hub is not None and not config.output.merge:
            raise refused(
                config,
                f"output.push_to_hub: model.path is {config.model.path!r}, which the hub has not, "
                "and the adapter would stand on it; set output.merge: true",
            )
        return self.directory / "base"

    def _make_teacher(self) -> None:
        """Make the teacher and the inference copy from the weights of step 0, before a checkpoint.

        Sets `inference`, which samples and is evaluated: the student or a copy of it; `teacher`,
        whose probabilities of sample completions are shown; `scorer`, the objective's teacher, or
        `members`, those of teacher.mix; `average`, an `ema` teacher that training updates; and
        `split`, whether the student's weights are split over processes.
        """
        config, model, dtype = self.config, self.model, self.dtype
        if config.method != "sft":
            switch_off_dropout(model)
        if config.train.share_prefixes and unpackable(model) is None:
            try_kernel(model, dtype, self.processes.device)  # fails before an evaluation
        self.split = config.train.sharding in SPLIT_WEIGHTS
        self.inference = model
        if self.split or self._needs_inference_copy():
            self.inference = copy_model(model, dtype, self.processes.device)
        # A method without a teacher needs one only to show its probabilities of completions.
        scores = scores_by_teacher(config)
        made: tuple[Any, Any, list[Member]] = (self.inference, None, [])
        if scores or (self.held_out and config.eval.samples):
            own = config.teacher, config.model, dtype, model, self.tokenizer, self.inference
            made = make_members(*own)
        self.teacher, average, self.members = made
        # A live teacher is the model itself, so what both contexts begin with runs once.
        self.scorer = model if self.teacher is self.inference else self.teacher
        self.average = average if scores else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of forward and backward."""
        return compute_dtype(self.config.train.precision)

    def _needs_inference_copy(self) -> bool:
        """Whether a bf16 copy of the model samples: when training in bf16, unless there are
        adapters, whose base is in bf16. Casting the fp32 weights costs as much as a token."""
        config = self.config
        own_engine = config.rollout.engine in SAMPLERS
        samples = own_engine and (config.method != "sft" or bool(self.held_out))
        return samples and self.dtype == torch.bfloat16 and config.model.lora is None

    def _make_sampler(self) -> DistributedSampler:
        """Make the sampler of rollouts and held-out answers, with the student's weights."""
        config, longest = self.config, None
        if config.rollout.engine == "vllm":
            contexts = self.prompts.lengths([*self.rows, *self.held_out], "student")
            answer = max(config.rollout.max_new_tokens, longest_answer(config))
            longest = max(contexts, default=0) + answer
        other = self.dtype, self.server, self.directory, longest  # of engines without this model
        sampler = make_sampler(config.rollout, config.model, self.inference, self.stops, *other)
        return DistributedSampler(sampler, self.processes, self.inference if self.split else None)

    def _open_log(self) -> None:
        """Open the log of a new or resumed run; only the first process writes to it."""
        step = step_of(self.checkpoint)

        def begin() -> None:
            # This file marks that a run has ended.
            (self.directory / "summary.json").unlink(missing_ok=True)
            self.log = RunLog(self.directory, step)

        self.processes.once(begin)  # it drops lines before the other processes read them
        if not self.processes.first:
            self.log = RunLog(self.directory, step, writes=False)

    def test(self, rows: Sequence[Row]) -> HeldOut:
        """An evaluation of `rows` with the settings of the held-out ones."""
        config, engine = self.config, self.config.rollout.engine
        greedy = Sampling(longest_answer(config), temperature=0, batch_size=config.eval.batch_size)
        own = engine if engine in SAMPLERS else "generate"
        return HeldOut(rows, self.prompts, self.grader, greedy, own, self.processes)

    def _learning_curve(self) -> LearningCurve:
        """Make the run's learning curve of held-out evaluations."""
        config = self.config
        return LearningCurve(
            config.method,
            config.eval,
            self.test(self.held_out),
            self.model,
            self.sampler,
            self.inference,
            self.teacher,
            held_out_teacher_role(config),
            self.log,
            self.display,
            self._keep_if_best,
            self.reports.evaluation,
        )

    def _train(self, curve: LearningCurve | None) -> int:
        """Make and run the training loop. Returns the last step."""
        config, sampling = self.config, Sampling.of(self.config.rollout)
        opens_thought = self.prompts.chats["student"].opens_thought
        with self.display.stage(f"Train by {config.method.upper()}", config.train.steps) as stage:

            def show(line: dict) -> None:
                names = ("loss", "divergence", "reward", "tokens_per_second")
                fields = {name: line[name] for name in names if line.get(name) is not None}
                stage.update(completed=line["step"], **fields)

            self.loop = loop = TrainingLoop(
                config,
                self.model,
                self.rows,
                self.prompts,
                make_objective(
                    config.method, config.loss, self.scorer, self.prompts, sampling, self.members
                ),
                self.sampler,
                self.log,
                evaluate=curve,
                on_step=show,
                note=self.display.note,
                average=self.average,
                teacher_sampler=GenerateSampler(self.teacher, self.stops, len(head(self.model)[0])),
                processes=self.processes,
                reward_function=reward_function(
                    config, self.tokenizer, self.verifier, self.grader, opens_thought
                ),
                callbacks=self.callbacks,
                reports=self.reports,
            )
            self.state = loop.state
            loop.timer.listener = stage.phase
            loop.collector.progress = lambda _, tokens: stage.tokens(tokens)
            self.output = loop.train(resume_from_checkpoint=self.checkpoint)
        self.weights = self._split_weights() if self.save else None
        self.loop = None  # this frees the optimizer's moments
        return self.state.global_step

    def _split_weights(self) -> dict | None:
        """Gather the weights if they are split over processes, all of which must call this."""
        if not self.split or self.loop is None:
            return self.weights
        return gathered_weights(self.loop.accelerator, self.loop.wrapped, self.inference)

    def _keep_if_best(self, accuracy: float) -> None:
        """Write the model if output.keep asks for it: the evaluation was the best. Its line is
        written afterwards, so that a run killed in between evaluates again."""
        keep = self.config.output.keep
        if not self.save or keep == "last":
            return
        best = self.processes.once(self.log.best)
        if best is None or accuracy > best[1]:
            self.weights, place = self._split_weights(), "" if keep == "best" else "best"
            self.processes.once(lambda: self._save(self.directory / place))

    def write_model(self, directory: Path, name: str = "model") -> None:
        """Write the model to `directory`/`name`, as the config's `output` says."""
        output, section = self.config.output, self.config.model
        save_trained(self.model, self.tokenizer, directory, output, self.weights, section, name)

    def _save(self, place: Path) -> None:
        """Save the trained model in `place` or, if that cannot be written, elsewhere."""
        try:
            with self.display.stage("Save the model"):
                self.write_model(place)
        except NotWritten as error:
            needed = checkpoint_bytes(self.model)
            kept = keep_elsewhere(self.config, self.log, needed, self.write_model)
            if kept is None:
                raise
            move = shlex.join(["mv", str(kept / "model"), str(place)])
            raise UserError(
                f"{error.what}. It is kept in {kept}; when it fits, `{move}`"
            ) from error

    def _evaluate_last(self, curve: LearningCurve, step: int) -> None:
        """Evaluate the trained model, which is already saved."""
        try:
            curve(step)
            self.log.check()
        except (ServerError, NotWritten) as error:
            raise type(error)(
                f"{error}. Training is done and {self.directory / 'model'} is saved, but its last "
                "evaluation is missing: measure it with `opsd eval`"
            ) from error
