"""`opsd chat`: streams the answers of a model and its base model to the questions that you type."""

import argparse
import sys
from collections.abc import Callable

from opsd.common.errors import UserError
from opsd.config.sections import PromptsSection


def run(parsed: argparse.Namespace) -> None:
    """Answers questions until the input ends. Raises UserError."""
    from opsd.cli.first_look import check_model, import_torch, of_run
    from opsd.common.display import Display

    model, config = of_run(parsed.model)
    base = config.model.path if config and parsed.base == "" else parsed.base
    if base == "":
        raise UserError(f"--base needs a name: {parsed.model!r} is no run: its base is not known")
    models = {"model": model} | ({"base": base} if base else {})
    for path in models.values():
        check_model(path, "MODEL", hub=True)
    section = PromptsSection() if parsed.with_solution else PromptsSection(student="{{ problem }}")
    if config is not None and not parsed.plain:
        section = config.prompts
    display = Display(file=sys.stderr)
    import_torch(display)
    talkers = {}
    for name, path in models.items():
        with display.stage(f"Load {path}"):
            talkers[name] = talker(path, section, parsed.max_new_tokens, parsed.temperature)
    display.note("Type a problem; Ctrl-D ends.")
    while (problem := _asked("> ")) is not None:
        solution = (_asked("solution> ") or "") if parsed.with_solution and problem else ""
        for name, answer in talkers.items() if problem else ():
            print(f"\n{name}: ", end="", flush=True)
            answer(problem, solution)


def _asked(prompt: str) -> str | None:
    """Reads a line of the input; returns None at its end."""
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def talker(
    path: str, section: PromptsSection, longest: int, temperature: float
) -> Callable[[str, str], None]:
    """Returns a function of problem and solution that streams the model's answer. With a solution
    the model sees the teacher's prompt; without one, the student's and the conversation so far."""
    import torch
    from transformers import GenerationConfig, TextStreamer

    from opsd.common.format import shown
    from opsd.data.prompts import Prompts
    from opsd.data.rows import Row
    from opsd.evaluate.subject import Subject
    from opsd.models.generation_config import generating_by

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(shown(text, "\n"), end="\n" if stream_end else "", flush=True)

    subject = Subject(path)
    history: list[dict[str, str]] = []
    model, prompts = subject.load().eval(), Prompts(section, subject.tokenizer)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    ends = {"eos_token_id": sorted(subject.stops), "pad_token_id": min(subject.stops)}
    config = GenerationConfig(max_new_tokens=longest, **ends, **drawn)

    @torch.no_grad()
    def answer(problem: str, solution: str) -> None:
        columns = {"problem": problem, "solution": solution, "answer": "", "images": ""}
        row = Row(problem, solution, "", columns, history=() if solution else tuple(history))
        ids = prompts.ids(row, "teacher" if solution else "student")
        tokens = torch.tensor([ids], device=model.device)
        printer = Printer(subject.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with generating_by(model, GenerationConfig()):
            more = {"attention_mask": torch.ones_like(tokens), "streamer": printer}
            whole = model.generate(tokens, generation_config=config, **more)
        said = str(subject.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True))
        if not solution:
            history.append({"role": "user", "content": problem})
            history.append({"role": "assistant", "content": said})

    return answer
