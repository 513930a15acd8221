"""A model that answers as it decodes, for `opsd chat`."""

import torch
from transformers import GenerationConfig, TextStreamer

from opsd.common.format import shown
from opsd.config.sections import PromptsSection
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.evaluate.subject import Subject
from opsd.models.generation_config import generating_by
from opsd.rollout.base import Sampling


class Printer(TextStreamer):
    """Prints each word when it is there; it can do nothing to the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(shown(text, "\n"), end="\n" if stream_end else "", flush=True)


class Talker:
    """A model with its own conversation. With a solution it sees the teacher's context."""

    def __init__(self, path: str, section: PromptsSection, sampling: Sampling):
        subject = Subject(path)
        self.model, self.stops, self.sampling = subject.load().eval(), subject.stops, sampling
        self.prompts = Prompts(section, subject.tokenizer)
        self.history: tuple[dict[str, str], ...] = ()

    @torch.no_grad()
    def answer(self, problem: str, solution: str = "") -> str:
        """The answer, printed as it comes; what was said before is a part of the context."""
        columns = {"problem": problem, "solution": solution, "answer": ""}
        row = Row(problem, solution, "", columns, self.history)
        ids = self.prompts.ids(row, "teacher" if solution else "student")
        tokens = torch.tensor([ids], device=self.model.device)
        temperature = self.sampling.temperature
        config = GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=sorted(self.stops),
            pad_token_id=min(self.stops),
            do_sample=temperature > 0,
            top_k=0,
            **({"temperature": temperature} if temperature else {}),
        )
        tokenizer = self.prompts.tokenizer
        printer = Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with generating_by(self.model, GenerationConfig()):
            whole = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=config,
                streamer=printer,
            )
        text = tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
        if not solution:
            said = ({"role": "user", "content": problem}, {"role": "assistant", "content": text})
            self.history += said
        return text
