"""The `opsd` command: one file a command, and `main`, which reads the command line.

Nothing imports this room. A command checks its arguments, calls the room that does the work, and
prints what came of it.
"""
