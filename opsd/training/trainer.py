"""The training loop: rollouts, samples, micro-batches, optimizer, log; top to bottom.

It calls transformers' callbacks at the events of its Trainer, and uses its optimizers, schedules
and loggers (W&B, TensorBoard). accelerate wraps the model in DDP, FSDP2 or DeepSpeed.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DefaultFlowCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput

from opsd.common.ending import Interruption, Stopped
from opsd.common.errors import UserError
from opsd.common.precision import compute_dtype
from opsd.common.random_states import random_states, set_random_states
from opsd.common.step_timer import StepTimer, measured, phase
from opsd.common.system import trim_heap
from opsd.config.config import Config
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.distributed import deepspeed
from opsd.distributed.processes import Processes
from opsd.distributed.wrap import clip_gradient, make_accelerator
from opsd.grading.rewards import RewardFunction
from opsd.models.moving_average import MovingAverage
from opsd.objectives import Objective, Problem, SampleGroup, Totals
from opsd.prefix import try_kernel
from opsd.rollout import DistributedSampler, RolloutsAhead, Sampler, ServerError
from opsd.runs.directory import NotWritten, command_to_go_on
from opsd.runs.log import RunLog
from opsd.training.checkpoints import Checkpoints, checkpoint_bytes, some_weights
from opsd.training.collect_rollouts import RolloutCollector, rows_of_step
from opsd.training.engine_check import EngineCheck
from opsd.training.failed_steps import IN_A_ROW, failed_step, save_failed_step
from opsd.training.optimizer import Movement, make_optimizer, make_schedule, training_arguments
from opsd.training.reporters import Reports
from opsd.training.rescue import keep_elsewhere
from opsd.training.sample_records import rollout_records
from opsd.training.step import GradientAccumulator, OPSDStep, token_ratio, what_is_shared
from opsd.training.step_log import StepLog

Evaluate = Callable[[int], dict]
"""step → the evaluation's record; evaluates on the held-out problems and writes the result."""

SEED_STRIDE = 1_000_003
"""The difference of two processes' seeds. Runs with neighbouring seeds have none in common."""

GRACE = 20.0
"""Seconds to wait after SIGTERM for rollouts sampled ahead, to save them."""


