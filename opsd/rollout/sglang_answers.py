"""Schemas of an SGLang server's answers: types and bounds of all values that we read.

They follow sglang's entrypoints/http_server.py, managers/io_struct.py and tokenizer_manager.py.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from opsd.rollout.vllm_answers import LogProb, Name, ServerAnswer, TokenId

Count = Annotated[int, Field(ge=0, lt=2**31)]


class ModelInfo(ServerAnswer):
    """The answer of /model_info, formerly /get_model_info."""

    model_path: Name
    model_type: Name | None = None
    weight_version: Name | None = None  # the name of the last loading; "default" after a start


class ServerInfo(ServerAnswer):
    """The answer of /server_info, formerly /get_server_info: the server's arguments and release."""

    version: Name = "?"
    dtype: Name | None = None
    device: Name | None = None
    # Without it, sampling_seed has no effect
    enable_deterministic_inference: bool = False
    max_req_input_len: Count | None = None  # it refuses a context of so many tokens


class Updated(ServerAnswer):
    """The answer of /update_weights_from_disk."""

    success: bool
    message: Any = None


class FinishReason(ServerAnswer):
    """The reason why a rollout ended."""

    type: Literal["stop", "length", "abort"]
    message: Any = None  # if it was aborted


# (log p, id), and possibly the token's text, for which we do not ask
Token = tuple[LogProb, TokenId, Any] | tuple[LogProb, TokenId]
# The first token of a context has no log-probability.
InputToken = tuple[LogProb | None, TokenId, Any] | tuple[LogProb | None, TokenId]


class MetaInfo(ServerAnswer):
    """A rollout's tokens and facts."""

    finish_reason: FinishReason
    prompt_tokens: Count
    output_token_logprobs: list[Token] = Field([])
    input_token_logprobs: list[InputToken] = Field([])
    weight_version: Any = None


class Generated(ServerAnswer):
    """The answer of /generate to a request for one rollout."""

    meta_info: MetaInfo
