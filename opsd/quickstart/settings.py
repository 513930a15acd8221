"""A quickstart's settings: those in the YAML files in this directory, and the user's arguments."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError
from opsd.common.files import is_unfinished, write_json
from opsd.common.templates import shipped
from opsd.config.yaml import load_yaml
from opsd.runs.directory import LOCK
from opsd.runs.records import Anything, read_record

ARGUMENTS = "quickstart.json"
OUTPUT = "--output"


def settings(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read `name`.yaml: (the config sections that all methods share, method → its own)."""
    text = Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8")
    found = load_yaml(text)
    for text in found["shared"]["prompts"].values():
        shipped(text)
    return found["shared"], found["methods"]


@dataclass(frozen=True)
class Asked:
    """The arguments that determine a quickstart's results, except for the list of methods."""

    tiny: bool = False  # train the tiny model instead of SmolLM2
    seed: int = 0
    model: str | None = None  # another chat model's directory or hub name instead of SmolLM2
    # Stop each method, and SmolLM2's cold start, after this many steps.
    steps: int | None = None
    problems: int | None = None  # number of held-out problems; None: 400 worksheets or 300 sums
    # Number of worked solutions; None: as many as a method needs.
    solutions: int | None = None
    # Their style, one of SOLUTION_STYLES; not for the tiny model.
    solution_style: str = "words"
    # `[method.]section.field=value`; without a method, for all methods.
    overrides: list[str] = field(default_factory=list)

    def claim(self, directory: Path, resume: bool) -> None:
        """Save the quickstart's arguments, or check that they equal those saved there before."""
        file, arguments = directory / ARGUMENTS, asdict(self)
        where = f"{OUTPUT} is {str(directory)!r}"
        # Without other files nothing was made: the download failed, or the model is missing.
        nothing = {directory / LOCK, file}
        if any(path not in nothing and not is_unfinished(path) for path in directory.iterdir()):
            if not file.is_file():
                raise UserError(f"{where}: it is not empty; choose another, or remove it")
            if not resume:
                mend = "go on with --resume, or choose another"
                raise UserError(f"{where}: this quickstart has been started before; {mend}")
            try:
                there = read_record(file, Anything).record
            except UserError as error:
                raise UserError(f"{where}: {error}; choose another") from None
            for name, now in arguments.items():
                if (was := there.get(name)) != now:
                    said = f"{where}: it was begun with {name} {was!r}, not {now!r}; --resume is"
                    raise UserError(f"{said} for the same command, or for other --methods")
        write_json(file, arguments)
