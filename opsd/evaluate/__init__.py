"""Judging: grading of answers, rates and their intervals, benchmarks, `opsd eval`.

grading, metrics, benchmarks, settings, answers, result and page need no torch.
"""
