"""`python -m opsd`: the same as the `opsd` command."""

from opsd.cli.main import command

command()
