"""Read rows from a source, render and tokenise them for both roles, and find those that fit.

`rows` defines a row and reads sources; `prompts` renders a row for the student and the teacher.
"""
