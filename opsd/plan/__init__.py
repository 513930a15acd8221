"""Estimate a run's memory and time before any weight is loaded.

`memory` adds up a run's memory, `time_estimate` counts its operations, and `suggestions` finds what
to change if it does not fit; `fake_run` measures a step's memory by running it without data.
"""
