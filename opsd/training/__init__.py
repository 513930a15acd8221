"""The training run: collect rollouts, accumulate micro-batches, step, evaluate, save.

`run.train` does a whole run from a config, `api.OPSDTrainer` the same for Python code.
`trainer.TrainingLoop` is their loop, `step.OPSDStep` what one forward computes.
"""

from opsd.common.environment import set_environment

set_environment()  # in this room: only its import starts a run
