"""Compare runs: ratios of tokens, time and FLOPs with intervals, and the pages of a study.

`comparison.compare` reads runs into a comparison; `study` starts the runs that a study file or
configs ask for. Pages and plots are built from those of opsd.report.
"""
