"""The training loop: transformers' Trainer, with rollouts before each step's forward passes.

Trainer keeps the optimizer, the schedule, checkpoints with RNG state and resuming. What is ours is
one step: sample rollouts, make the method's samples, and add up micro-batches.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback

from opsd.common.errors import UserError
from opsd.common.step_timer import StepTimer, measured, phase
from opsd.common.system import release_memory, trim_heap
from opsd.config.config import Config
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.distributed.deepspeed import LateSteps
from opsd.distributed.forward_redirection import called_through
from opsd.distributed.processes import SPLIT_WEIGHTS, Processes
from opsd.grading.rewards import RewardFunction
from opsd.models.moving_average import MovingAverage
from opsd.objectives import Objective, Problem, SampleGroup, Totals, samples_of
from opsd.objectives.log_probs import rollout_log_prob
from opsd.prefix import CachedPrefix, PrefixCache, try_kernel, unpackable
from opsd.rollout import DistributedSampler, Sampler, ServerGoneError
from opsd.runs.log import RunLog
from opsd.training.checkpoints import WholeCheckpoints
from opsd.training.collect_rollouts import RolloutCollector
from opsd.training.failed_steps import IN_A_ROW, failed_step, out_of_memory, save_failed_step
from opsd.training.sample_records import rollout_records
from opsd.training.step import OPSDStep, idle, token_ratio
from opsd.training.step_log import StepLog
from opsd.training.trainer_arguments import Evaluate, MissedEvaluation, training_arguments

SEED_STRIDE = 1_000_003
"""Between the seeds of two processes, so that neighbouring runs do not share one."""

ENGINES_DIFFER = 0.2
"""Nats a token, in the mean over a step, that no rounding of an engine's explains."""


