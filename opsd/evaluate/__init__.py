"""Judging: grading of answers, rates and their intervals, benchmarks. Needs no torch itself."""
