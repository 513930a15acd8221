"""A run's learning curve: its held-out evaluations, and the samples that are shown of each."""

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
    """Evaluates the model and writes evaluations.jsonl and samples.jsonl."""

    method: str  # of the run
    section: EvalSection  # the run's `eval`
    test: HeldOut  # the held-out problems
    model: PreTrainedModel  # the trained model, which is evaluated
    sampler: Sampler  # samples the answers, after it has got the model's weights
    # The model that the sampler reads. Its probabilities of the samples are shown in the report.
    inference: PreTrainedModel
    teacher: PreTrainedModel  # so are this model's, in the context of `teacher_role`
    teacher_role: str
    log: RunLog
    display: Display
    keep_if_best: Callable[[float], None]  # called with each accuracy of the student
    report: Callable[[dict, list], None]  # called with each line and rows of its completions

    def begin(self, before: dict[str, Evaluation] | None = None) -> None:
        """Evaluate at step 0. `before`: these evaluations by role, if they are already known."""
        if before is None:
            before = {"student": self._answer(0)}
            if self.section.teacher:
                role = self.teacher_role
                before["teacher"] = self.test.evaluate(self.teacher, self.display, role, "teacher")
        for role, result in before.items():
            self._record(0, role, result)

    def __call__(self, step: int) -> dict:
        """Evaluate the model after this step; returns the line that was written."""
        return self._record(step, "student", self._answer(step))

    def _answer(self, step: int) -> Evaluation:
        self.sampler.sync_weights(self.model)
        name = f"student, step {step}"
        return self.test.evaluate(self.inference, self.display, name=name, sampler=self.sampler)

    def _record(self, step: int, role: str, result: Evaluation) -> dict:
        counters = self.log.counters
        place = {"step": step, "generated_tokens": counters.generated_tokens}
        place["trained_tokens"] = counters.trained_tokens
        if role == "student" and self.log.writes and self.section.samples:
            models, test = (self.inference, self.teacher), self.test
            count = min(self.section.samples, len(test.rows))
            made = sample_records(
                *models, test.prompts, test.rows, result, count, self.teacher_role
            )
            with self.display.stage("Score samples for the report", count) as stage:
                for sample in made:
                    self.log.sample({**place, "method": self.method, **sample})
                    stage.advance()
        if role == "student":
            self.keep_if_best(result.accuracy)
        line = {**place, "role": role, **result.record()}
        answered = self.test.rows[: len(result.grades)]  # a teacher may have been asked fewer
        graded = zip(answered, result.completions, result.grades, strict=True)
        rows = [(step, r.problem, r.answer, text, grade.correct) for r, text, grade in graded]
        self.report(line, rows)
        self.log.evaluation(line)  # written last: on resume, samples without this line are dropped
        return line
