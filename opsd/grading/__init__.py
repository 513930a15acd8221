"""Decide whether answers are right, and compute the rollouts' rewards.

`grader.Grader` owns the worker processes that compare answers and returns a `Grade` for each text.
A `rewards.Verifier` scores completions against their rows, by a grader or by the user's function;
`rewards.RewardFunction` turns these scores into `GradedRollout`s.
"""
