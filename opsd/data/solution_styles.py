"""The styles of the quickstart's solutions."""

from typing import Literal

SolutionStyle = Literal["words", "own", "terse", "markdown"]
SOLUTION_STYLES: dict[SolutionStyle, str] = {
    "words": "somebody else's, in words",
    "own": "the model's own",
    "terse": "terse: the result alone",
    "markdown": "another model's, in Markdown",
}
