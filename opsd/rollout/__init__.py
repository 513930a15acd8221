"""Who samples the rollouts: the model's own module, by `generate` in sorted batches or `continuous`
batching, vLLM in this process, or a server, of vLLM's or SGLang's.

Import the samplers and `make_sampler`, which picks one, from here.
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
