"""Schemas of a vLLM server's answers: types and bounds of all values that we read."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from opsd.common.schema import FirstErrors

Name = Annotated[str, Field(min_length=1, max_length=4096)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# vLLM writes -9999 for minus infinity; by rounding a probability may be a little above 1.
LogProb = Annotated[float, Field(ge=-1e6, le=1e-3)]


class ServerAnswer(FirstErrors):
    """A server's answer; fields that are not listed may hold anything."""

    # Types are strict (true is not 1, "1" is not 1), and numbers are finite.
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ServedModel(ServerAnswer):
    """A model that the server has."""

    id: Name
    root: Name | None = None
    max_model_len: Annotated[int, Field(gt=0)] | None = None  # the longest sequence


class Models(ServerAnswer):
    """The answer of /v1/models."""

    data: list[ServedModel]


class ModelSettings(ServerAnswer):
    """The model's dtype, and the kind of log-probabilities that the server returns."""

    logprobs_mode: Name = "raw_logprobs"
    dtype: Name | None = None


class DeviceSettings(ServerAnswer):
    """The server's device."""

    device: Name | None = None


class SchedulerSettings(ServerAnswer):
    """The most tokens in one forward."""

    max_num_batched_tokens: Annotated[int, Field(gt=0)] | None = None


class WorkerSettings(ServerAnswer):
    """The class that was added to its workers."""

    worker_extension_cls: str | None = None


class AdapterSettings(ServerAnswer):
    """Its settings for adapters."""

    max_lora_rank: Annotated[int, Field(gt=0)] = 16


class Settings(ServerAnswer):
    """The fields of the server's own configuration that we read."""

    model: ModelSettings = Field(ModelSettings(), alias="model_config")
    device_config: DeviceSettings = DeviceSettings()
    scheduler_config: SchedulerSettings = SchedulerSettings()
    parallel_config: WorkerSettings = WorkerSettings()
    lora_config: AdapterSettings | None = None
    instance_id: Name | None = None  # changes when the server is restarted

    @property
    def on_cpu(self) -> bool:
        return self.device_config.device == "cpu"


class Environment(ServerAnswer):
    """The environment variables of the server that we read."""

    adapters: bool = Field(False, alias="VLLM_ALLOW_RUNTIME_LORA_UPDATING")


class ServerInfo(ServerAnswer):
    """The answer of /server_info."""

    vllm_config: Settings | None = None
    vllm_env: Environment = Environment()


class Version(ServerAnswer):
    """The answer of /version."""

    version: Name = "?"


class Reset(ServerAnswer):
    """The answer of /reset_prefix_cache."""

    success: bool = True


class Results(ServerAnswer):
    """The answer of /collective_rpc."""

    results: list[Any]  # one for each worker


class LogProbs(ServerAnswer):
    """A rollout's log-probabilities, one for each token."""

    token_logprobs: list[LogProb]


class Choice(ServerAnswer):
    """One rollout in an answer."""

    index: Literal[0]
    finish_reason: Literal["stop", "length", "abort"]
    token_ids: list[TokenId] | None = None
    prompt_token_ids: list[TokenId] | None = None
    logprobs: LogProbs | None = None


class Completions(ServerAnswer):
    """The answer of /v1/completions to a request for one rollout."""

    model: Name
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
