"""What a vLLM server may answer: types and bounds of every value that we read, and no others."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=4096)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
LogProb = Annotated[float, Field(ge=-1e6, le=1e-3)]
"""vLLM writes -9999 for minus infinity; rounding may lift a probability of 1 a little above it."""


class Known(BaseModel):
    """Of an answer: no type is guessed (true is not 1, "1" is not 1), no number is infinite or
    NaN, and what we do not read is left out."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ServedModel(Known):
    """`root`: the path or the hub's name; `max_model_len`: the longest sequence."""

    id: Name
    root: Name | None = None
    max_model_len: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class Models(Known):
    """Of /v1/models."""

    data: list[ServedModel]


class ModelConfig(Known):
    """Of the server's settings."""

    logprobs_mode: Name = "raw_logprobs"


class Settings(Known):
    """`instance_id` is new at each start of a server."""

    model_config_: ModelConfig | None = Field(None, alias="model_config")
    instance_id: Name | None = None


class ServerInfo(Known):
    """Of /server_info?config_format=json."""

    vllm_config: Settings | None = None


class Reset(Known):
    """Of /reset_prefix_cache."""

    success: bool = True


class Results(Known):
    """Of /collective_rpc: what each worker returns."""

    results: list[Any]


class LogProbs(Known):
    """Of the drawn tokens."""

    token_logprobs: list[LogProb]


class Choice(Known):
    """A completion."""

    index: Literal[0]
    finish_reason: Literal["stop", "length", "abort"]
    token_ids: list[TokenId] | None = None
    prompt_token_ids: list[TokenId] | None = None
    logprobs: LogProbs | None = None


class Completions(Known):
    """Of /v1/completions, where one completion is asked for."""

    model: Name
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
