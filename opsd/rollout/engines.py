"""Which sampler `rollout.engine` names, and whether it can work here."""

from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.config.config import Config
from opsd.rollout.base import Sampler
from opsd.rollout.continuous import ContinuousSampler
from opsd.rollout.generate import GenerateSampler
from opsd.rollout.vllm_client import VLLMServer

SAMPLERS = {"generate": GenerateSampler, "continuous": ContinuousSampler}
"""Those that sample with the model's own module."""


def check_engine(engine: str, field: str = "rollout.engine") -> None:
    """Raises UserError where vLLM is asked for and cannot run here."""
    if engine != "vllm":
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


def training_server(config: Config) -> VLLMServer:
    """The server that `rollout` names, able to follow a training run.

    Raises UserError where it serves another model, cannot take weights, or says otherwise than its
    default what log-probabilities it returns.
    """
    section = config.rollout
    server = VLLMServer(
        section.server, timeout=section.server_timeout, patience=section.server_patience
    )
    settings = server.settings
    if settings is None:
        raise UserError(
            f"rollout.server is {section.server!r}: its weights cannot be changed; start it with "
            "VLLM_SERVER_DEV_MODE=1 (docs/vllm.md)"
        )
    mode = (settings.get("model_config") or {}).get("logprobs_mode", "raw_logprobs")
    if mode != "raw_logprobs":
        raise UserError(
            f"rollout.server is {section.server!r}: its --logprobs-mode is {mode!r}; "
            "loss.importance_bound needs 'raw_logprobs', vLLM's default"
        )
    return server


def evaluation_server(address: str, model: str, stops: frozenset[int]) -> Sampler:
    """A sampler by the server at `address`, which answers with the weights of `model`.

    A server in development mode is told to load them, since an earlier run may have left others;
    any other must have been started on them. Raises UserError where it was not.
    """
    from opsd.rollout.vllm_server import ServerSampler

    server = VLLMServer(address, field="--server")
    place = Path(model)
    if server.settings is not None:
        server.load(place.absolute() if place.is_dir() else model)
    elif model not in (server.model, server.root) and place.absolute() != Path(server.root):
        raise UserError(
            f"--server is {address!r}: it serves {server.root!r}, not {model!r}; start it on that, "
            "or with VLLM_SERVER_DEV_MODE=1, so that it can be told to load it"
        )
    return ServerSampler(server, stops)


def make_sampler(
    config: Config,
    decoder: PreTrainedModel,
    stops: frozenset[int],
    dtype: torch.dtype,
    server: VLLMServer | None,
    longest: int | None,
) -> Sampler:
    """The sampler of a training run.

    Args:
        decoder: what the engines without vLLM sample with.
        longest: tokens of the longest sequence, for which the cache of vLLM here must have room.
    """
    section = config.rollout
    if section.engine in SAMPLERS:
        return SAMPLERS[section.engine](decoder, stops)
    if server is not None:
        from opsd.rollout.vllm_server import ServerSampler

        return ServerSampler(server, stops, _weights_place(config), dtype)
    from opsd.rollout.vllm_colocated import ColocatedSampler

    return ColocatedSampler(
        config.model.path,
        stops,
        trains=True,
        dtype=dtype,
        memory=section.gpu_memory,
        max_model_len=longest,
        max_num_seqs=section.batch_size,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )


def _weights_place(config: Config) -> Path:
    """This run's own directory for the weights that its server reads."""
    run = Path(config.output.dir).absolute()
    if config.rollout.weights_dir is None:
        return run / "weights-for-vllm"
    return Path(config.rollout.weights_dir) / f"opsd-{sha256(str(run).encode()).hexdigest()[:12]}"
