"""From a source to the tokens of both roles: rows, prompts, and which rows fit the model.

`rows` has the row and how sources are read, `prompts` renders a row for the student and the
teacher.
"""