class OPSDTrainer(WholeCheckpoints):
    """Trains `model` with one of the objectives.

    Args:
        model: the fp32 model; its weights are the optimizer's masters.
        rows: the training rows; each step draws `train.problems_per_step` of them.
        sampler: samples rollouts, from the model's current weights, which it is shown before.
        evaluate: called each `eval.every` steps and at the end.
        on_step: called with a step's metrics line, for the display.
        note: called with a line for the terminal, once.
        average: an `ema` teacher, which follows the model after each optimizer step.
        teacher_sampler: samples from the teacher, for rollout.source teacher.
        processes: those that train together; none: this one alone.
        reward_function: grades rollouts, where the method or the log needs it.
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
        on_step: Callable[[dict], None] = lambda line: None,
        note: Callable[[str], None] = lambda text: None,
        average: MovingAverage | None = None,
        teacher_sampler: Sampler | None = None,
        processes: Processes | None = None,
        reward_function: RewardFunction | None = None,
    ):
        self.processes = processes or Processes()
        self.average = average
        self.config, self.rows, self.objective = config, rows, objective
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
        self.run_log = log
        self.step_log = StepLog(config, log, on_step, note)
        self._evaluate_model = evaluate
        reason = unpackable(model) if config.train.share_prefixes else None
        if reason is not None:
            note(f"{reason}: prefixes are not shared, each rollout runs with its own")
        # What several micro-batches read has a backward of its own, which DDP and FSDP2 do not see.
        self.micro_step = OPSDStep(
            model,
            objective,
            share=config.train.share_prefixes and reason is None,
            cache_trains=self.processes.count == 1
            and config.train.gradient_checkpointing != "reentrant",
        )
        if self.micro_step.share:
            # FSDP2 brings the model to its device later; the copy that decodes is there.
            whole = getattr(sampler, "whole", None) or model
            self._kernel = try_kernel(whole, self._dtype, self.processes.device)
        self._note, self._sharing_checked, self._engine_checked = note, False, False
        self._split_told = False
        self.budget = config.train.micro_batch_tokens
        self._groups: list[SampleGroup] = []  # the step's
        self._step_is_out, self._left_out = False, 0
        self.parts = StepTimer(self.processes.device)
        super().__init__(
            model=model,
            args=training_arguments(config, bool(evaluate), self.processes.count),
            train_dataset=range(len(rows)),
            eval_dataset=range(1),  # Trainer wants one; our `evaluate` knows its rows
            data_collator=list,
            processing_class=prompts.tokenizer,
        )
        if evaluate is not None:
            self.add_callback(MissedEvaluation(evaluate, log, config.eval.every))
        if self.is_deepspeed_enabled:
            self.add_callback(LateSteps(self.accelerator))
        self.remove_callback(PrinterCallback)  # our display and metrics.jsonl say it already
        if self.is_fsdp_enabled and config.train.precision == "bf16":
            # Weights are gathered in bf16; gradients are summed in fp32.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )

    def train(self, *arguments, **options):
        """Trainer's, with random numbers of its own for each process; where the rollouts' server
        goes away, a checkpoint is written first."""
        if self.processes.index:
            torch.manual_seed(self.config.train.seed + SEED_STRIDE * self.processes.index)
        try:
            return super().train(*arguments, **options)
        except ServerGoneError as error:
            step = self.state.global_step
            place = Path(self.args.output_dir) / f"checkpoint-{step}"
            if step and not place.exists():
                self._save_checkpoint(self.model, None)
            done = f"step {step} is saved" if step else "no step was done"
            raise ServerGoneError(
                f"{error}. Training has stopped, {done}: when the server is back, go on with "
                "`opsd train … --resume`"
            ) from error

    def get_train_dataloader(self) -> DataLoader:
        """All processes see all rows of a step: it is rollouts and samples that they share out."""
        loader = super().get_train_dataloader()
        if self.processes.count > 1:
            shard = loader.batch_sampler
            shard.num_processes, shard.process_index = 1, 0
        return loader

    def training_step(self, model, inputs: list[int], num_items_in_batch=None) -> Tensor:
        """Rollouts, then the loss and its gradient over micro-batches; returns the step's loss."""
        with measured(self.parts):
            return self._step_of([self.rows[i] for i in inputs], model)

    def _step_of(self, rows: list[Row], model) -> Tensor:
        start = time.monotonic()
        if self.average is not None and self.state.global_step:
            self.average.follow(self.model, self.state.global_step)
        asked, problems, measures = self.collector(rows)
        batches = self._mini_batches(problems, measures)
        groups = [group for batch in batches for group in batch]
        model.train()
        if self.micro_step.share and groups:
            measures["token_ratio"] = token_ratio(groups)
            if not self._sharing_checked:
                measures["sharing_difference"] = self._check_sharing(
                    model, groups, measures["token_ratio"]
                )
        loss, totals = self._updates(model, batches)
        if self.model.device.type == "cpu":
            trim_heap()
        self._write_rollouts(asked)
        self.step_log.count(asked, totals, measures, time.monotonic() - start)
        self.parts.begin("optimizer")  # until the step is logged
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

    def _updates(self, model, batches: list[list[SampleGroup]]) -> tuple[Tensor, Totals]:
        """The step's optimizer updates but the last, which Trainer makes: its gradients are left.

        Returns the mean of the updates' losses, and their measures.
        """
        epochs = self.config.train.inner_epochs
        if len(batches) * epochs > 1 and self._is_on_policy():
            batches = [self._with_old(model, batch) for batch in batches]
        updates, totals = batches * epochs, Totals()
        mean = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(updates, start=1):
            loss, own = self._gradients(model, batch)
            self._groups = batch
            totals.include(own)
            if not math.isfinite(loss):
                self._not_finite(f"loss is {float(loss)}")
                break  # nothing is added: Trainer sums what is logged
            mean += loss / len(updates)
            if number == 1:
                self._check_engine(own)
            if number < len(updates) and not self._update(model):
                break
        return mean, totals

    def _update(self, model) -> bool:
        """An optimizer update within a step; False where its gradient is not finite."""
        with phase("optimizer"):
            longest = self.args.max_grad_norm or math.inf
            norm = self.accelerator.clip_grad_norm_(model.parameters(), longest)
            if not math.isfinite(norm):
                self._not_finite(f"gradient's norm is {float(norm)}")
                return False
            self.optimizer.step()
            model.zero_grad()
        return True

    def _is_on_policy(self) -> bool:
        """Whether the student has written what it learns from."""
        return self.objective.samples_rollouts and self.config.rollout.source == "student"

    @torch.no_grad()
    def _with_old(self, model, groups: list[SampleGroup]) -> list[SampleGroup]:
        """The groups with log p of each token under the weights that the step starts with."""
        places = {id(sample): place for place, sample in enumerate(samples_of(groups))}
        parts = [
            self.micro_step.micro_batches(share, self.budget)
            for share in self.micro_step.shares(groups, self.processes.count)
        ]
        own, most = parts[self.processes.index], max(map(len, parts))
        found: dict[int, list[float]] = {}
        with self._autocast():
            for number in range(most):
                batch = own[number] if number < len(own) else idle(groups)
                run = partial(
                    rollout_log_prob, self.model, batch, self.config.loss, self.micro_step.share
                )
                values = called_through(model, self.model, run).tolist()
                for sample in samples_of(batch) if number < len(own) else ():
                    found[places[id(sample)]] = values[: sample.tokens]
                    values = values[sample.tokens :]
        everywhere = self.processes.everywhere(lambda: found)
        old = {place: values for part_of in everywhere for place, values in part_of.items()}
        return [
            group.of([replace(s, old_log_probs=old[places[id(s)]]) for s in group.samples])
            for group in groups
        ]

    def _check_sharing(self, model, groups: list[SampleGroup], ratio: float) -> float:
        with torch.no_grad():  # or DDP would expect a backward
            difference = called_through(
                model,
                self.model,
                lambda: torch.tensor(self.micro_step.check_sharing(groups, self._dtype)),
            ).item()
        self._sharing_checked = True
        same = f"the same to {difference:.1g}" if difference else "the same bit for bit"
        self._note(
            f"Shared prefixes ({self._kernel} instead of {self.config.model.attention}): "
            f"{ratio:.2f} times fewer tokens than each rollout alone, {same}"
        )
        return difference

    def _gradients(self, model, groups: list[SampleGroup]) -> tuple[Tensor, Totals]:
        """`_accumulate`, in smaller micro-batches where memory runs out."""
        while True:
            try:
                return self._accumulate(model, groups)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                smaller = self._smaller(groups)
                if smaller is None:
                    raise UserError(
                        f"train.micro_batch_tokens is {self.budget}: memory has run out "
                        f"({str(error).splitlines()[0]}); lower it or loss.memory_budget, or see "
                        "docs/scale.md for what else saves memory"
                    ) from error
            # Outside, where the error and what its frames refer to are gone.
            self._note(f"Memory has run out: micro-batches of {smaller} tokens, not {self.budget}")
            self.budget = smaller
            model.zero_grad()  # of micro-batches that were done, or half done
            release_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _smaller(self, groups: list[SampleGroup]) -> int | None:
        """Half of the micro-batch; None where that does not split one, or others wait for it."""
        longest = max(group.longest() for group in groups)
        if self.processes.count > 1 or self.budget <= longest:
            return None
        return max(self.budget // 2, longest)

    def _not_finite(self, what: str) -> None:
        """Keep the step's batch; then stop, or leave the step out."""
        step = self.state.global_step + 1
        failed = failed_step(self.config, step, self._groups, self.model, self.average)
        place = Path(self.args.output_dir)
        path = self.processes.once(lambda: save_failed_step(place, failed))
        self._left_out += 1
        kept = f"step {step}: its {what}; `opsd replay {path}` says where"
        if self.config.train.not_finite == "stop" or self._left_out == IN_A_ROW:
            in_a_row = f" ({self._left_out} steps in a row)" if self._left_out > 1 else ""
            raise UserError(
                f"{kept}{in_a_row}. What was saved before is kept, --resume goes on from it, and "
                "train.not_finite=skip leaves such steps out"
            )
        self._note(f"Left out {kept}")
        self.model.zero_grad(set_to_none=True)
        self._step_is_out = True

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if not self._step_is_out and norm is not None and not math.isfinite(norm):
            self._not_finite(f"gradient's norm is {float(norm)}")
        return norm

    def _accumulate(self, model, groups: list[SampleGroup]) -> tuple[Tensor, Totals]:
        """The gradients of all the step's groups; their loss and measures, of all processes."""
        totals, count = Totals(), self.processes.count
        loss = torch.zeros((), device=self.args.device)
        parts = [
            self.micro_step.micro_batches(share, self.budget)
            for share in self.micro_step.shares(groups, count)
        ]
        own, most = parts[self.processes.index], max(map(len, parts))
        # A process may not run weights that are split more often than the others do.
        cache = PrefixCache()
        if self.config.train.sharding not in SPLIT_WEIGHTS:
            own, cache = self.micro_step.cache_prefixes(own, self.budget)
        self._tell_of_split(own)
        # One autocast for all micro-batches: it casts each weight once. Backward leaves it, since
        # what runs in fp32 there is meant to.
        with self._autocast():
            for number in range(most):
                # All processes exchange weights or gradients as often: one with fewer batches runs
                # a sample for nothing.
                work = (own[number], totals) if number < len(own) else (idle(groups), Totals())
                with self._exchange(model, number + 1 == most):
                    some = called_through(model, self.model, partial(self.micro_step, *work))
                    if loss.device.type == "cpu":
                        trim_heap()  # of holes that forward left and backward has no use for
                    with phase("backward"), torch.autocast(loss.device.type, enabled=False):
                        # DDP and FSDP2 take the mean over processes, and it is a sum.
                        self.accelerator.backward(some * count if count > 1 else some)
                        cache.batch_done()
                loss += some.detach()
        if count > 1:
            parts = self.processes.everywhere(lambda: (loss.cpu(), totals.numbers()))
            loss = sum(each for each, _ in parts).to(loss.device)
            totals = Totals()
            for _, other in parts:
                totals.include(other)
        return loss, totals

    def _exchange(self, model, last: bool) -> AbstractContextManager:
        """DDP exchanges gradients once, in the last backward. FSDP2 does each time: to wait would
        take memory for all of them; so does ZeRO, unless each process holds all of them."""
        if self.is_deepspeed_enabled:
            model.set_gradient_accumulation_boundary(last)
        if last or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    def _tell_of_split(self, batches: list[list[SampleGroup]]) -> None:
        """Say once what becomes of a context whose rollouts do not fit a micro-batch together."""
        contexts = [group.student for batch in batches for group in batch]
        split = {id(context): context for context in contexts if isinstance(context, CachedPrefix)}
        if not split or self._split_told:
            return
        self._split_told = True
        what = (
            "each runs once, and what it ran is kept"
            if any(context.trains for context in split.values())
            else "each runs again in every one, as there is no room to keep it"
        )
        self._note(
            f"Rollouts of {len(split)} contexts fill several micro-batches of "
            f"{self.budget} tokens: {what}"
        )

    def _check_engine(self, totals: Totals) -> None:
        """After a run's first rollouts by another engine: are the weights there the student's?"""
        difference = totals.means().get("engine_divergence", 0.0)
        if not self._engine_checked and abs(difference) > ENGINES_DIFFER:
            raise UserError(
                f"rollout.engine is {self.config.rollout.engine!r}: its log-probabilities differ "
                f"from the student's by {difference:.3g} a token in the mean (at most "
                f"{ENGINES_DIFFER} is rounding): it serves other weights than those it was given"
            )
        self._engine_checked = True

    @property
    def _dtype(self) -> torch.dtype:
        """What forward and backward run in."""
        return torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32

    def _autocast(self):
        enabled = self._dtype == torch.bfloat16
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=enabled)

    def _write_rollouts(self, problems: list[Problem]) -> None:
        """What was sampled, where the run keeps it."""
        if self.collector.samples:
            kept, how = self.config.output.rollouts, self.collector.how
            for line in rollout_records(problems, self.processing_class, how, kept):
                self.run_log.rollout({"step": self.state.global_step + 1, **line})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's line for metrics.jsonl, and for Trainer's own loggers (W&B, TensorBoard)."""
        if "loss" in logs and self.step_log.waits:
            parts = self.processes.everywhere(self.parts.take)
            step, left_out = self.state.global_step, self._step_is_out
            self._step_is_out = False
            if not left_out:
                self._left_out = 0
            logs, over = self.step_log.write(step, logs, parts, left_out)
            if over:
                self.control.should_training_stop = True
        super().log(logs, start_time)

    def _run_epoch(self, **arguments) -> None:
        # Resumed from the last checkpoint, after which Trainer would take a step.
        if self.step_log.is_done(self.state.global_step):
            self.control.should_training_stop = True
            return
        super()._run_epoch(**arguments)

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.processes.first:
            self.average.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            self.average.load(Path(checkpoint))

    def evaluate(self, *_, **__) -> dict[str, float]:
        """Our own evaluation, at Trainer's times."""
        record = self._evaluate_model(self.state.global_step)
        metrics = {f"eval_{key}": value for key, value in record.items()}
        # Clears should_evaluate: Trainer would evaluate again when the epoch ends.
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
