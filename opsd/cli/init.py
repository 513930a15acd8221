"""`opsd init` writes a first config file; `opsd examples` lists the examples to start from."""

import argparse
import re
from pathlib import Path

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.files import write_file
from opsd.common.near import did_you_mean

EXAMPLES = Path(__file__).parents[1] / "examples"
SCHEMA = Path(__file__).parents[1] / "config" / "schema.json"


def run(parsed: argparse.Namespace) -> None:
    """Writes the file and says what to run next, or shows the table. Raises UserError."""
    files = sorted(EXAMPLES.rglob("*.yaml"))
    known = {str(file.relative_to(EXAMPLES).with_suffix("")): file for file in files}
    (_write if parsed.command == "init" else _list)(known, parsed)


def _write(known: dict[str, Path], parsed: argparse.Namespace) -> None:
    name = (parsed.name or "mine").removeprefix("examples/").removesuffix(".yaml")
    if name not in known:
        hint = did_you_mean(name, known) or f"; `opsd init --output {name}.yaml` names the file"
        raise UserError(f"NAME is {name!r}: no such example{hint} (allowed: {', '.join(known)})")
    file = parsed.output or Path(f"{Path(name).name}.yaml")
    if file.exists():
        mend = f"`opsd init {name} --output {file.stem}-2.yaml` writes another"
        raise UserError(f"--output is {str(file)!r}: it exists already; {mend}")
    text = known[name].read_text(encoding="utf-8").replace(f"examples/{name}.yaml", str(file))
    schema, command = f"# yaml-language-server: $schema={SCHEMA}\n", f"train {file} --dry-run"
    if _command(text) == "compare":
        schema, command = "", f"compare {file}"
    write_file(file, schema + text)
    print(f"Wrote {file}. Make it yours, then: opsd {command}")


def _list(known: dict[str, Path], parsed: argparse.Namespace) -> None:
    rows = []
    for name, path in known.items():
        text = path.read_text(encoding="utf-8")
        comment = re.match(r"(?:#.*\n)*", text)[0]
        words = re.sub(r"^# ?(opsd (compare|plan|train) .*)?", "", comment, flags=re.MULTILINE)
        said = re.split(r"(?<=[a-z0-9)]{2}[.;])\s|: ", " ".join(words.split()))[0].rstrip(".;")
        if (parsed.name or "") in name:
            rows.append((name, f"opsd {_command(text)}", said))
    Display().table("opsd init NAME writes one of", ["name", "for", "what it is"], rows)


def _command(text: str) -> str:
    return "compare" if re.search(r"^quickstart:", text, re.MULTILINE) else "train"