class TrainingLoop:
    """Trains `model` with one of the objectives.

    Args:
        model: the fp32 model; the optimizer updates its weights.
        rows: the training rows; each step draws `train.problems_per_step` of them.
        sampler: samples rollouts; it gets the model's current weights first.
        evaluate: evaluates the model after a step; called every `eval.every` steps.
        on_step, note: called with each step's metrics line; with a line for the terminal.
        average: an `ema` teacher, which is updated after each optimizer step.
        teacher_sampler: samples from the teacher, for rollout.source: teacher.
        processes: those that train together; None: this one alone.
        reward_function: grades rollouts, if the method or the log needs it.
        callbacks: transformers' TrainerCallbacks. reports: its loggers may outlive training.
    """

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        rows: Sequence[Row],
        prompts: Prompts,
        objective: Objective,
        sampler: Sampler,
        log: RunLog,
        evaluate: Evaluate | None = None,
        on_step: Callable[[dict], None] | None = None,
        note: Callable[[str], None] | None = None,
        average: MovingAverage | None = None,
        teacher_sampler: Sampler | None = None,
        processes: Processes | None = None,
        reward_function: RewardFunction | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        reports: Reports | None = None,
    ):
        self.config, self.model, self.rows, self.objective = config, model, rows, objective
        changing = [model, average and average.model, None]
        fixed = {id(m.model): m.model for m in objective.members if m.model not in changing}
        teachers = [weight for teacher in fixed.values() for weight in some_weights(teacher)]
        self._own = {"base": some_weights(model), "teachers": teachers}
        self.processing_class = prompts.tokenizer
        note = note or (lambda text: None)
        self.processes = processes or Processes()
        self.average, self.run_log, self._note, self._evaluate_model = average, log, note, evaluate
        if teacher_sampler is not None:
            teacher_sampler = DistributedSampler(teacher_sampler, self.processes)
        self.collector = RolloutCollector(
            config.rollout,
            config.train.problems_per_step,
            model,
            rows,
            prompts,
            objective,
            sampler,
            teacher_sampler,
            reward_function,
            note,
            self.processes,
        )
        on_step, generates = on_step or (lambda line: None), config.rollout.source != "reference"
        self.step_log = StepLog(config.method, config.train, generates, log, on_step, note)
        self.timer = StepTimer(self.processes.device)
        share = what_is_shared(model, objective, config.train, note)
        # A prefix that several micro-batches share has its own backward, which DDP and FSDP2 miss.
        self.micro_step = OPSDStep(
            model,
            objective,
            share=share,
            cache_trains=self.processes.count == 1
            and config.train.gradient_checkpointing != "reentrant",
        )
        self._replaced = "the teacher's, by its cache" if self.micro_step.alone else "by the cache"
        if share and not self.micro_step.padded:
            # FSDP2 moves the model to its device later; the inference copy is already there.
            unsplit = getattr(sampler, "inference_copy", None) or model
            dtype = compute_dtype(config.train.precision)
            kernel = try_kernel(unsplit, dtype, self.processes.device)
            self._replaced = f"{kernel} instead of {unsplit.config._attn_implementation}"
        self._sharing_checked, self._check_engine = False, EngineCheck(config, note)
        self._groups: list[SampleGroup] = []  # of the current update
        self._left_out, self._left_out_in_a_row = False, 0  # steps that were not finite
        self._interruption = Interruption()
        self._updating = False  # whether a step has changed the weights but is not complete
        # Random states, and rollouts sampled ahead, after the last complete step
        self._random_states: dict[str, Any] = {}
        self._ahead: RolloutsAhead | None = None

        every = config.eval.every if evaluate is not None else 0
        self._varied = any(row.held for row in rows)
        self.args = training_arguments(config.train, config.output, every, self._varied)
        self.accelerator = make_accelerator(config.train)
        self.state = TrainerState(
            max_steps=self.args.max_steps,
            logging_steps=1,
            eval_steps=every or self.args.max_steps,
            save_steps=int(self.args.save_steps),
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.processes.first,
        )
        self.control = TrainerControl()
        self.reports = reports or Reports(config.output)
        called = [DefaultFlowCallback, *self.reports.loggers, self.reports, *callbacks]
        self.callback_handler = CallbackHandler(called, model, self.processing_class, None, None)
        set_seed(config.train.seed)
        self._call("on_init_end")

    def train(self, resume_from_checkpoint: str | Path | None = None) -> TrainOutput:
        """Train, from the beginning or from a checkpoint. If the rollout server fails, or on Ctrl-C
        or SIGTERM, the completed steps are saved before the error is raised."""
        checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        begun, losses = time.monotonic(), 0.0
        self._prepare(checkpoint)
        self._call("on_train_begin")
        first = self.state.global_step
        try:
            with Interruption() as self._interruption:
                if checkpoint is not None:
                    self._evaluate_if_missed()
                    self.checkpoints.read_random_states(checkpoint)
                while not self.step_log.is_done(self.state.global_step):
                    if self.processes.count > 1:
                        self._interruption.hold()  # all processes must stop after the same step
                    losses += self._step()
                    self._random_states, self._updating = random_states(), False
                    self._ahead = self.collector.ahead
                    self._stop_if_interrupted()
                    self.run_log.check()
                    if self.control.should_evaluate:
                        self.evaluate()
                    if self.control.should_save:
                        self.save_checkpoint()
                    if self.control.should_training_stop:
                        break
        except Stopped as stopped:
            patience = GRACE if stopped.number == SIGTERM else None
            raise Stopped(stopped.number, self._save_steps_done(patience)) from None
        except NotWritten as error:
            raise self._kept_elsewhere(error) from error
        except ServerError as error:
            raise self._without_server(error) from error
        finally:
            self.collector.end()
        self.reports.hold(self.callback_handler)
        self._call("on_train_end")
        if self.config.train.sharding in deepspeed.STAGES:
            deepspeed.close(self.wrapped)
        step, took = self.state.global_step, {"train_runtime": time.monotonic() - begun}
        return TrainOutput(step, losses / max(step - first, 1), took)

    def _step(self) -> float:
        """Do one step: rows → rollouts → samples → gradient → optimizer → log. Returns the loss."""
        rows = self._next_rows()
        self._call("on_step_begin")
        loss = self.training_step(rows).item()
        norm = self._update()
        rate = float(self.schedule.get_last_lr()[0])  # the rate of this step
        self.schedule.step()
        self.state.global_step += 1
        if self.average is not None:
            self.average.follow(self.model, self.state.global_step)
        self.state.epoch = self.state.global_step / self._steps_an_epoch
        self._call("on_step_end")  # transformers decides here whether to evaluate and to save
        logs = {"loss": loss, "grad_norm": norm, "learning_rate": rate}
        still = self._still(self.state.global_step, self.processes)
        self.log(logs | {"still": 1.0} if still else logs)
        if self.state.global_step % self._steps_an_epoch == 0:
            self._call("on_epoch_end")
        return loss

    @property
    def _steps_an_epoch(self) -> int:
        return len(self.rows) // self.config.train.problems_per_step

    def _next_rows(self) -> list[Row]:
        """The rows of the next step. Each epoch goes through all rows in a new order."""
        step = self.state.global_step
        if step % self._steps_an_epoch == 0:
            self._call("on_epoch_begin")
            # transformers' DataLoader draws this number; without it rollouts would differ.
            torch.empty((), dtype=torch.int64).random_()
        return rows_of_step(self.rows, step, self.config.train)

    def _prepare(self, checkpoint: Path | None) -> None:
        """Make the optimizer and wrap the model; load both from the checkpoint, if there is one."""
        if self.processes.index:  # each process samples its own rollouts
            torch.manual_seed(self.config.train.seed + SEED_STRIDE * self.processes.index)
        optimizer = make_optimizer(self.model, self.args)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.schedule = make_schedule(self.optimizer, self.args)
        self.wrapped.zero_grad()
        train, processes = self.config.train, self.processes
        self.accumulate = GradientAccumulator(
            self.micro_step, self.wrapped, self.accelerator, train, processes, self._note
        )
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.lr_scheduler = self.schedule
        self.checkpoints = Checkpoints(
            Path(self.args.output_dir),
            self.config.train.save_total_limit,
            self.processes,
            self.accelerator,
            self.model,
            self.wrapped,
            self.processing_class,
            self.optimizer,
            self.schedule,
            self.average,
            self._own,
        )
        looks = train.sharding not in deepspeed.STAGES  # at the weights that the run began with
        self._still = Movement(self.optimizer, train.warmup_steps, looks)
        if checkpoint is not None:
            falls = self._varied and self.config.train.schedule is None
            self.checkpoints.read(checkpoint, self.state, self._steps_an_epoch, falls)
            self._ahead = self.collector.go_on(partial(self.checkpoints.read_ahead, checkpoint))

    def _kept_elsewhere(self, error: NotWritten) -> UserError:
        """Save the completed steps where there is room; returns the error for the user."""

        def write(place: Path) -> None:
            replace(self.checkpoints, directory=place).write(self.state, self._ahead)

        alone, needed = self.processes.count == 1, checkpoint_bytes(self.model)
        place = keep_elsewhere(self.config, self.run_log, needed, write) if alone else None
        if place is None:
            return error
        command = command_to_go_on(place)
        return UserError(f"{error.what}. The run is kept in {place}: `{command}` goes on there")

    def _without_server(self, error: ServerError) -> ServerError:
        """Save the completed steps; returns the error for the user."""
        return type(error)(
            f"{error}. Training has stopped, {self._save_steps_done()}: when the server is back, "
            "go on with `opsd train … --resume`"
        )

    def _save_steps_done(self, patience: float | None = None) -> str:
        """Save the run as after its last complete step; returns a message about it. patience:
        seconds to wait for rollouts sampled ahead, to save them too; None: no limit."""
        step = self.state.global_step
        if not step:
            return "no step was done"
        if self._updating:  # a second Ctrl-C interrupted the update
            return "what was saved before is kept"
        place = Path(self.args.output_dir) / f"checkpoint-{step}"
        if not place.exists():
            set_random_states(self._random_states)
            if self._ahead and not self._ahead.own.done():
                self._note("Waiting for rollouts, to save them too; Ctrl-C goes on without them")
                with suppress(KeyboardInterrupt):
                    self._ahead.wait(patience)
            self.save_checkpoint(patience=0)
        return f"step {step} is saved in {place}"

    def _stop_if_interrupted(self) -> None:
        """Called between two steps. Raises Stopped if one of the processes got a signal."""
        signals = self.processes.everywhere(lambda: self._interruption.signal)
        self._interruption.signal = next((number for number in signals if number), None)
        self._interruption.release()

    def training_step(self, rows: Sequence[Row]) -> Tensor:
        """Do one step on these rows, up to but without its last optimizer update, whose gradient
        stays on the model. Returns the step's loss."""
        with measured(self.timer):
            start = time.monotonic()
            self._left_out = False
            step, following = self.state.global_step, []
            if self.config.rollout.ahead and step + 1 < self.config.train.steps:
                following = rows_of_step(self.rows, step + 1, self.config.train)
            asked, problems, measures = self.collector(rows, step, following)
            batches = self._mini_batches(problems, measures)
            self.wrapped.train()
            self._measure_sharing([group for batch in batches for group in batch], measures)
            loss, totals = self._updates(batches)
            if self.model.device.type == "cpu":
                trim_heap()
            self._write_rollouts(asked)
            self.step_log.count(asked, totals, measures, time.monotonic() - start)
            self.timer.begin("optimizer")  # until the step is logged
            return loss

    def _mini_batches(
        self, problems: list[Problem], measures: dict[str, float]
    ) -> list[list[SampleGroup]]:
        """The groups of each of the step's updates; adds the mean of their measures."""
        count = min(self.config.train.mini_batches, len(problems))
        batches = []
        for some in (problems[number::count] for number in range(count)):
            groups, own = self.objective.sample_groups(some, self.state.global_step)
            batches.append(groups)
            for name, value in own.items():
                measures[name] = measures.get(name, 0.0) + value / count
        return batches

    def _updates(self, batches: list[list[SampleGroup]]) -> tuple[Tensor, Totals]:
        """Make the step's optimizer updates except the last, whose gradient stays on the model.

        Returns the mean of the updates' losses, and their measures.
        """
        on_policy = self.objective.samples_rollouts and self.config.rollout.source == "student"
        if len(batches) * self.config.train.inner_epochs > 1 and on_policy:
            batches = [self.accumulate.with_old_log_probs(batch) for batch in batches]
        updates = batches * self.config.train.inner_epochs
        totals, mean = Totals(), torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(updates, start=1):
            self._groups = batch
            loss, own = self.accumulate(batch)
            totals.include(own)
            if not math.isfinite(loss):
                self._not_finite(f"loss is {float(loss)}")
                break  # its loss is not added to the mean, so the log has a finite one
            mean += loss / len(updates)
            if number == 1:
                self._check_engine(own, self.state.global_step + 1)
            if number < len(updates):
                with phase("optimizer"):
                    self._update()
                if self._left_out:
                    break
        return mean, totals

    def _update(self) -> float:
        """Update the weights with the accumulated gradient; returns its norm. A gradient that is
        not finite changes no weights."""
        self._updating = True
        self._interruption.hold()  # until the step is logged
        norm = clip_gradient(
            self.accelerator, self.wrapped, self.config.train.max_grad_norm or math.inf
        )
        if not self._left_out and not math.isfinite(norm):
            self._not_finite(f"gradient's norm is {norm}")
        self._call("on_pre_optimizer_step")
        self.optimizer.step()  # does nothing if the step is left out: the gradients are None
        self._call("on_optimizer_step")
        self.wrapped.zero_grad()
        return norm

    def _not_finite(self, what: str) -> None:
        """Save the step's batch; then raise UserError, or leave the step out."""
        step = self.state.global_step + 1
        failed = failed_step(self.config, step, self._groups, self.model, self.average)
        place = Path(self.args.output_dir)
        path = self.processes.once(lambda: save_failed_step(place, failed))
        self._left_out_in_a_row += 1
        told = f"step {step}: its {what}; `opsd replay {path}` says where"
        if self.config.train.not_finite == "stop" or self._left_out_in_a_row == IN_A_ROW:
            row = self._left_out_in_a_row
            in_a_row = f" ({row} steps in a row)" if row > 1 else ""
            raise UserError(
                f"{told}{in_a_row}. What was saved before is kept, --resume goes on from it, and "
                "train.not_finite=skip leaves such steps out"
            )
        self._note(f"Left out {told}")
        self.model.zero_grad(set_to_none=True)
        self._left_out = True

    def _measure_sharing(self, groups: list[SampleGroup], measures: dict[str, float]) -> None:
        """Measure what shared prefixes save; once, check that they change no results."""
        if not self.micro_step.share or not groups:
            return
        measures["token_ratio"] = ratio = token_ratio(groups, self.micro_step.alone)
        if self._sharing_checked:
            return
        measures["sharing_difference"] = difference = self.accumulate.check_sharing(groups)
        self._sharing_checked = True
        same = f"the same to {difference:.1g}" if difference else "the same bit for bit"
        self._note(
            f"Shared prefixes ({self._replaced}): {ratio:.2f} times fewer tokens than each rollout "
            f"alone, {same}"
        )

    def _write_rollouts(self, problems: list[Problem]) -> None:
        """Write the step's first rollouts to rollouts.jsonl."""
        if self.collector.samples:
            kept, how = self.config.output.rollouts, self.collector.how
            for line in rollout_records(problems, self.processing_class, how, kept):
                self.run_log.rollout({"step": self.state.global_step + 1, **line})

    def log(self, logs: dict[str, float | None]) -> None:
        """Write the step's line to metrics.jsonl, and to the callbacks (W&B, TensorBoard)."""
        seconds = self.processes.everywhere(self.timer.take)
        if not self._left_out:
            self._left_out_in_a_row = 0
        step = self.state.global_step
        numbers, over = self.step_log.write(step, logs, seconds, self._left_out)
        if over:
            self.control.should_training_stop = True
        numbers["epoch"] = self.state.epoch
        self.state.log_history.append({**numbers, "step": step})
        self._call("on_log", logs=numbers)

    def evaluate(self) -> dict[str, float]:
        """Evaluate the current model on the held-out problems."""
        if self._evaluate_model is None:
            raise ValueError("evaluate: the trainer was made without it, and cannot evaluate")
        record = self._evaluate_model(self.state.global_step)
        metrics = {f"eval_{key}": value for key, value in record.items()}
        self._call("on_evaluate", metrics=metrics)
        best = self.processes.once(self.run_log.best)
        if best is not None and best[2] >= (self.config.train.early_stop or math.inf):
            self._note(f"Early stop: {best[2]} evaluations were no better than step {best[0]}'s")
            self.control.should_training_stop = True
        return metrics

    def _evaluate_if_missed(self) -> None:
        """Make up for an evaluation that failed before the checkpoint was written."""
        step, every = self.state.global_step, self.config.eval.every
        due = self._evaluate_model is not None and every > 0 and step > 0 and step % every == 0
        if due and not self.run_log.is_evaluated(step):
            self._evaluate_model(step)

    def save_checkpoint(self, patience: float | None = None) -> None:
        """Write checkpoint-<step>/, from which a run resumes bit for bit."""
        self.timer.listener("saving")
        self.run_log.sync()
        if self._ahead is not None:
            self._ahead.wait(patience)
        self.checkpoints.write(self.state, self._ahead)
        self._call("on_save")

    def _call(self, event: str, **more: Any) -> None:
        """Call all callbacks with an event of transformers' Trainer."""
        call = getattr(self.callback_handler, event)
        self.control = call(self.args, self.state, self.control, **more)
