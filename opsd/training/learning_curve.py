"""A run's learning curve: its held-out evaluations, and what a reader is shown of each."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from opsd.common.display import Display
from opsd.config.sections import EvalSection
from opsd.rollout import Sampler
from opsd.runs.log import RunLog
from opsd.training.held_out import Evaluation, HeldOut
from opsd.training.sample_records import sample_records


@dataclass
class LearningCurve:
    """The lines of evaluations.jsonl, and of samples.jsonl."""

    method: str  # the run's
    section: EvalSection  # the run's `eval`
    test: HeldOut  # the held-out problems
    model: PreTrainedModel  # what trains, and what is measured
    sampler: Sampler  # answers by the model's weights, which it is given first
    # The model whose weights the sampler reads. The page shows its view of the samples.
    inference: PreTrainedModel
    teacher: PreTrainedModel  # the page shows its view too, from the context of `teacher_role`
    teacher_role: str
    log: RunLog
    display: Display
    keep_if_best: Callable[[float], None]  # told each accuracy of the student
    report: Callable[[dict, list], None]  # told each line, and rows of its completions

    def begin(self, before: dict[str, Evaluation] | None = None) -> None:
        """Step 0; `before`: its evaluations by role, where they are known already."""
        if before is None:
            before = {"student": self._answer(0)}
            if self.section.teacher:
                role = self.teacher_role
                before["teacher"] = self.test.evaluate(self.teacher, self.display, role, "teacher")
        for role, result in before.items():
            self._record(0, role, result)

    def __call__(self, step: int) -> dict:
        """Measure the model as it is after this step; returns its line."""
        return self._record(step, "student", self._answer(step))

    def _answer(self, step: int) -> Evaluation:
        self.sampler.sync_weights(self.model)
        name = f"student, step {step}"
        return self.test.evaluate(self.inference, self.display, name=name, sampler=self.sampler)

    def _record(self, step: int, role: str, result: Evaluation) -> dict:
        counters = self.log.counters
        place = {
            "step": step,
            "generated_tokens": counters.generated_tokens,
            "trained_tokens": counters.trained_tokens,
        }
        if role == "student" and self.log.writes:
            for sample in sample_records(
                self.inference,
                self.teacher,
                self.test.prompts,
                self.test.rows,
                result,
                self.section.samples,
                self.teacher_role,
            ):
                self.log.sample({**place, "method": self.method, **sample})
        if role == "student":
            self.keep_if_best(result.accuracy)
        line = {**place, "role": role, **result.record()}
        graded = zip(self.test.rows, result.completions, result.grades, strict=True)
        rows = [(step, r.problem, r.answer, text, grade.correct) for r, text, grade in graded]
        self.report(line, rows)
        self.log.evaluation(line)  # written last: on resume, samples without this line are dropped
        return line
