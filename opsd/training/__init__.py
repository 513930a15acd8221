"""The training run: collect rollouts, accumulate micro-batches, step, evaluate, save.

`run.train` is a whole run from a config; `trainer.OPSDTrainer` and `step.OPSDStep` are its loop and
what one forward computes.
"""
