"""Samples the rollouts: with the model's own module, by `generate` in sorted batches or by
`continuous` batching; with vLLM in this process; or with a vLLM or SGLang server.

Import the samplers, and `make_sampler`, which chooses one, from here.
"""

from opsd.common.http import ServerError, ServerGoneError
from opsd.rollout.base import Rollout, Sampler, Sampling, described
from opsd.rollout.continuous import ContinuousSampler
from opsd.rollout.distributed import DistributedSampler, RolloutsAhead
from opsd.rollout.engines import (
    SAMPLERS,
    check_engine,
    evaluation_server,
    make_sampler,
    training_server,
)
from opsd.rollout.generate import GenerateSampler
from opsd.rollout.server import RolloutServer, ServerRestartedError
