"""Writes model/README.md, the model card: the base, the data, the settings and the results."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from opsd.common.files import read_toml, write_file
from opsd.common.system import versions
from opsd.config.config import IN_PYTHON, Config
from opsd.models.weight_files import find_file
from opsd.runs.directory import CONFIG
from opsd.runs.log import student_curve
from opsd.training.load_data import sources

METHODS: dict[str, str] = read_toml(__file__, "methods")
CARD = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")


def write_card(config: Config, directory: Path, kept: int | None) -> None:
    """Write the card into `directory`/model. `kept`: the step whose weights are in model/."""
    place = directory / "model"
    if not place.is_dir():
        return
    base, data = config.model.path, [_public(source.source) for source in sources(config.data)]
    card = find_file(base, "README.md", config.model.revision)
    licence = (metadata_load(card) or {}).get("license") if card else None
    metadata = ModelCardData(
        base_model=None if Path(base).exists() or base == IN_PYTHON else base,
        license=licence,
        library_name="peft" if (place / "adapter_config.json").is_file() else "transformers",
        pipeline_tag="text-generation",
        tags=["opsd-train", config.method],
        datasets=[name for name in data if name.count("/") == 1] or None,
    )
    lines = [line for line in student_curve(directory) if line.problems]
    shown = [line for line in lines if line.step in (0, kept) or line is lines[-1]]
    rows = [
        f"| {line.step} | {line.accuracy:.3f} | {line.low:.3f} to {line.high:.3f} |"
        for line in shown
        if line.low is not None and line.high is not None
    ]
    table = ["| step | accuracy | interval |", "| --- | --- | --- |", *rows]
    told = f"{lines[-1].problems} problems; the weights are step {kept}'s." if rows else ""
    settings = _public(config.model_dump(exclude_defaults=True, exclude={"output"}))
    text = CARD.format(
        metadata=metadata.to_yaml(),
        name=directory.name,
        base=_public(base),
        link=f"https://huggingface.co/{base}" if metadata.base_model else "#data-and-settings",
        method=METHODS[config.method],
        version=versions().get("opsd-train", ""),
        figures="\n".join(table) if rows else "None was measured.",
        problems=told,
        data=", ".join(data),
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        file=CONFIG,
        licence=f"The base model's: {licence}." if licence else "The base model's, and its data's.",
    )
    write_file(place / "README.md", text)


def _public(value: Any) -> Any:
    """Reduce paths on this machine to file names: the card is public."""
    if isinstance(value, dict):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value[:1] in ("/", "~") else value
