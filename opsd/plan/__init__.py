"""What a run will need of memory and time, said before any weight is loaded.

`memory` adds up a run's memory, `time_estimate` counts its operations, and `suggestions` says what
to change where it does not fit; `fake_run` finds what a step holds by running it without data.
"""
