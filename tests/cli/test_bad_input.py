"""Every bad input gets one clear error within seconds: the table is data/bad_inputs.txt.

A row is `input => outcome | part of the message | part …`. The outcome is the exit code of `opsd`,
or the exception of a kernel's call. It is said before torch is imported, which takes seconds, but
for an outcome `1 late`. What an input is depends on its section:

config        overrides of a good config, several parted by ` ;; `
config file   a whole config's text
cli           a command line
data          NAME: the text of a data file
tokenizer     edits of a good model's directory (see `edit`), several parted by ` ;; `
model         the same, for a run that loads the weights
kernel        a Python call of an argument's worth, see `KERNEL`

Texts are escaped as Python's are. {dir}, {model}, {rows}, {config} are the good files' places.
"""

import json
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.training_cases import short_values, write_rows
from transformers import Qwen3Config, Qwen3ForCausalLM

import opsd_kernels
from opsd.cli import first_look
from opsd.cli.main import main
from opsd.quickstart.tiny_model import make_tokenizer

TABLE = Path(__file__).parents[1] / "data" / "bad_inputs.txt"
SECONDS = 5.0  # of CPU time; on a busy machine that may take six times as long
ATTRIBUTES = re.compile(r"Traceback|object at 0x|pydantic|\[type=|errors\.pydantic")
"""What no message may show a user."""


def cases():
    """(section, input, outcome, parts) of each row."""
    section, found = None, []
    for number, line in enumerate(TABLE.read_text().splitlines(), 1):
        if line.startswith("[") and line.endswith("]") and " => " not in line:
            section = line[1:-1]
        elif line.strip() and not line.startswith("#"):
            given, arrow, wanted = line.rpartition(" => ")
            assert arrow, f"{TABLE.name}:{number} has no ` => `"
            outcome, *parts = wanted.split(" | ")
            assert parts, f"{TABLE.name}:{number} says nothing of the message"
            row = (section, given.strip(), outcome.strip(), [part.strip() for part in parts])
            found.append(pytest.param(*row, id=f"{section}-{number}"))
    return found


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good model, data file and config, by the names that the table has for them."""
    directory = tmp_path_factory.mktemp("good")
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    rows = write_rows(directory / "rows.jsonl")
    values = short_values(directory / "model", rows, directory / "run")
    values["method"] = "opsd"
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    names = {"model": "model", "rows": "rows.jsonl", "config": "config.yaml", "dir": ""}
    return {name: str(directory / place) for name, place in names.items()}


def filled(text: str, good: dict[str, str]) -> str:
    for name, place in good.items():
        text = text.replace(f"{{{name}}}", place)
    return text


def unescaped(text: str) -> bytes:
    return text.encode().decode("unicode_escape").encode("latin-1")


def edit(directory: Path, what: str) -> None:
    """`delete FILE`, `write FILE TEXT`, `cut FILE BYTES`, or `set FILE KEY=JSON`, where JSON `-`
    takes the key away."""
    verb, name, *rest = what.split(" ", 2)
    file, rest = directory / name, rest[0] if rest else ""
    if verb == "delete":
        file.unlink()
    elif verb == "write":
        file.write_bytes(unescaped(rest))
    elif verb == "cut":
        file.write_bytes(file.read_bytes()[: int(rest)])
    else:
        assert verb == "set", what
        values, (key, _, value) = json.loads(file.read_text()), rest.partition("=")
        values.pop(key, None)
        if value != "-":
            values[key] = json.loads(value)
        file.write_text(json.dumps(values))


def arguments_of(section: str, given: str, good: dict[str, str], place: Path) -> list[str]:
    """The command line of a case; what it needs is written into `place`."""
    train = ["train", good["config"]]
    run = f"output.dir={place / 'run'}"
    given = filled(given, good)
    if section == "config":
        return [*train, "--dry-run", run, *given.split(" ;; ")]
    if section == "config file":
        (place / "c.yaml").write_bytes(unescaped(given))
        return ["train", str(place / "c.yaml"), "--dry-run"]
    if section == "cli":
        return shlex.split(given)
    if section == "data":
        name, _, text = given.partition(":")
        (place / name).write_bytes(unescaped(text.removeprefix(" ")))
        return [*train, "--dry-run", run, f"data.source={place / name}"]
    model = shutil.copytree(good["model"], place / "model")
    for what in given.split(" ;; "):
        edit(model, what)
    dry = ["--dry-run"] if section == "tokenizer" else []
    return [*train, *dry, run, f"model.path={model}"]


def run_case(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse's
        return stop.code


S, T, W = torch.randn(3, 4), torch.randn(3, 4), torch.randn(7, 4)
IDS = torch.zeros(3, dtype=torch.long)
KERNEL = {"torch": torch, "S": S, "T": T, "W": W, "IDS": IDS, "Clip": opsd_kernels.Clip}


def divergence(**wrong):
    good = {"student_hidden": S, "teacher_hidden": T, "weight": W}
    return opsd_kernels.linear_divergence(**{**good, **wrong})


def log_prob(**wrong):
    return opsd_kernels.linear_log_prob(**{"hidden": S, "weight": W, "targets": IDS, **wrong})


KERNEL |= {"divergence": divergence, "log_prob": log_prob, "nan": float("nan")}
"""What a row may name: calls with good arguments but for the ones that it gives."""


@pytest.mark.parametrize(("section", "given", "outcome", "parts"), cases())
def test_bad_input(section, given, outcome, parts, good, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun, worked = time.monotonic(), time.process_time()
    if section == "kernel":
        with pytest.raises(Exception) as raised:
            eval(given, KERNEL)
        assert type(raised.value).__name__ == outcome, raised.value
        message = str(raised.value)
    else:
        imported = []
        monkeypatch.setattr(first_look, "import_torch", lambda *which: imported.append(which))
        code = run_case(arguments_of(section, given, good, tmp_path))
        shown = capsys.readouterr()
        late = imported and section not in ("model", "tokenizer")  # those are of what torch reads
        assert str(code) == outcome.removesuffix(" late"), shown.err or shown.out
        assert not late or outcome.endswith(" late"), "it could be said before torch is imported"
        lines = [line for line in shown.err.splitlines() if line.strip()]
        message = lines[-1]
        assert code == 2 or (len(lines) == 1 and message.startswith("opsd: ")), shown.err
        assert not ATTRIBUTES.search(shown.err), shown.err
    assert time.process_time() - worked < SECONDS and time.monotonic() - begun < 6 * SECONDS
    assert len(message) < 2000
    for part in parts:
        assert filled(part, good) in message, message


def test_the_good_input_is_taken(good, capsys):
    """Or all of the above would be refused for another reason."""
    assert main(["train", good["config"], "--dry-run"]) == 0
    assert "Nothing was trained" in capsys.readouterr().out
    assert divergence().loss.isfinite() and log_prob().log_prob.isfinite().all()


def test_there_are_enough():
    assert len(cases()) >= 220
