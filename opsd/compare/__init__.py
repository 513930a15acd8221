"""Runs against runs: ratios of tokens, time and FLOPs with intervals, and the pages of a study.

`comparison` reads runs into a comparison, `study` starts the runs that a study file asks for.
"""
