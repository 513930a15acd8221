"""Ends a run: writes its summary and uploads the model to the hub."""

from pathlib import Path

from opsd.common.display import Display
from opsd.common.files import write_json
from opsd.common.hub_upload import push
from opsd.common.system import machine, peak_memory, versions
from opsd.config.config import Config
from opsd.runs.log import RunLog, student_curve
from opsd.training.model_card import write_card


def write_summary(config: Config, log: RunLog, seconds: float, step: int) -> dict:
    """Write summary.json, which marks that the run ended after `step`, and the model card."""
    directory = Path(config.output.dir)
    accuracies = [line.accuracy for line in student_curve(directory)] or [None]
    best = log.best()
    summary = {
        "method": config.method,
        "model": config.model.path,
        "accuracy": {"before": accuracies[0], "after": accuracies[-1]},
        "best": {"step": best[0], "accuracy": best[1]} if best else None,
        "generated_tokens": log.counters.generated_tokens,
        "trained_tokens": log.counters.trained_tokens,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "machine": machine(),
    }
    write_json(directory / "summary.json", summary)
    kept = best[0] if best and config.output.keep == "best" else step
    write_card(config, directory, kept)
    return summary


def publish(config: Config, directory: Path, display: Display) -> None:
    """Upload model/ if output.push_to_hub is set. A failure only shows a note: all is saved."""
    repository = config.output.push_to_hub
    if repository is None:
        return
    try:
        with display.stage(f"Upload to {repository}"):
            address = push(repository, directory / "model", config.output.hub_private)
    except Exception as error:  # the hub's client raises many types
        place = directory / "model"
        command = f"hf upload {repository} {place}"
        display.note(f"The upload failed ({error}); all is in {place}: {command}")
        return
    display.note(f"Uploaded: {address}")
