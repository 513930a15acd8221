"""`opsd init`: a first config file, of the examples that the wheel brings along."""

import argparse
import re
from pathlib import Path

from opsd.common.errors import UserError
from opsd.common.files import write_file
from opsd.common.near import did_you_mean

EXAMPLES = Path(__file__).parents[1] / "examples"
SCHEMA = Path(__file__).parents[1] / "config" / "schema.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `opsd init`."""
    add = parser.add_argument
    add("name", nargs="?", default="mine", metavar="[NAME]", help="of `opsd examples`")
    add("--output", type=Path, metavar="FILE", help="default: NAME.yaml")


def run(parsed: argparse.Namespace) -> None:
    """Writes the file and says what comes next. Raises UserError."""
    known = {str(path.relative_to(EXAMPLES).with_suffix("")): path for path in examples()}
    name = parsed.name.removeprefix("examples/").removesuffix(".yaml")
    if name not in known:
        hint = did_you_mean(name, known)
        raise UserError(f"NAME is {name!r}: no example{hint} (there are {', '.join(known)})")
    file = parsed.output or Path(f"{Path(name).name}.yaml")
    if file.exists():
        raise UserError(f"--output is {str(file)!r}: it is there already; choose another")
    text = known[name].read_text(encoding="utf-8").replace(f"examples/{name}.yaml", str(file))
    schema = "" if is_study(text) else f"# yaml-language-server: $schema={SCHEMA}\n"
    write_file(file, schema + text)
    command = f"opsd compare {file}" if is_study(text) else f"opsd train {file} --dry-run"
    print(f"Wrote {file}. Make it yours, then: {command}")


def examples() -> list[Path]:
    """The configs and studies that can be written."""
    return sorted(EXAMPLES.rglob("*.yaml"))


def is_study(text: str) -> bool:
    """Whether an example is for `opsd compare`."""
    return re.search(r"^quickstart:", text, re.MULTILINE) is not None
