"""The trainer for Python code, with TRL's interface: `opsd train` with objects instead of names.

It loads model and rows when it is constructed, so that errors in them are raised there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.hub_upload import push
from opsd.common.near import nearest
from opsd.config.config import IN_PYTHON, Config
from opsd.config.flat import flat_name
from opsd.config.foreign import WORDS, here, reason
from opsd.config.load import parse_config
from opsd.config.sections import ModelSection
from opsd.data.given import given_records
from opsd.data.rows import load_rows
from opsd.distributed.processes import Processes
from opsd.grading.reward_functions import verifier_of
from opsd.models.load import load_tokenizer, with_ends
from opsd.models.lora import described_by
from opsd.runs.directory import last_checkpoint
from opsd.training.preflight import begin, check_config
from opsd.training.run import Given, load_run, train_in_directory


class OPSDTrainer:
    """Trains a model by any of the methods; constructed and called like TRL's trainers.

    Args:
        model: a transformers model, which is trained in place, or its name or directory.
        args: the run's config, made in Python or read from YAML.
        train_dataset: a `datasets.Dataset`, a list of dicts, a DataFrame, or a source as in
            data.source: a file, a hub name, reasoning_gym:<task>.
        eval_dataset: held-out rows, in the same forms. Without it no rows of a train_dataset are
            held out, unless eval.problems gives their number.
        processing_class: the tokenizer; None: the model's own.
        reward_funcs: functions that grade rollouts instead of loss.reward.verifier, like TRL's
            (completions, **columns) → scores, or (completion, row) → score.
        callbacks: transformers' TrainerCallbacks, one or several.
        peft_config: a LoraConfig of peft, instead of model.lora.
        display: where progress is shown; None: the terminal, or the notebook's cell.

    Raises UserError for errors that the user can correct.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path | None = None,
        args: Config | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]] = (),
        callbacks: TrainerCallback
        | Sequence[TrainerCallback | type[TrainerCallback]]
        | None = None,
        peft_config: Any = None,
        display: Display | None = None,
        **others: Any,
    ):
        _check_types(args, processing_class, others)
        config = args or Config()
        if isinstance(callbacks, TrainerCallback):
            callbacks = [callbacks]
        given = Given(tokenizer=processing_class, callbacks=list(callbacks or ()))
        said: dict[str, Any] = {}  # config fields that the arguments set
        if isinstance(model, PreTrainedModel):
            given.model, name = model, model.name_or_path
            said["model.path"] = name or IN_PYTHON
            given.tokenizer = processing_class or load_tokenizer(ModelSection(path=name))
        elif isinstance(model, str | Path):
            said["model.path"] = str(model)
        elif model is not None:
            raise UserError(
                f"model is of type {type(model).__name__}: it must be a model of transformers, "
                "without adapters (peft_config makes them), or the name or directory of one"
            )
        if peft_config is not None:
            said["model.lora"] = described_by(peft_config)
        if given.tokenizer is not None:
            with_ends(given.tokenizer, "processing_class")
        if train_dataset is not None:
            limit = config.data.limit, "data.limit"
            said["data.source"], given.rows = _source(train_dataset, "data", *limit)
        if eval_dataset is not None:
            problems = "problems" in config.eval.model_fields_set and config.eval.problems
            limit = problems or None, "eval.problems"
            said["eval.source"], given.held_out = _source(eval_dataset, "eval", *limit)
        if "problems" not in config.eval.model_fields_set:
            if given.held_out is not None:
                said["eval.problems"] = _count(given.held_out, config.eval.split)
            elif train_dataset is not None and (eval_dataset or config.eval.source) is None:
                said["eval.problems"] = 0
        alone = callable(reward_funcs) or isinstance(reward_funcs, str)
        functions: Any = [reward_funcs] if alone else reward_funcs
        if functions:
            given.verifier, said["loss.reward.verifier"] = verifier_of(functions)
        self.display, self.processes = display or Display(), Processes()
        self.args = begin(_together(config, said), self.processes)
        self._run = load_run(self.args, self.display, self.processes, given)
        self.processing_class = self._run.tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained."""
        return self._run.model

    @property
    def state(self) -> TrainerState:
        """transformers' TrainerState: the step, and `log_history` with one entry a step."""
        return self._run.state

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train, evaluate, save to output.dir/model and write the report, as `opsd train` does.

        resume_from_checkpoint: resume from the last checkpoint in output.dir: True, or its path.
        """
        run, asked = self._run, resume_from_checkpoint
        if run.output is not None:
            raise UserError("this trainer has trained: make another to go on or to begin again")
        last = last_checkpoint(run.directory) if isinstance(asked, str | Path) else None
        if isinstance(asked, str | Path) and (last is None or not last.samefile(asked)):
            raise UserError(
                f"resume_from_checkpoint is {str(asked)!r}: a run goes on from the last checkpoint "
                f"in output.dir, {str(last or run.directory)!r}; True names it"
            )
        train_in_directory(self.args, self.display, self.processes, bool(asked), run=run)
        return run.output

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Answer the held-out problems, or others, with the current model, and grade the answers.

        Returns eval_accuracy with its 95 % interval, eval_mean_length and more.
        """
        run, test = self._run, self.args.eval
        run.prepare()
        rows = run.held_out
        if eval_dataset is not None:
            columns = self.args.data.columns if test.columns is None else test.columns
            wanted = ("problem", "answer")
            rows = load_rows(eval_dataset, columns=columns, require=wanted, section="eval")
        if not rows:
            raise UserError("evaluate: there are no held-out problems; give it an eval_dataset")
        run.sampler.sync_weights(run.model)
        result = run.test(rows).evaluate(run.inference, self.display, sampler=run.sampler)
        return {f"eval_{name}": value for name, value in result.record().items()}

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write model and tokenizer as transformers and peft load them, in the base's dtype.

        The default directory is output.dir/model, to which `train` saves as well.
        """
        run, place = self._run, Path(output_dir or self._run.directory / "model")
        place.parent.mkdir(parents=True, exist_ok=True)
        run.processes.once(lambda: run.write_model(place.parent, place.name))

    def push_to_hub(self, repository: str | None = None, private: bool | None = None) -> str:
        """Upload output.dir/model, as `train` saved it; returns its URL.

        repository, private: used instead of output.push_to_hub and output.hub_private.
        """
        output, place = self.args.output, self._run.directory / "model"
        name = repository or output.push_to_hub
        if name is None or not place.is_dir():
            raise UserError(
                f"push_to_hub: there is no {str(place)!r} yet: train, or save_model()"
                if name
                else "push_to_hub: name a repository (owner/name), or set push_to_hub in the config"
            )
        return push(name, place, output.hub_private if private is None else private)


def _source(rows: Any, section: str, limit: int | None, field: str) -> tuple[str, Any]:
    """(the config's value for rows, the rows, or None if they are a source's name). limit: the most
    rows that are read, by `field`; of a stream it must be given."""
    if isinstance(rows, str | Path):
        return str(rows), None
    if hasattr(rows, "__len__"):
        return IN_PYTHON, rows
    records, _ = given_records(rows, None, "train", section)
    if limit is None:
        mend = f"perhaps without an end: say in {field} how many rows to read"
        raise UserError(f"a dataset is of type {type(rows).__name__}, {mend}")
    return IN_PYTHON, list(islice(records, limit))


def _count(rows: Any, split: str | None) -> int:
    """The number of rows, also of columns in a dictionary, or of one of several splits."""
    if not isinstance(rows, Mapping):
        return len(rows)
    records, _ = given_records(rows, split, "test", "eval")
    return sum(1 for _ in records)


def _check_types(args: Any, processing_class: Any, others: Mapping[str, Any]) -> None:
    """Raises UserError for other trainers' arguments, and for what is no config or no tokenizer."""
    for name in others:
        own = signature(OPSDTrainer).parameters
        field, comma, note = here(name, Config).partition(", ")
        said = reason(name) or "help(OPSDTrainer) lists them"
        if ours := WORDS["arguments"].get(name) or nearest(name, own, cutoff=0.8):
            said = f"write OPSDTrainer({ours}=…)"
        elif field:
            said = f"it is a field of OPSDConfig, {flat_name(field, Config)}{comma}{note}"
        raise UserError(f"OPSDTrainer has no argument {name!r}: {said}")
    if args is not None:
        check_config("args", args)
    if isinstance(processing_class, str | Path):
        raise UserError(
            f"processing_class is {str(processing_class)!r}: it must be a tokenizer, as "
            "AutoTokenizer.from_pretrained makes it"
        )


def _together(config: Config, said: Mapping[str, Any]) -> Config:
    """Set the fields that the trainer's arguments give. Raises UserError for a field that the
    config sets to another value."""
    values = config.model_dump(exclude_unset=True)
    for field, value in said.items():
        *above, last = field.split(".")
        place = values
        for part in above:
            place = place.setdefault(part, {})
        if (known := place.get(last, IN_PYTHON)) not in (IN_PYTHON, value):
            given = f"the trainer was given {value!r}: leave one of them out"
            raise UserError(f"{field} is {known!r} in the config, and {given}")
        place[last] = value
    return parse_config(values)
