"""Whether an answer is right, and what a rollout earns for it.

`grader.Grader` compares answers in processes that can be killed; `rewards` turns its verdicts into
the rewards of rollouts.
"""
