"""The `opsd` command: one file per command, and `main`, which reads the command line.

No other room imports this one. A command checks its arguments, calls the room that does the work,
and prints the result.
"""
