"""The styles in which the quickstart's solutions may be written."""

from typing import Literal

SolutionStyle = Literal["words", "own", "terse", "markdown"]
SOLUTION_STYLES: dict[SolutionStyle, str] = {
    "words": "somebody else's, in words",
    "own": "the model's own",
    "terse": "terse: the result alone",
    "markdown": "another model's, in Markdown",
}
