"""A model directory with code of its own, and the one line that refuses it."""

import shutil
from pathlib import Path


def refused(capsys, *parts) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("opsd: "), lines
    for part in parts:
        assert part in lines[0], lines[0]


def copied(files, place: Path) -> Path:
    return shutil.copytree(files[0], place)


CODE = "import os\nos.mkdir({marker!r})\nraise SystemExit(7)\n"


AUTO = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}
