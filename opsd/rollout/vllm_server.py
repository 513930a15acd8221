"""Samples with a server, which loads the new weights before each sampling."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.common.saved_directory import readable
from opsd.models.copies import named_weights
from opsd.models.lora import save_adapters, without_adapters
from opsd.rollout.base import Contexts, Progress, Rollout, Sampling, draw_seeds
from opsd.rollout.server import Request, RolloutServer
from opsd.rollout.threads import as_done, in_background
from opsd.rollout.weights_directory import held


class ServerSampler:
    """Sends `sampling.batch_size` requests at once, for one rollout each.

    Each rollout has its own seed, from torch's generator. If the server fails, the generator is
    restored, so that sampling the same contexts later, in this process or in a resumed one, asks
    for the same rollouts.
    """

    def __init__(
        self,
        server: RolloutServer,
        stops: frozenset[int],
        # The directory for the weights, which must have the same path on the server. None: the
        # server's weights stay as they are
        directory: Path | None = None,
        dtype: torch.dtype = torch.bfloat16,  # of the weights there
        vocabulary: int | None = None,  # the number of the model's logits
        adapts: bool = False,  # the server loads the base once, then adapters alone
        streams: bool = False,  # weights go over TCP instead of by `directory`
    ):
        self.server, self.stops, self.vocabulary = server, stops, vocabulary
        self.engine, server.adapts = server.engine, adapts
        self.directory, self.dtype, self.streams = directory, dtype, streams
        self.versions, self.software = 0, server.software
        self.sync: dict[str, float] = {}
        what = "Adapters" if adapts else "Weights"
        way = "over TCP, without files" if streams else directory and f"by {directory}"
        self.said = f"{what} go to {server.address} {way}" if way else None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)  # a killed run may have left files

    def sync_weights(self, model: PreTrainedModel) -> None:
        """See `Sampler.sync_weights`: write the weights and have the server load them."""
        start, adapts = time.monotonic(), self.server.adapts
        given = 0
        if self.streams:
            given += self._send(model)
        elif not adapts or self.server.restarted:
            plain = without_adapters(model) if adapts else model
            given += self._give(partial(self._write_weights, plain), self.server.load)
        if adapts:
            given += self._give(partial(save_adapters, model), self.server.load_adapters)
        self.sync = {"sync_bytes": given, "sync_seconds": time.monotonic() - start}

    def _send(self, model: PreTrainedModel) -> int:
        """Have the server read the weights over TCP. Returns the bytes that its workers read."""
        sent = []

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name, weight in self._named_weights(model):
                sent.append(weight.nbytes)
                yield name, weight

        self.server.send(weights)
        return sum(sent)

    def _named_weights(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        # On a CPU vLLM 0.32 has a second copy of a tied head, with a name of its own.
        return named_weights(model, self.dtype, head_too=self.server.copies_head)

    def _give(self, write: Callable[[Path], None], load: Callable[[Path], None]) -> int:
        """Write a directory and have the server load it. Returns its safetensors' bytes."""
        # Use a new directory each time: some releases of vLLM cache what they read from a path
        # (vllm-project/vllm#32718).
        assert self.directory is not None
        self.versions += 1
        new = self.directory.absolute() / str(self.versions)
        try:
            # It must be new: in /dev/shm another user might have put a link or directory there.
            self.directory.mkdir(parents=True)
        except FileExistsError:
            raise UserError(
                f"{str(self.directory)!r} was not made by this run, which would leave its weights "
                "there: remove it, or set rollout.weights_dir"
            ) from None
        with held(self.directory):
            try:
                new.mkdir()
                write(new)
                readable(new)  # the server may run as another user
                load(new)
                return sum(file.stat().st_size for file in new.glob("*.safetensors"))
            finally:
                shutil.rmtree(self.directory)

    def _write_weights(self, model: PreTrainedModel, directory: Path) -> None:
        weights = {name: w.cpu().contiguous() for name, w in self._named_weights(model)}
        save_file(weights, directory / "model.safetensors", {"format": "pt"})

    def sample(
        self, contexts: Contexts, sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """One rollout for each context, in order; see `Sampler.sample`. Raises ServerGoneError, or
        its subclass ServerRestartedError if the server has lost the weights meanwhile."""
        before = torch.get_rng_state()
        try:
            return self._drawn(contexts, sampling, progress)(Future())
        except BaseException:
            torch.set_rng_state(before)
            raise

    def begin(self, contexts: Contexts, sampling: Sampling) -> Future[list[Rollout]]:
        """Start `sample` in the background. The seeds are drawn at once."""
        return in_background(self._drawn(contexts, sampling))

    def _drawn(
        self, contexts: Contexts, sampling: Sampling, progress: Progress | None = None
    ) -> Callable[[Future], list[Rollout]]:
        """Draw the seeds. Returns a function that requests the rollouts, unless its future is
        cancelled, and draws nothing itself."""
        longest = max(map(len, contexts), default=0)
        self.server.check_asked(longest, sampling)
        workers = sampling.batch_size
        if sampling.temperature:
            workers = min(workers, self.server.at_once(longest) or workers)
        seeds = self.server.seeds(draw_seeds(sampling, len(contexts)))

        def work(future: Future) -> list[Rollout]:
            def ask(i: int, stop) -> Rollout:
                if future.cancelled():
                    raise CancelledError
                asked = Request(contexts[i], sampling, seeds[i], self.stops, self.vocabulary)
                return self.server.complete(asked, stop)

            rollouts: list[Rollout | None] = [None] * len(contexts)
            for i, rollout in as_done(ask, len(contexts), workers):
                rollouts[i] = rollout
                if progress:
                    progress(1, len(rollout.ids))
            self.server.check_restart()
            return rollouts

        return work
