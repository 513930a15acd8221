"""`Config`: all sections of a run's config, checked together."""

from typing import Any

from pydantic import ValidationError, model_validator

from opsd.common.errors import UserError
from opsd.config import compatibility
from opsd.config.base import Section
from opsd.config.data import DataSection
from opsd.config.explain import explain_all
from opsd.config.flat import nested
from opsd.config.loss import LossSection
from opsd.config.names import Method
from opsd.config.sections import (
    EvalSection,
    ModelSection,
    OutputSection,
    PromptsSection,
    RolloutSection,
    TeacherSection,
    TrainSection,
)

IN_PYTHON = "<given in Python>"
"""The path of a model, or the source of rows, that a Python caller passes as an object."""


class Config(Section):
    """The config of a training run. In Python fields may be given flat, without their sections:

    >>> OPSDConfig = Config
    >>> OPSDConfig(learning_rate=1e-5, group_size=4, rollout_temperature=0.9).rollout.temperature
    0.9
    """

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

    def __init__(self, *unnamed: Any, **fields: Any):
        """Takes sections, or fields by their flat names (opsd.config.flat). Model and data may be
        left out if OPSDTrainer is given them. Raises UserError."""
        if unnamed:
            raise UserError(
                f"OPSDConfig is given {str(unnamed[0])[:80]!r}: it takes fields by name, as in "
                "OPSDConfig(learning_rate=1e-5); load_config('mine.yaml') reads a file"
            )
        found = nested(fields, type(self))
        for section, field in (("model", "path"), ("data", "source")):
            found.setdefault(section, {}).setdefault(field, IN_PYTHON)
        try:
            super().__init__(**found)
        except ValidationError as error:
            raise UserError(explain_all(error, type(self))) from None

    # Lets pydantic validate the values of a file without calling __init__: no flat names there.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        compatibility.check(self)
        return self
