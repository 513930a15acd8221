"""What an SGLang server may answer: types and bounds of every value that we read, and no others.

Read from sglang's entrypoints/http_server.py, managers/io_struct.py and tokenizer_manager.py.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from opsd.rollout.vllm_answers import LogProb, Name, ServerAnswer, TokenId

Count = Annotated[int, Field(ge=0, lt=2**31)]


class ModelInfo(ServerAnswer):
    """/model_info, which was /get_model_info."""

    model_path: Name
    model_type: Name | None = None
    weight_version: Name | None = None  # what the last loading named it; "default" at a start


class ServerInfo(ServerAnswer):
    """/server_info, which was /get_server_info: its arguments, and its release."""

    version: Name = "?"
    dtype: Name | None = None
    device: Name | None = None
    # Without it, sampling_seed decides nothing
    enable_deterministic_inference: bool = False


class Updated(ServerAnswer):
    """/update_weights_from_disk."""

    success: bool
    message: Any = None


class FinishReason(ServerAnswer):
    """Why a rollout ended."""

    type: Literal["stop", "length", "abort"]
    message: Any = None  # of an abort


# (log p, id), and the token's text, which we do not ask for
Token = tuple[LogProb, TokenId, Any] | tuple[LogProb, TokenId]
# The first token of a context has no log-probability
InputToken = tuple[LogProb | None, TokenId, Any] | tuple[LogProb | None, TokenId]


class MetaInfo(ServerAnswer):
    """Of a rollout."""

    finish_reason: FinishReason
    prompt_tokens: Count
    output_token_logprobs: list[Token] = Field([])
    input_token_logprobs: list[InputToken] = Field([])
    weight_version: Any = None


class Generated(ServerAnswer):
    """/generate, asked for one rollout."""

    meta_info: MetaInfo
