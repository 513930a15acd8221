"""`opsd export`: merges a run's adapters into its model, or writes the model as a GGUF file."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from opsd.common.errors import UserError
from opsd.common.near import did_you_mean

CONVERTER = "convert_hf_to_gguf.py"
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
ALSO = {"int8": "q8_0", "8bit": "q8_0", "float16": "f16", "bfloat16": "bf16", "float32": "f32"}
WORDS = {"converter": CONVERTER, "types": ", ".join(OUTTYPES)}


def run(parsed: argparse.Namespace) -> None:
    """Writes the model. Raises UserError if there is no such model or no converter."""
    place, where = Path(parsed.directory), f"RUN is {str(parsed.directory)!r}"
    model = place / "model" if (place / "model").is_dir() else place
    if parsed.merge == parsed.gguf:
        raise UserError("say --merge or --gguf")
    if parsed.type not in OUTTYPES:
        near = did_you_mean(ALSO.get(parsed.type, parsed.type), OUTTYPES)
        others = "others are made of the file by llama.cpp: `llama-quantize model.gguf small.gguf"
        hint = f"; {others} {parsed.type}`" if re.search(r"q\d_[k01]", parsed.type, re.I) else near
        raise UserError(f"--type is {parsed.type!r}: it must be one of {', '.join(OUTTYPES)}{hint}")
    if parsed.type != "auto" and parsed.merge:
        raise UserError(f"--type is {parsed.type!r}: it is for --gguf")
    output = parsed.output or place / ("model.gguf" if parsed.gguf else "merged")
    if output.exists():
        raise UserError(f"--output is {str(output)!r}: it exists already; choose another")
    from opsd.cli.first_look import check_model, import_torch
    from opsd.common.display import Display

    # What is missing is said before torch is imported.
    converter = _converter() if parsed.gguf else None
    check_model(os.path.join(".", model), "RUN")
    adapted = (model / "adapter_config.json").is_file()
    if parsed.merge and not adapted:
        raise UserError(f"{where}: {str(model)!r} has no adapters to merge: it is the whole model")
    display = Display()
    import_torch(display)
    from opsd.config.sections import ModelSection
    from opsd.models.load import load_model
    from opsd.training.checkpoints import save_model

    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=output.parent) as scratch:
        whole = model
        if adapted or not (model / "config.json").is_file():  # then load_model says what is missing
            with display.stage(f"Merge {model}"):
                merged, tokenizer = load_model(ModelSection(path=str(model)), name="RUN")
                whole = Path(scratch) / "merged"
                dtype: Any = merged.stored_dtype
                save_model(merged, tokenizer, whole.parent, whole.name, dtype=dtype)
        if converter is None:
            whole.rename(output)
        else:
            _check_no_code(whole, where)
            with display.stage(f"Convert to {output}"):
                _convert(converter, whole, Path(scratch) / "model.gguf", parsed.type)
            (Path(scratch) / "model.gguf").rename(output)
    display.paths("Written", {output.suffix.lstrip(".") or "model": output})


def _converter() -> Path:
    """Finds llama.cpp's conversion script. Raises UserError if it is not there."""
    asked = os.environ.get("LLAMA_CPP")
    found = Path(asked) / CONVERTER if asked else Path(shutil.which(CONVERTER) or "")
    if not found.is_file():
        where = f"LLAMA_CPP is {asked!r}: it has no {CONVERTER}" if asked else f"no {CONVERTER}"
        raise UserError(
            f"--gguf: {where}; clone it (git clone https://github.com/ggml-org/llama.cpp) and name "
            "its directory: LLAMA_CPP=llama.cpp opsd export …"
        )
    return found


def _check_no_code(model: Path, where: str) -> None:
    """Raises UserError for a model that ships Python code: the converter would run it."""
    from opsd.common.strict_json import read_object

    for file in sorted(model.glob("*config.json")):
        if "auto_map" in read_object(file, where):
            raise UserError(f"{where}: {file.name} has code (auto_map), which --gguf would run")


def _convert(converter: Path, model: Path, file: Path, kind: str) -> None:
    command = [sys.executable, str(converter), str(model), "--outfile", str(file)]
    done = subprocess.run([*command, "--outtype", kind], capture_output=True, text=True)
    if done.returncode or not file.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        missing = re.search(r"No module named '(\w+)", said)
        hint = f"; pip install {missing[1]}" if missing else ""
        raise UserError(f"--gguf: {converter} cannot convert {str(model)!r}: {said}{hint}")
