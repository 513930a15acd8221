"""The training loop: transformers' Trainer, with rollouts before each step's forward passes.

Trainer keeps the optimizer, the schedule, checkpoints with RNG state and resuming. What is ours is
one step: sample rollouts, make the method's samples, and add up micro-batches.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from opsd.checkpoints import WholeCheckpoints
from opsd.config import Config
from opsd.data import Row
from opsd.environment import trim_heap
from opsd.errors import UserError
from opsd.objectives import Objective, Problem, Sample, Totals
from opsd.prefix import KeptPrefixes, keeping, try_kernel, unpackable
from opsd.prompts import Prompts
from opsd.rollout import Rollout, Sampler, Sampling, ServerGoneError
from opsd.runlog import RunLog, read_lines
from opsd.step import OPSDStep, token_ratio
from opsd.teacher import MovingAverage

Evaluate = Callable[[int], dict]
"""step → the evaluation's record; runs the held-out problems and writes them down."""

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
    ):
        self.average, self.teacher_sampler = average, teacher_sampler
        self.config, self.rows, self.prompts, self.objective = config, rows, prompts, objective
        self.sampler, self.run_log = sampler, log
        self.on_step = on_step
        self._evaluate_model = evaluate
        reason = unpackable(model) if config.train.share_prefixes else None
        if reason is not None:
            note(f"{reason}: prefixes are not shared, each rollout runs with its own")
        self.micro_step = OPSDStep(
            model, objective, share=config.train.share_prefixes and reason is None
        )
        if self.micro_step.share:
            self._kernel = try_kernel(model, self._dtype)
        self._note, self._sharing_checked, self._engine_checked = note, False, False
        self._split_told = False
        self._step: dict[str, float] = {}
        super().__init__(
            model=model,
            args=training_arguments(config, bool(evaluate)),
            train_dataset=range(len(rows)),
            eval_dataset=range(1),  # Trainer wants one; our `evaluate` knows its rows
            data_collator=list,
            processing_class=prompts.tokenizer,
        )
        if evaluate is not None:
            self.add_callback(MissedEvaluation(evaluate, log.directory, config.eval.every))
        self.remove_callback(PrinterCallback)  # our display and metrics.jsonl say it already
        if self.args.world_size > 1:
            raise UserError(
                f"WORLD_SIZE is {self.args.world_size}: this release trains in one process"
            )
        self.rollout = Sampling(**config.rollout.model_dump(include=_SAMPLING))

    def train(self, *arguments, **options):
        """Trainer's; where the rollouts' server goes away, a checkpoint is written first."""
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

    def training_step(self, model, inputs: list[int], num_items_in_batch=None) -> Tensor:
        """Rollouts, then the loss and its gradient over micro-batches; returns the step's loss."""
        start = time.monotonic()
        problems = self._problems([self.rows[i] for i in inputs])
        sampled = time.monotonic()
        samples, measures = self.objective.samples(problems)
        totals = Totals()
        loss = torch.zeros((), device=model.device)
        model.train()
        if self.micro_step.share and samples:
            measures["token_ratio"] = token_ratio(samples)
            if not self._sharing_checked:
                difference = self.micro_step.check_sharing(samples, self._dtype)
                measures["sharing_difference"] = difference
                self._sharing_checked = True
                same = f"the same to {difference:.1g}" if difference else "the same bit for bit"
                self._note(
                    f"Shared prefixes ({self._kernel} instead of {self.config.model.attention}): "
                    f"{measures['token_ratio']:.2f} times fewer tokens than each rollout alone, "
                    f"{same}"
                )
        # One autocast for all micro-batches: it casts each weight once. Backward leaves it, since
        # what runs in fp32 there is meant to.
        budget = self.config.train.micro_batch_tokens
        batches = self.micro_step.micro_batches(samples, budget)
        kept = self.micro_step.kept_prefixes(batches, budget)
        self._tell_of_split(kept, samples)
        with self._autocast(), keeping(kept):
            for batch in batches:
                part = self.micro_step(batch, totals)
                if model.device.type == "cpu":
                    trim_heap()  # of holes that forward left and backward has no use for
                with torch.autocast(model.device.type, enabled=False):
                    self.accelerator.backward(part)
                    kept.batch_done()
                loss += part.detach()
        self._check_engine(totals)
        if model.device.type == "cpu":
            trim_heap()
        self._count(problems, totals, measures, sampled - start, time.monotonic() - start)
        return loss

    def _tell_of_split(self, kept: KeptPrefixes, samples: list[Sample]) -> None:
        """Say once what becomes of a context whose rollouts do not fit a micro-batch together."""
        split = {tuple(s.roles[0].context) for s in samples if tuple(s.roles[0].context) in kept}
        if not split or self._split_told:
            return
        self._split_told = True
        what = (
            "each runs once, and what it ran is kept"
            if kept.training
            else "each runs again in every one, as there is no room to keep it"
        )
        self._note(
            f"Rollouts of {len(split)} contexts fill several micro-batches of "
            f"{self.config.train.micro_batch_tokens} tokens: {what}"
        )

    def _problems(self, rows: list[Row]) -> list[Problem]:
        contexts = [self.prompts.context(row) for row in rows]
        if self.average is not None and self.state.global_step:
            self.average.follow(self.model)
        copies = self.config.rollout.per_problem if self.objective.samples_rollouts else 0
        rollouts: list[Rollout] = []
        if copies and self.config.rollout.source == "reference":
            copies = 1  # they would be alike
            rollouts = [Rollout(self.prompts.target(row), True) for row in rows]
        elif copies:
            role, sampler = "student", self.sampler
            sampler.follow(self.model)
            if self.config.rollout.source == "teacher":
                role, sampler = self.objective.teacher_role, self.teacher_sampler
            asked = [getattr(context, role) for context in contexts for _ in range(copies)]
            rollouts = sampler.sample(asked, self.rollout)
        return [
            Problem(row, context, rollouts[i * copies : (i + 1) * copies])
            for i, (row, context) in enumerate(zip(rows, contexts, strict=True))
        ]

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

    def _count(self, problems, totals: Totals, measures, rollout_seconds, seconds) -> None:
        rollouts = [rollout for problem in problems for rollout in problem.rollouts]
        length = sum(len(rollout.ids) for rollout in rollouts)
        counters = self.run_log.counters
        if self.config.rollout.source != "reference":
            counters.generated_tokens += length
        counters.trained_tokens += totals.tokens
        counters.seconds += seconds
        self._step = {"divergence": None, "student_entropy": None, **totals.means(), **measures}
        if rollouts:
            self._step["rollout_length"] = length / len(rollouts)
            self._step["truncated_fraction"] = sum(not r.finished for r in rollouts) / len(rollouts)
            self._step["rollout_seconds"] = rollout_seconds
        else:
            self._step["rollout_length"] = totals.tokens / len(problems)
        self._step["tokens_per_second"] = totals.tokens / seconds

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's line for metrics.jsonl, and for Trainer's own loggers (W&B, TensorBoard)."""
        if "loss" in logs and self._step:
            line = {
                "step": self.state.global_step,
                "method": self.config.method,
                **asdict(self.run_log.counters),
                **logs,
                **self._step,
            }
            self.run_log.metrics(line)
            self.on_step(line)
            self._step = {}
            logs = {key: value for key, value in line.items() if isinstance(value, int | float)}
            counters = self.run_log.counters
            spent = counters.generated_tokens or counters.trained_tokens
            budget = self.config.train.token_budget
            if budget is not None and spent >= budget:
                self.control.should_training_stop = True
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None:
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


class MissedEvaluation(TrainerCallback):
    """Evaluates a checkpoint that was written because its evaluation could not be done."""

    def __init__(self, evaluate: Evaluate, directory: Path, every: int):
        self.evaluate, self.directory, self.every = evaluate, directory, every

    def on_train_begin(self, args, state, control, **_) -> None:
        """Where training goes on from such a checkpoint, whose weights have been loaded."""
        step = state.global_step
        if step == 0 or self.every == 0 or step % self.every:
            return
        lines = read_lines(self.directory / "evaluations.jsonl")
        if not any(line["step"] == step and line["role"] == "student" for line in lines):
            self.evaluate(step)


_SAMPLING = {"max_new_tokens", "temperature", "top_p", "top_k", "batch_size"}


def training_arguments(config: Config, evaluates: bool) -> TrainingArguments:
    """Our sections in Trainer's words. Precision is ours: fp32 weights, autocast in the step."""
    train = config.train
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return TrainingArguments(
        output_dir=config.output.dir,
        max_steps=train.steps,
        per_device_train_batch_size=train.problems_per_step,
        learning_rate=train.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        seed=train.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates and config.eval.every else "no",
        eval_steps=config.eval.every or None,
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or train.steps,
        save_total_limit=train.save_total_limit,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        report_to=config.output.report_to or "none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
