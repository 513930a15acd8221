"""`opsd plan`: estimates a run's memory, tokens and time without loading weights."""

import argparse
import json
import shlex
from dataclasses import asdict, dataclass

from opsd.common.display import Display
from opsd.common.format import duration, number, size
from opsd.common.system import memory as installed
from opsd.config.config import Config
from opsd.config.load import merge, parse_config
from opsd.models.load import window
from opsd.plan.architectures import architecture
from opsd.plan.known_models import check_window
from opsd.plan.memory import Memory, Planner
from opsd.plan.suggestions import fit
from opsd.plan.time_estimate import READING_SHARE, TRAINING_SHARE, Work, plan_work
from opsd.plan.workload import Lengths, Tokens, count_tokens, sample_groups
from opsd.training.micro_batches import stream_tokens


@dataclass
class Plan:
    """The memory (bytes) and the tokens of a run's steps, computed when it is made."""

    config: Config
    planner: Planner

    def __post_init__(self):
        lengths = self.planner.lengths
        self.memory: Memory = self.planner.memory(self.config)
        groups = sample_groups(self.config, lengths)
        self.tokens: Tokens = count_tokens(self.config, groups, lengths)
        largest = self.planner.micro_batch(self.config)
        self.micro_batch_tokens: int = stream_tokens(largest).student
        self.loss, _ = self.planner.loss_plan(self.config)

    def show(self, display: Display) -> None:
        """Shows memory and tokens as two tables."""
        memory, tokens = self.memory, self.tokens
        parts = ((memory.always, "always"), (memory.step, "a step"), (memory.sampling, "sampling"))
        rows = [(name, size(value), when) for part, when in parts for name, value in part.items()]
        rows.append(("peak", size(memory.peak), "always, and a step or sampling"))
        title = "Memory on each" if self.planner.processes > 1 else "Memory"
        display.table(title, ["part", "size", "when"], rows)
        if self.planner.device_memory is None and memory.peak > (here := installed()[0]):
            display.note(f"This machine has {size(here)}: `opsd plan … --memory SIZE` makes it fit")
        ratio, loss = tokens.alone / tokens.shared, self.loss
        tile = "" if loss.one_pass else f", {loss.columns:,} entries at a time"
        counts = {
            "generated": tokens.generated,
            "trained on": tokens.trained,
            "run, each rollout with a context of its own": tokens.alone,
            f"run, contexts shared ({ratio:.2f} times fewer)": tokens.shared,
            "largest micro-batch, the student's": self.micro_batch_tokens,
            f"the loss: a block of logits{tile}": loss.rows,
        }
        if self.config.model.lora is None:
            counts["the loss: a product for the head's gradient"] = loss.group
        display.table("Tokens a step", ["", "tokens"], [(n, number(c)) for n, c in counts.items()])


def plan_command(asked: argparse.Namespace, config: Config, display: Display) -> None:
    """Shows the config's plan; with --json the display has the progress only. Raises UserError."""
    student = architecture(config.model)
    gpu, gpus = asked.gpu, asked.gpus
    lengths = Lengths(asked.prompt_tokens, asked.solution_tokens, config.rollout.max_new_tokens)
    device = None if gpu is None else int(gpu.memory)
    tokens = lengths.prompt, lengths.solution, lengths.rollout
    check_window(*tokens, window(student))
    with display.stage("Plan a step"):
        planner = Planner(student, lengths, device, asked.gpus)
        reason = planner.unshared_because if config.train.share_prefixes else None
        if reason is not None:  # training would say the same
            config = parse_config(merge(config.model_dump(), {"train": {"share_prefixes": False}}))
        plan = Plan(config, planner)
        work = plan_work(config, planner, plan.tokens, gpu)
    if not asked.json:
        _show(asked, plan, work, reason, display)
    room = device if asked.memory is None else asked.memory
    found = None
    if room is not None and plan.memory.peak > room:
        with display.stage(f"Search for what fits into {size(room)}", unit="trials") as stage:
            changes, overrides, config = fit(config, room, sum(tokens), planner, stage.advance)
        then = Plan(config, planner)
        faster = plan_work(config, planner, then.tokens, gpu)
        found = {
            "changes": changes,
            "overrides": overrides,
            "peak": then.memory.peak,
            "fits": then.memory.peak <= room,
            "seconds": faster and faster.seconds / gpus,
        }
    if asked.json:
        print(json.dumps(_record(asked, plan, work, room, found), indent=2))
    elif room is not None:
        display.note(_advice(room, found, config.train.steps))


def _show(
    asked: argparse.Namespace, plan: Plan, work: Work | None, reason: str | None, display: Display
) -> None:
    """Shows what is planned, and its memory, tokens and time. reason: prefixes are not shared."""
    config, planner, gpus = plan.config, plan.planner, asked.gpus
    lengths = planner.lengths
    where = f"{'one' if gpus == 1 else gpus} {asked.gpu.name}" if asked.gpu else "a CPU"
    display.note(
        f"{config.model.path}: {planner.parameters:,} parameters; {config.method} on {where}, "
        f"prompts of {lengths.prompt} tokens, solutions of {lengths.solution}, rollouts of "
        f"{lengths.rollout}"
    )
    if reason is not None:
        alone = "planned with each rollout's own prefix; a run may share by its cache"
        display.note(f"{reason}: {alone}")
    plan.show(display)
    if work is not None:
        steps, training = config.train.steps, f"{work.student_flops + work.teacher_flops:.2e}"
        sampling = duration(work.sampling_seconds / gpus)
        rows = [
            ("sampling", f"{work.sampling_flops:.2e}", sampling),
            ("training", training, duration(work.training_seconds / gpus)),
            (f"{steps} steps", "", duration(work.seconds * steps / gpus)),
        ]
        display.table(f"Time on {where}", ["", "operations", "time"], rows)
        display.note(
            f"Time is arithmetic, not a measurement: {TRAINING_SHARE:.0%} of the GPU's peak "
            f"operations, {READING_SHARE:.0%} of its bandwidth."
        )


def _advice(room: float, found: dict | None, steps: int) -> str:
    """Says whether the run fits; if not, the overrides that make it fit, and their time."""
    if found is None:
        return f"It fits into {size(room)}."
    words, peak, each = ", ".join(found["changes"]), size(found["peak"]), found["seconds"]
    if not found["fits"]:
        tried = f"even with {words} " if words else ""
        return f"It does not fit into {size(room)}: {tried}it takes {peak}. Take more GPUs."
    time = f", {steps} steps in {duration(each * steps)}" if each else ""
    pasted = shlex.join(found["overrides"])
    return f"To fit into {size(room)} (peak {peak}{time}): {words}. Add\n{pasted}"


def _record(asked: argparse.Namespace, plan: Plan, work, room, found) -> dict:
    record = {
        "model": plan.config.model.path,
        "parameters": plan.planner.parameters,
        "memory": {**asdict(plan.memory), "peak": plan.memory.peak},
        "tokens": asdict(plan.tokens),
        "micro_batch_tokens": plan.micro_batch_tokens,
        "loss": asdict(plan.loss),
    }
    if work is not None:
        facts = {"gpu": asked.gpu.name, "gpus": asked.gpus, **asdict(work)}
        record["estimate"] = facts | {"seconds": work.seconds / asked.gpus}
    if room is not None:
        record["fits"] = found is None
    return record if found is None else record | {"to_fit": found}
