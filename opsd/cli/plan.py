"""`opsd plan`: memory, tokens and time of a run, before any weight is loaded."""

import argparse
import json
from dataclasses import asdict, dataclass

from transformers import PreTrainedConfig

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.format import duration, number, size
from opsd.config.compatibility import refused
from opsd.config.config import Config
from opsd.config.load import load_config, parse_config, with_overrides
from opsd.plan.architectures import architecture
from opsd.plan.gpus import GPUS
from opsd.plan.memory import Memory, Planner
from opsd.plan.suggestions import fit
from opsd.plan.time_estimate import READING_SHARE, TRAINING_SHARE, Work, plan_work
from opsd.plan.workload import Lengths, Tokens, count_tokens, sample_groups
from opsd.training.micro_batches import stream_tokens


@dataclass
class Plan:
    """The memory and the tokens of a run's steps."""

    config: Config
    planner: Planner

    def __post_init__(self):
        lengths = self.planner.lengths
        self.memory: Memory = self.planner.memory(self.config)
        self.tokens: Tokens = count_tokens(
            self.config, sample_groups(self.config, lengths), lengths
        )
        largest = stream_tokens(self.planner.micro_batch(self.config))
        self.micro_batch_tokens: int = largest.student

    def show(self, display: Display) -> None:
        """Shows both as tables."""
        memory, tokens = self.memory, self.tokens
        parts = ((memory.always, "always"), (memory.step, "a step"), (memory.sampling, "sampling"))
        rows = [(name, size(value), when) for part, when in parts for name, value in part.items()]
        rows.append(("peak", size(memory.peak), "always, and a step or sampling"))
        title = "Memory on each" if self.planner.processes > 1 else "Memory"
        display.table(title, ["part", "size", "when"], rows)
        ratio = tokens.alone / tokens.shared
        counts = {
            "generated": tokens.generated,
            "trained on": tokens.trained,
            "run, each rollout with a context of its own": tokens.alone,
            f"run, contexts shared ({ratio:.2f} times fewer)": tokens.shared,
            "largest micro-batch, the student's": self.micro_batch_tokens,
        }
        display.table(
            "Tokens a step", ["", "tokens"], [(name, number(n)) for name, n in counts.items()]
        )

    def record(self) -> dict:
        """The plan for `--json`."""
        return {
            "model": self.config.model.path,
            "parameters": self.planner.parameters,
            "memory": {**asdict(self.memory), "peak": self.memory.peak},
            "tokens": asdict(self.tokens),
            "micro_batch_tokens": self.micro_batch_tokens,
        }


def plan_command(asked: argparse.Namespace) -> None:
    """Shows the plan of a run: what is asked for is a config, or a model under the defaults."""
    config = _config(asked)
    student = architecture(config.model)
    gpu = GPUS.get(asked.gpu)
    lengths = Lengths(asked.prompt_tokens, asked.solution_tokens, config.rollout.max_new_tokens)
    device = None if gpu is None else int(gpu.memory)
    if config.rollout.engine == "vllm" and device is None:
        raise refused(config, "rollout.engine: say with --gpu which GPU it is planned for")
    if config.train.sharding != "none" and asked.gpus == 1:
        raise refused(config, "train.sharding: say with --gpus over how many")
    longest = _check_window(student, lengths)
    plan = Plan(config, planner := Planner(student, lengths, device, asked.gpus))
    work = gpu and plan_work(config, student, planner.parameters, plan.tokens, lengths, gpu)
    room = device if asked.memory is None else asked.memory
    changed = None
    if room is not None and plan.memory.peak > room:
        changed = fit(config, room, longest, planner)
    if asked.json:
        print(json.dumps(_record(asked, plan, work, room, changed), indent=2))
        return
    display = Display()
    many = "one" if asked.gpus == 1 else asked.gpus
    where = "a CPU" if gpu is None else f"{many} {asked.gpu.upper()}"
    display.note(
        f"{config.model.path}: {planner.parameters:,} parameters; {config.method} on {where}, "
        f"prompts of {lengths.prompt} tokens, solutions of {lengths.solution}, rollouts of "
        f"{lengths.rollout}"
    )
    plan.show(display)
    if work is not None:
        _show_time(work, where, asked.gpus, config.train.steps, display)
    if room is not None:
        display.note(_fits(room, changed))


def _config(asked: argparse.Namespace) -> Config:
    if asked.model.endswith((".yaml", ".yml")):
        return load_config(asked.model, asked.overrides)
    overrides = [f"model.path={json.dumps(asked.model)}", "data.source=none", *asked.overrides]
    return parse_config(with_overrides({}, overrides))


def _check_window(student: PreTrainedConfig, lengths: Lengths) -> int:
    """Tokens of the longest sequence. Raises UserError where the model's window is shorter."""
    window = getattr(student.get_text_config(), "max_position_embeddings", None)
    longest = lengths.prompt + lengths.solution + lengths.rollout
    if window is not None and longest > window:
        raise UserError(
            f"--prompt-tokens, --solution-tokens and rollout.max_new_tokens are {longest} "
            f"together: the model's window is {window}"
        )
    return longest


def _show_time(work: Work, where: str, gpus: int, steps: int, display: Display) -> None:
    training = f"{work.student_flops + work.teacher_flops:.2e}"
    rows = [
        ("sampling", f"{work.sampling_flops:.2e}", duration(work.sampling_seconds / gpus)),
        ("training", training, duration(work.training_seconds / gpus)),
        (f"{steps} steps", "", duration(work.seconds * steps / gpus)),
    ]
    display.table(f"Time on {where}", ["", "operations", "time"], rows)
    display.note(
        f"Time is arithmetic, not a measurement: {TRAINING_SHARE:.0%} of the GPU's peak "
        f"operations, {READING_SHARE:.0%} of its bandwidth."
    )


def _fits(room: float, changed: tuple[list[str], Config, Memory] | None) -> str:
    """What has to change, if anything, for the run to fit."""
    if changed is None:
        return f"It fits into {size(room)}."
    what, _, after = changed
    if after.peak <= room:
        return f"To fit into {size(room)}: {', '.join(what)} (peak {size(after.peak)})."
    tried = f"even with {', '.join(what)} " if what else ""
    return (
        f"It does not fit into {size(room)}: {tried}the peak is {size(after.peak)}. A smaller "
        "model, or more GPUs."
    )


def _record(asked: argparse.Namespace, plan: Plan, work, room, changed) -> dict:
    record = plan.record()
    if work is not None:
        seconds = work.seconds / asked.gpus
        record["estimate"] = {
            "gpu": asked.gpu,
            "gpus": asked.gpus,
            **asdict(work),
            "seconds": seconds,
        }
    if room is not None:
        record["fits"] = changed is None
    if changed is not None:
        what, fitting, after = changed
        record["to_fit"] = {
            "changes": what,
            "overrides": _differences(plan.config, fitting),
            "peak": after.peak,
            "fits": after.peak <= room,
        }
    return record


def _differences(before: Config, after: Config) -> list[str]:
    old, new = before.model_dump(), after.model_dump()
    return [
        f"{section}.{name}={json.dumps(value)}"
        for section, fields in new.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if value != old[section][name]
    ]
