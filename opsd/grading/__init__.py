"""Whether an answer is right, and what a rollout earns for it.

`grader.Grader` owns the worker processes that compare answers and gives a `Grade` for each text. A
`rewards.Verifier` scores completions against their rows, by a grader or by the user's function;
`rewards.RewardFunction` turns these scores into `GradedRollout`s.
"""
