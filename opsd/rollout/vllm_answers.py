"""What a vLLM server may answer: types and bounds of every value that we read, and no others."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=4096)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# vLLM writes -9999 for minus infinity; rounding may lift a probability of 1 a little above it.
LogProb = Annotated[float, Field(ge=-1e6, le=1e-3)]


class ServerAnswer(BaseModel):
    """An answer of a server: fields that are not here hold anything."""

    # No type is guessed (true is not 1, "1" is not 1) and no number is infinite or NaN.
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ServedModel(ServerAnswer):
    """One of those that the server has."""

    id: Name
    root: Name | None = None
    max_model_len: Annotated[int, Field(gt=0)] | None = None  # its window


class Models(ServerAnswer):
    """/v1/models."""

    data: list[ServedModel]


class ModelSettings(ServerAnswer):
    """How the server runs its model, and what its log-probabilities are of."""

    logprobs_mode: Name = "raw_logprobs"
    dtype: Name | None = None


class DeviceSettings(ServerAnswer):
    """What the server computes on."""

    device: Name | None = None


class SchedulerSettings(ServerAnswer):
    """What it computes at once."""

    max_num_batched_tokens: Annotated[int, Field(gt=0)] | None = None


class Settings(ServerAnswer):
    """The server's own configuration, as far as it is read."""

    model: ModelSettings = Field(ModelSettings(), alias="model_config")
    device_config: DeviceSettings = DeviceSettings()
    scheduler_config: SchedulerSettings = SchedulerSettings()
    instance_id: Name | None = None  # new at each start of a server

    @property
    def on_cpu(self) -> bool:
        return self.device_config.device == "cpu"


class ServerInfo(ServerAnswer):
    """/server_info."""

    vllm_config: Settings | None = None


class Version(ServerAnswer):
    """/version."""

    version: Name = "?"


class Reset(ServerAnswer):
    """/reset_prefix_cache."""

    success: bool = True


class Results(ServerAnswer):
    """/collective_rpc."""

    results: list[Any]  # what each worker returns


class LogProbs(ServerAnswer):
    """A rollout's, one a token."""

    token_logprobs: list[LogProb]


class Choice(ServerAnswer):
    """A rollout."""

    index: Literal[0]
    finish_reason: Literal["stop", "length", "abort"]
    token_ids: list[TokenId] | None = None
    prompt_token_ids: list[TokenId] | None = None
    logprobs: LogProbs | None = None


class Completions(ServerAnswer):
    """/v1/completions, asked for one rollout."""

    model: Name
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
