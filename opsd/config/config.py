"""A run's whole config: its sections together."""

from pydantic import model_validator

from opsd.config import compatibility
from opsd.config.base import Section
from opsd.config.loss import LossSection
from opsd.config.names import Method
from opsd.config.sections import (
    DataSection,
    EvalSection,
    ModelSection,
    OutputSection,
    PromptsSection,
    RolloutSection,
    TeacherSection,
    TrainSection,
)


class Config(Section):
    """A training run."""

    method: Method = "opsd"
    """On-policy self-distillation, GRPO, SFT on the solutions, or distillation from a separate
    teacher that sees what the student sees."""
    model: ModelSection
    data: DataSection
    prompts: PromptsSection = PromptsSection()
    teacher: TeacherSection = TeacherSection()
    rollout: RolloutSection = RolloutSection()
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        compatibility.check(self)
        return self
