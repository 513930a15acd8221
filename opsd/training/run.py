"""`opsd train`: from a checked config to a trained model in a run directory."""

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.files import write_json
from opsd.common.hub_upload import push
from opsd.common.precision import best_precision, compute_dtype, weights_dtype
from opsd.common.system import machine, peak_memory, release_memory, share_one_heap, versions
from opsd.config.compatibility import refused
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
from opsd.models.teacher import check_teacher, make_members
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
from opsd.runs.directory import NotWritten, check_problems, claim_directory, locked, settle, step_of
from opsd.runs.log import RunLog, student_curve
from opsd.training.checkpoints import check_pieces, checkpoint_bytes, save_model, save_trained
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
    # Under FSDP2 the model is loaded on the CPU; FSDP2 moves it to the GPU.
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


def run(*what: Any, **more: Any) -> dict:
    """`Run(...).train()`."""
    return Run(*what, **more).train()


@dataclass
class Run:
    """Trains `model` in place by `config.method`, in the claimed directory `config.output.dir`."""

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]
    held_out: Sequence[Row]
    grader: Grader  # decides which held-out answers, and GRPO's rollouts, are right
    display: Display
    _: KW_ONLY
    checkpoint: Path | None = None
    # The evaluations of step 0, by role, where they are known already
    before: dict[str, Evaluation] | None = None
    # (completion, answer) → score of a rollout, instead of loss.reward's verifier
    reward: Reward | None = None
    save: bool = True  # whether to write the trained model to model/
    server: VLLMServer | None = None  # who samples under rollout.engine vllm_server
    processes: Processes = field(default_factory=Processes)  # those that train together
    # While it trains; and the weights, where they are split over processes, when they were gathered
    trainer: OPSDTrainer | None = field(default=None, init=False)
    weights: dict | None = field(default=None, init=False)

    def train(self) -> dict:
        """Returns the run's summary, which is also written to summary.json."""
        share_one_heap()
        begun = time.monotonic()
        self.directory = Path(self.config.output.dir)
        self.prompts = Prompts(self.config.prompts, self.tokenizer)
        self._prepare_model()
        self._make_teacher()
        self.sampler = self._make_sampler()
        self.display.note(told_stops(self.tokenizer, self.stops))
        if (unused := left_out(self.model)) is not None:
            self.display.note(unused)
        checkpoint_activations(self.model, self.config.train.gradient_checkpointing)
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
        seconds = time.monotonic() - begun
        return self.processes.once(lambda: self._write_summary(seconds))

    def _prepare_model(self) -> None:
        """Adapters, where they are asked for; the rows that fit; whether all can be saved."""
        config, model = self.config, self.model
        base = self._own_base()
        if config.model.lora is not None:
            self.model = model = add_adapters(model, config.model, base)
            self.display.note(f"Adapters: {trainable(model):.2%} of the parameters train")
        self.rows, self.held_out = fitting_data(
            config, self.rows, self.held_out, self.prompts, window(model.config), self.display
        )
        if self.save or config.train.save_every:
            self.processes.once(lambda: try_saving(config, model, self.tokenizer, base is not None))
        if base is not None:
            self.processes.once(lambda: self._save_base(base))
        self.stops = stop_ids(model, self.tokenizer)

    def _save_base(self, base: Path) -> None:
        if self.checkpoint is None or not base.exists():
            save_model(without_adapters(self.model), self.tokenizer, base.parent, base.name)

    def _own_base(self) -> Path | None:
        """Where the run keeps the model that its adapters stand on. None, unless model.path is
        itself an adapter: peft and transformers load no adapter on an adapter, but drop one."""
        config = self.config
        if config.model.lora is None or not getattr(self.model, "has_merged_adapters", False):
            return None
        if config.output.push_to_hub is not None and not config.output.merge:
            raise refused(
                config,
                f"output.push_to_hub: model.path is {config.model.path!r}, an adapter, so that the "
                "new one stands on a model which the hub has not; set output.merge: true",
            )
        return self.directory / "base"

    def _make_teacher(self) -> None:
        """The teacher and the inference copy. They are made before a checkpoint is loaded: of the
        weights of step 0.

        Sets `inference`, what sampling and evaluation read: the student, or a copy of its weights;
        `teacher`, whose view of sample completions is shown; `scorer`, what the objective asks, or
        `members`, those of teacher.mix; `average`, an `ema` teacher that training moves; and
        `split`, whether the student's weights are split over processes.
        """
        config, model, dtype = self.config, self.model, self.dtype
        if config.method != "sft":
            switch_off_dropout(model)
        if config.train.share_prefixes and unpackable(model) is None:
            try_kernel(model, dtype, self.processes.device)  # may be an error: before an evaluation
        self.split = config.train.sharding in SPLIT_WEIGHTS
        self.inference = model
        if self.split or self._needs_inference_copy():
            self.inference = copy_model(model, dtype, self.processes.device)
        # A method without a teacher needs one only to show its view of sample completions.
        scores = scores_by_teacher(config)
        self.teacher, average, self.members = self.inference, None, []
        if scores or (self.held_out and config.eval.samples):
            self.teacher, average, self.members = make_members(
                config.teacher, config.model, dtype, model, self.tokenizer, self.inference
            )
        # A live teacher is the model itself: the start that both contexts share runs once.
        self.scorer = model if self.teacher is self.inference else self.teacher
        self.average = average if scores else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of forward and backward."""
        return compute_dtype(self.config.train.precision)

    def _needs_inference_copy(self) -> bool:
        """Whether a bf16 copy of the model samples, in training in bf16: to cast the fp32 weights
        for each new token would cost as much as the token. Beside adapters they are in bf16."""
        config = self.config
        own_engine = config.rollout.engine in SAMPLERS
        samples = own_engine and (config.method != "sft" or bool(self.held_out))
        return samples and self.dtype == torch.bfloat16 and config.model.lora is None

    def _make_sampler(self) -> DistributedSampler:
        """The sampler of rollouts and held-out answers, by the student's weights."""
        config, longest = self.config, None
        if config.rollout.engine == "vllm":
            contexts = self.prompts.lengths([*self.rows, *self.held_out], "student")
            answer = max(config.rollout.max_new_tokens, longest_answer(config))
            longest = max(contexts, default=0) + answer
        sampler = make_sampler(
            config.rollout,
            config.model,
            self.inference,
            self.stops,
            self.dtype,
            self.server,
            self.directory,
            longest,
        )
        return DistributedSampler(sampler, self.processes, self.inference if self.split else None)

    def _open_log(self) -> None:
        """The log of a run that begins or goes on; the first process writes it."""
        step = step_of(self.checkpoint)

        def begin() -> None:
            # It says that a run has ended.
            (self.directory / "summary.json").unlink(missing_ok=True)
            self.log = RunLog(self.directory, step)

        self.processes.once(begin)  # which drops lines that the others read
        if not self.processes.first:
            self.log = RunLog(self.directory, step, writes=False)

    def _learning_curve(self) -> LearningCurve:
        """The held-out evaluations of the run."""
        config, engine = self.config, self.config.rollout.engine
        greedy = Sampling(longest_answer(config), temperature=0, batch_size=config.eval.batch_size)
        own = engine if engine in SAMPLERS else "generate"
        return LearningCurve(
            config.method,
            config.eval,
            HeldOut(self.held_out, self.prompts, self.grader, greedy, own, self.processes),
            self.model,
            self.sampler,
            self.inference,
            self.teacher,
            held_out_teacher_role(config),
            self.log,
            self.display,
            self._keep_if_best,
        )

    def _train(self, curve: LearningCurve | None) -> int:
        """The loop. Returns the last step."""
        config, sampling = self.config, Sampling.of(self.config.rollout)
        title = f"Train by {config.method.upper()}"
        with self.display.stage(title, total=config.train.steps) as stage:

            def show(line: dict) -> None:
                names = ("loss", "divergence", "reward", "tokens_per_second")
                fields = {name: line[name] for name in names if line.get(name) is not None}
                stage.update(completed=line["step"], **fields)

            self.trainer = trainer = OPSDTrainer(
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
                reward_function=self._reward_function(),
            )
            trainer.train(resume_from_checkpoint=self.checkpoint)
        self.weights = self._split_weights() if self.save else None
        self.trainer = None  # and with it the optimizer's moments
        return trainer.state.global_step

    def _split_weights(self) -> dict | None:
        """The weights, where they are split over processes, all of which take part."""
        if not self.split or self.trainer is None:
            return self.weights
        trainer = self.trainer
        return gathered_weights(trainer.accelerator, trainer.wrapped, self.inference)

    def _keep_if_best(self, accuracy: float) -> None:
        """Write the model that was just measured, where output.keep asks for the best. The line of
        its evaluation comes after it, so that a run that is killed between measures it again."""
        keep = self.config.output.keep
        if not self.save or keep == "last":
            return
        best = self.processes.once(self.log.best)
        if best is None or accuracy > best[1]:
            self.weights, place = self._split_weights(), "" if keep == "best" else "best"
            self.processes.once(lambda: self._save(self.directory / place))

    def _reward_function(self) -> RewardFunction | None:
        """Grades rollouts; None if neither the method nor the log needs grades."""
        section = self.config.loss.reward
        if not is_graded(self.config):
            return None
        return RewardFunction(
            section,
            self.tokenizer,
            make_verifier(section, self.grader, self.reward),
            self.config.rollout.max_new_tokens,
            self.prompts.chats["student"].opens_thought,
        )

    def _save(self, place: Path) -> None:
        """The trained model, there or, where that cannot be written, elsewhere."""
        config, model = self.config, self.model

        def write(directory: Path) -> None:
            save_trained(
                model, self.tokenizer, directory, config.output, self.weights, config.model
            )

        try:
            write(place)
        except NotWritten as error:
            kept = keep_elsewhere(config, self.log, checkpoint_bytes(model), write)
            if kept is None:
                raise
            move = shlex.join(["mv", str(kept / "model"), str(place)])
            raise UserError(
                f"{error.what}. It is kept in {kept}; when it fits, `{move}`"
            ) from error

    def _evaluate_last(self, curve: LearningCurve, step: int) -> None:
        """The trained model, which is saved already."""
        try:
            curve(step)
            self.log.check()
        except (ServerError, NotWritten) as error:
            raise type(error)(
                f"{error}. Training is done and {self.directory / 'model'} is saved, but its last "
                "evaluation is missing: measure it with `opsd eval`"
            ) from error

    def _write_summary(self, seconds: float) -> dict:
        accuracies = [line.accuracy for line in student_curve(self.directory)] or [None]
        best = self.log.best()
        summary = {
            "method": self.config.method,
            "model": self.config.model.path,
            "accuracy": {"before": accuracies[0], "after": accuracies[-1]},
            "best": {"step": best[0], "accuracy": best[1]} if best else None,
            "generated_tokens": self.log.counters.generated_tokens,
            "trained_tokens": self.log.counters.trained_tokens,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(),
            "versions": versions(),
            "machine": machine(),
        }
        write_json(self.directory / "summary.json", summary)
        return summary


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
