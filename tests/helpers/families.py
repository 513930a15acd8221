"""Try every type of AutoModelForCausalLM as a tiny random model, and write docs/models.md.

    python -m tests.helpers.families              # all that docs/models.jsonl does not hold
    python -m tests.helpers.families qwen3 mamba  # these, anew
    python docs/generate.py                       # docs/models.md from docs/models.jsonl

Each type is trained by OPSD and GRPO, with and without sharing, and with adapters; it is planned
and evaluated; and plain transformers loads what was saved. Each runs in its own process, forked
from one that has imported everything, with a time limit. After a release of transformers remove
docs/models.jsonl first.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import deepspeed as _imported_here  # noqa: F401 - what a command needs, before the forks
import torch
import transformers
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`

from safetensors.torch import save_file

from helpers.prefix_models import alone, gradient, make_groups
from helpers.tiny_models import all_types, tiny_config, tiny_model
from helpers.training_cases import short_config, write_rows
from opsd.cli import evaluate as _imported_too  # noqa: F401
from opsd.cli import plan as _imported_also  # noqa: F401
from opsd.cli.main import main
from opsd.config.load import save_config
from opsd.evaluate import answers as _imported_as_well  # noqa: F401
from opsd.models.dropout import switch_off_dropout
from opsd.models.load import best_attention
from opsd.models.multimodal import auto_class
from opsd.prefix import shared_prefix_hidden_states, uncontinuable, unpackable
from opsd.quickstart import tiny_model as tiny
from opsd.training import run as training

RESULTS = Path(__file__).parents[2] / "docs" / "models.jsonl"
SECONDS, BYTES = 240, 8 << 30  # limits for a type

LORA = {"rank": 2, "alpha": 4}
VERIFIER = "def odd(completion, row):\n    return float(len(completion) % 2)\n"
RUNS: dict[str, dict[str, Any]] = {
    "opsd": {"eval": {"problems": 2, "every": 2, "samples": 1}, "train": {"save_every": 2}},
    "grpo": {"method": "grpo", "loss": {"reward": {"verifier": "odd.py:odd"}}},
    "unshared": {"train": {"share_prefixes": False}},
    "lora": {"model": {"lora": LORA}},
}
"""The runs that are tried: fields that change the short config."""

COMMANDS = (*RUNS, "plan", "eval")


def try_type(model_type: str, only: Sequence[str]) -> dict[str, Any]:
    """Try the type in the current directory: returns figures, reasons, refusals and errors."""
    found: dict[str, Any] = {}
    tiny.make_tokenizer().save_pretrained("model")
    try:
        model = tiny_model(model_type)
    except Exception as error:  # the model's own code; the commands report it too
        found["made"] = f"{type(error).__name__}: {error}".replace("\n", " ").strip()[:300]
        tiny_config(model_type).save_pretrained("model")
        save_file({"weight": torch.zeros(1)}, "model/model.safetensors")
    else:
        found["parameters"] = sum(p.numel() for p in model.parameters())
        found["attention"] = best_attention(model.config)
        _exactness(model, found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained("model")
    found["commands"] = {n: command(n, words) for n, words in _commands().items() if n in only}
    if found["commands"].get("opsd") == "":
        _load_again(found)
    return found


def _exactness(model, found: dict[str, Any]) -> None:
    """Compare shared prefixes with each rollout alone: logits, and gradients relative to their
    norms.
    """
    switch_off_dropout(model)  # as in scoring
    try:
        found["unshared"], found["uncontinued"] = unpackable(model), uncontinuable(model)
        found["student_uncontinued"] = uncontinuable(model, trains=True)
        if None not in (found["unshared"], found["student_uncontinued"]):
            return
        groups, head = make_groups(), model.get_output_embeddings()
        states = shared_prefix_hidden_states(model, groups)
        shared = gradient(model, states)
        separate = alone(model, groups)
        wanted = gradient(model, separate)
        whole = torch.cat([g.flatten() for g in wanted.values()]).norm()
        errors = [(shared[n] - g).norm() / max(g.norm(), 1e-3 * whole) for n, g in wanted.items()]
        found["logits"] = float((head(states).detach() - head(separate)).abs().max())
        found["gradients"] = float(max(errors))
    except Exception as error:  # training reports it too
        found["exactness"] = f"{type(error).__name__}: {error}"[:300]


def _commands() -> dict[str, list[str]]:
    rows = write_rows(Path("rows.jsonl"))
    Path("odd.py").write_text(VERIFIER)
    commands = {}
    for name, values in RUNS.items():
        train = {"steps": 2, "problems_per_step": 2, "save_every": 0, **values.get("train", {})}
        short = {
            "rollout": {"group_size": 2, "max_new_tokens": 4},
            "eval": {"problems": 0},
            "prompts": {"student": tiny.STUDENT_PROMPT, "teacher": tiny.TEACHER_PROMPT},
            **values,
            "train": train,
        }
        config = short_config(Path("model"), rows, Path(name), **short)
        save_config(config, Path(f"{name}.yaml"))
        commands[name] = ["train", f"{name}.yaml"]
    lengths = ["--prompt-tokens", "5", "--solution-tokens", "9", "rollout.max_new_tokens=8"]
    few = ["rollout.group_size=2", "train.problems_per_step=1"]
    commands["plan"] = ["plan", "model", *lengths, *few]
    asked = ["--samples", "1", "--problems", "2", "--max-new-tokens", "4", "--output", "answers"]
    prompt = ["--prompt", tiny.STUDENT_PROMPT]
    commands["eval"] = ["eval", "model", "--benchmark", str(rows), *asked, *prompt]
    return commands


def command(name: str, words: list[str]) -> str:
    """Run an `opsd` command. Returns its one line of error, or ""."""
    said, error = StringIO(), StringIO()
    with redirect_stdout(said), redirect_stderr(error):
        try:
            code = main(words)
        except SystemExit as exit:
            code = exit.code
    lines = [line for line in error.getvalue().splitlines() if line.startswith("opsd")]
    return "" if code == 0 else (lines or [error.getvalue()[-300:] or f"exit {code}"])[-1]


def _load_again(found: dict[str, Any]) -> None:
    try:
        kind = auto_class(AutoConfig.from_pretrained("opsd/model"))
        _, told = kind.from_pretrained("opsd/model", output_loading_info=True)
        wrong = {key: sorted(map(str, names))[:2] for key, names in told.items() if names}
        found["commands"]["load"] = str(wrong) if wrong else ""
    except Exception as error:
        found["commands"]["load"] = f"{type(error).__name__}: {error}"[:300]


def in_own_process(model_type: str, seconds: float, only: Sequence[str]) -> dict[str, Any]:
    """Run `try_type` in a fork of this process. Returns an `error` if the model cannot be made or
    the time limit is reached.
    """
    place, begun = Path(tempfile.mkdtemp(prefix="family-")), time.monotonic()
    child = os.fork()
    if not child:
        found: dict[str, Any] = {}
        try:
            os.setpgid(0, 0)
            os.chdir(place)
            resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
            found = try_type(model_type, only)
        except BaseException as error:
            found["error"] = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        finally:
            Path(place, "found.json").write_text(json.dumps(found))
            os._exit(0)
    while time.monotonic() - begun < seconds and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.05)
    try:
        found = json.loads(Path(place, "found.json").read_text())
    except (OSError, ValueError):
        found = {"error": f"no end after {seconds:.0f} s, or killed"}
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(child, 0)
    shutil.rmtree(place, ignore_errors=True)
    return {"type": model_type, **found, "seconds": round(time.monotonic() - begun, 1)}


def survey() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="none: all that the results do not hold")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="a type's time limit")
    parser.add_argument("--only", nargs="*", default=COMMANDS, help="of the commands; none: all")
    asked = parser.parse_args()
    lines = asked.results.read_text().splitlines() if asked.results.exists() else []
    known = {line["type"]: line for line in map(json.loads, lines)}
    training.write_report = lambda directory: None  # a report takes longer than these runs
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for model_type in asked.types or all_types():
        before = known.get(model_type, {}).get("commands", {})
        missing = [name for name in asked.only if asked.types or name not in before]
        if (
            not asked.types
            and model_type in known
            and (not missing or "error" in known[model_type])
        ):
            continue
        found = in_own_process(model_type, asked.seconds, missing)
        found["commands"] = before | found.get("commands", {})
        known[model_type] = found | {"transformers": transformers.__version__}
        print(json.dumps(known[model_type]), flush=True)
        ordered = [json.dumps(known[name]) + "\n" for name in sorted(known)]
        asked.results.write_text("".join(ordered))


if __name__ == "__main__":
    survey()
