"""`opsd plan`: memory, tokens and time of a run, before any weight is loaded."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict

from transformers import PreTrainedConfig

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.format import duration, number, size
from opsd.config.config import Config
from opsd.config.load import load_config, parse_config, with_overrides
from opsd.plan.architectures import architecture
from opsd.plan.gpus import GPUS
from opsd.plan.memory import Planner
from opsd.plan.suggestions import fit
from opsd.plan.time_estimate import READING_SHARE, TRAINING_SHARE, plan_work
from opsd.plan.workload import Lengths, count_tokens, sample_groups
from opsd.training.micro_batches import stream_tokens


def plan_command(asked: Namespace) -> None:
    """Shows the plan of a run: what is asked for is a config, or a model under the defaults."""
    config = _config(asked)
    student = architecture(config.model)
    gpu = None if asked.gpu is None else GPUS[asked.gpu]
    lengths = Lengths(asked.prompt_tokens, asked.solution_tokens, config.rollout.max_new_tokens)
    device = None if gpu is None else int(gpu.memory)
    if config.rollout.engine == "vllm" and device is None:
        raise UserError("rollout.engine is 'vllm': say with --gpu which GPU it is planned for")
    if config.train.sharding != "none" and asked.gpus == 1:
        raise UserError(
            f"train.sharding is {config.train.sharding!r}: say with --gpus over how many"
        )

    _check_window(student, lengths)
    planner = Planner(student, lengths, device, asked.gpus)
    memory = planner.memory(config)
    tokens = count_tokens(config, sample_groups(config, lengths), lengths)
    work = None
    if gpu is not None:
        work = plan_work(config, student, planner.parameters, tokens, lengths, gpu)
    room = asked.memory if asked.memory is not None else device
    changed = None
    if room is not None and memory.peak > room:
        longest = lengths.prompt + lengths.solution + lengths.rollout
        changed = fit(config, room, longest, planner)
    if asked.json:
        print(
            json.dumps(
                _record(config, asked, planner, memory, tokens, work, room, changed), indent=2
            )
        )
    else:
        _show(config, asked, planner, memory, tokens, work, room, changed)


def _config(asked: Namespace) -> Config:
    if asked.model.endswith((".yaml", ".yml")):
        return load_config(asked.model, asked.overrides)
    overrides = [f"model.path={json.dumps(asked.model)}", "data.source=none", *asked.overrides]
    return parse_config(with_overrides({}, overrides))


def _check_window(student: PreTrainedConfig, lengths: Lengths) -> None:
    window = getattr(student.get_text_config(), "max_position_embeddings", None)
    longest = lengths.prompt + lengths.solution + lengths.rollout
    if window is not None and longest > window:
        raise UserError(
            f"--prompt-tokens, --solution-tokens and rollout.max_new_tokens are {longest} "
            f"together: the model's window is {window}"
        )


def _show(config, asked, planner, memory, tokens, work, room, changed) -> None:
    display, lengths = Display(), planner.lengths
    many = "one" if asked.gpus == 1 else f"{asked.gpus}"
    where = "a CPU" if asked.gpu is None else f"{many} {asked.gpu.upper()}"
    display.note(
        f"{config.model.path}: {planner.parameters:,} parameters; {config.method} on {where}, "
        f"prompts of {lengths.prompt} tokens, solutions of {lengths.solution}, rollouts of "
        f"{lengths.rollout}"
    )
    _show_parts(config, planner, memory, tokens, display)
    if work is not None:
        each, total = 1 / asked.gpus, work.seconds * config.train.steps / asked.gpus
        rows = [
            ("sampling", f"{work.sampling_flops:.2e}", duration(work.sampling_seconds * each)),
            (
                "training",
                f"{work.student_flops + work.teacher_flops:.2e}",
                duration(work.training_seconds * each),
            ),
            (f"{config.train.steps} steps", "", duration(total)),
        ]
        display.table(f"Time on {where}", ["", "operations", "time"], rows)
        display.note(
            f"Time is arithmetic, not a measurement: {TRAINING_SHARE:.0%} of the GPU's peak "
            f"operations, {READING_SHARE:.0%} of its bandwidth."
        )
    if room is None:
        return
    if changed is None:
        display.note(f"It fits into {size(room)}.")
        return
    what, _, after = changed
    if after.peak <= room:
        display.note(f"To fit into {size(room)}: {', '.join(what)} (peak {size(after.peak)}).")
    else:
        tried = f"even with {', '.join(what)} " if what else ""
        display.note(
            f"It does not fit into {size(room)}: {tried}the peak is {size(after.peak)}. A smaller "
            "model, or more GPUs."
        )


def show_plan(config: Config, planner: Planner, display: Display) -> None:
    """Shows the memory and the tokens of a run's steps."""
    tokens = count_tokens(config, sample_groups(config, planner.lengths), planner.lengths)
    _show_parts(config, planner, planner.memory(config), tokens, display)


def _show_parts(config, planner, memory, tokens, display) -> None:
    rows = [(name, size(value), "always") for name, value in memory.always.items()]
    rows += [(name, size(value), "a step") for name, value in memory.step.items()]
    rows += [(name, size(value), "sampling") for name, value in memory.sampling.items()]
    rows.append(("peak", size(memory.peak), "always, and a step or sampling"))
    title = "Memory on each" if planner.processes > 1 else "Memory"
    display.table(title, ["part", "size", "when"], rows)
    ratio = tokens.alone / tokens.shared
    counts = [
        ("generated", number(tokens.generated)),
        ("trained on", number(tokens.trained)),
        ("run, each rollout with a context of its own", number(tokens.alone)),
        (f"run, contexts shared ({ratio:.2f} times fewer)", number(tokens.shared)),
        ("largest micro-batch, the student's", number(_largest(config, planner))),
    ]
    display.table("Tokens a step", ["", "tokens"], counts)


def _record(config, asked, planner, memory, tokens, work, room, changed) -> dict:
    record = {
        "model": config.model.path,
        "parameters": planner.parameters,
        "memory": {
            "always": memory.always,
            "step": memory.step,
            "sampling": memory.sampling,
            "peak": memory.peak,
        },
        "tokens": asdict(tokens),
        "micro_batch_tokens": _largest(config, planner),
    }
    if work is not None:
        record["estimate"] = {
            "gpu": asked.gpu,
            "gpus": asked.gpus,
            **asdict(work),
            "seconds": work.seconds / asked.gpus,
        }
    if room is not None:
        record["fits"] = changed is None
    if changed is not None:
        what, fitting, after = changed
        record["to_fit"] = {
            "changes": what,
            "overrides": _differences(config, fitting),
            "peak": after.peak,
            "fits": after.peak <= room,
        }
    return record


def _largest(config: Config, planner: Planner) -> int:
    batch = planner.micro_batch(config)
    return stream_tokens(batch).student


def _differences(before: Config, after: Config) -> list[str]:
    old, new = before.model_dump(), after.model_dump()
    return [
        f"{section}.{name}={json.dumps(value)}"
        for section, fields in new.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if value != old[section][name]
    ]
