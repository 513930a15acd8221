"""The training run: collect rollouts, accumulate micro-batches, step, evaluate, save.

`run.train` is a whole run from a config, `api.OPSDTrainer` the same for Python code;
`trainer.TrainingLoop` and `step.OPSDStep` are its loop and what one forward computes.
"""

from opsd.common.environment import set_environment

set_environment()  # here, since no other room's import begins a run
