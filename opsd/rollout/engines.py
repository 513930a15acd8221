"""Makes the sampler that `rollout.engine` names, and checks that it works on this machine."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from opsd.common.errors import UserError
from opsd.common.system import vllm_is_for_cpus
from opsd.config.sections import ModelSection, RolloutSection
from opsd.models.adapter_files import model_files
from opsd.models.head import head
from opsd.models.load import load_config
from opsd.models.lora import largest_rank
from opsd.rollout.base import Sampler
from opsd.rollout.continuous import ContinuousSampler
from opsd.rollout.generate import GenerateSampler
from opsd.rollout.server import RolloutServer
from opsd.rollout.sglang_client import SGLangServer
from opsd.rollout.vllm_client import VLLMServer
from opsd.rollout.weights_directory import WEIGHTS, weights_directory

SAMPLERS = {"generate": GenerateSampler, "continuous": ContinuousSampler}
"""The engines that sample with the model's own module."""

DIALECTS: dict[str, type[RolloutServer]] = {
    dialect.engine: dialect for dialect in (VLLMServer, SGLangServer)
}
"""The clients of the engines that are servers."""


def check_engine(engine: str, field: str = "rollout.engine") -> None:
    """Raise UserError if vLLM is asked for and cannot run here."""
    if engine != "vllm" or vllm_is_for_cpus():
        return
    if not torch.cuda.is_available():
        raise UserError(
            f"{field} is 'vllm': vLLM samples on a CUDA GPU, and there is none here (allowed: "
            "generate, continuous, or vllm_server, which may be on another machine)"
        )
    if find_spec("vllm") is None:
        raise UserError(
            f"{field} is 'vllm': vLLM is not installed here (pip install vllm; docs/vllm.md)"
        )


def training_server(
    section: RolloutSection,
    model: ModelSection,
    given: PreTrainedModel | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> RolloutServer:
    """Connect to the server in `rollout.server`, which must be able to load the weights of the
    model (or of `given`).

    Raises UserError if it cannot, or if its log-probabilities are not the model's own.
    """
    server = DIALECTS[section.engine](
        section.server, timeout=section.server_timeout, patience=section.server_patience
    )
    if not server.loads:
        raise UserError(
            f"rollout.server is {section.server!r}: its weights cannot be changed; start it with "
            "VLLM_SERVER_DEV_MODE=1 (docs/vllm.md)"
        )
    if server.seeds([0]) == [None]:
        note(
            "The server takes no seeds, and a run that goes on draws other rollouts; start it with "
            "--enable-deterministic-inference"
        )
    server.check_log_probs(section.temperature)
    config = given.config if given is not None else load_config(model_files(model))
    server.check_model(config, model.path)
    return server


def evaluation_server(
    engine: str,
    address: str,
    model: str,
    stops: frozenset[int],
    config: PreTrainedConfig,
    load: Callable[[], PreTrainedModel],
    directory: Path,  # of the evaluation
) -> Sampler:
    """Make a sampler with the server at `address`, which must have the weights of `model`.

    A server that can change its weights loads them, since an earlier run may have left others; any
    other must have been started with them. Raises UserError if it was not.
    """
    from opsd.rollout.vllm_server import ServerSampler

    server = DIALECTS[engine](address, field="--server")
    path, vocabulary = Path(model), config.get_text_config().vocab_size
    if server.loads:
        server.check_model(config, model)
        tied = server.copies_head and getattr(config, "tie_word_embeddings", False)
        streams = server.receives and path.is_dir()
        if streams or tied or model_files(ModelSection(path=model)).adapters:
            weights = load()  # `sync_weights` adds what the model's files lack
            place, dtype = directory.absolute() / WEIGHTS, weights.dtype
            sampler = ServerSampler(server, stops, place, dtype, vocabulary, streams=streams)
            sampler.sync_weights(weights)
            return sampler
        server.load(path.absolute() if path.is_dir() else model)
    elif model not in (server.model, server.root) and path.absolute() != Path(server.root):
        raise UserError(
            f"--server is {address!r}: it serves {server.root!r}, not {model!r}; start it on that, "
            "or with VLLM_SERVER_DEV_MODE=1, so that it can be told to load it"
        )
    return ServerSampler(server, stops, vocabulary=vocabulary)


def make_sampler(
    section: RolloutSection,
    student: ModelSection,  # the trained model's section, which vLLM in this process loads
    decoder: PreTrainedModel,  # the model that the engines without vLLM use
    stops: frozenset[int],
    dtype: torch.dtype,
    server: RolloutServer | None,
    run: Path,  # directory of the run
    # Tokens of the longest sequence, for vLLM's cache in this process
    longest: int | None,
) -> Sampler:
    """Make the sampler of a training run."""
    if section.engine in SAMPLERS:
        return SAMPLERS[section.engine](decoder, stops)
    if server is not None:
        from opsd.rollout.vllm_server import ServerSampler

        needed = sum(weight.numel() for weight in decoder.parameters()) * dtype.itemsize
        weights = weights_directory(section, run.absolute(), needed)
        adapts = 0 < (largest_rank(decoder) or 0) <= server.adapter_rank
        streams = server.receives and section.weights_dir is None and not adapts
        known = len(head(decoder)[0])
        return ServerSampler(server, stops, weights, dtype, known, adapts, streams)
    from opsd.rollout.vllm_colocated import ColocatedSampler

    return ColocatedSampler(
        student.path,
        stops,
        trains=True,
        dtype=dtype,
        memory=section.gpu_memory,
        max_model_len=longest,
        max_num_seqs=section.batch_size,
        revision=student.revision,
        trust_remote_code=student.trust_remote_code,
    )
