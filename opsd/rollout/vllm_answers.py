"""What a vLLM server may answer: types and bounds of every value that we read, and no others."""

# mypy: ignore-errors
# These types are made while the module is imported.

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, create_model

# No type is guessed (true is not 1, "1" is not 1) and no number is infinite or NaN.
EXACT = ConfigDict(strict=True, allow_inf_nan=False)


def answer(**fields: Any) -> Any:
    """The pydantic model of an object: name → type, or (type, default)."""
    defined = {name: of if isinstance(of, tuple) else (of, ...) for name, of in fields.items()}
    return create_model("Answer", __config__=EXACT, **defined)


Name = Annotated[str, Field(min_length=1, max_length=4096)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# vLLM writes -9999 for minus infinity; rounding may lift a probability of 1 a little above it.
LogProb = Annotated[float, Field(ge=-1e6, le=1e-3)]
One = Field(min_length=1, max_length=1)

MODELS = answer(data=list[answer(id=Name, root=(Name | None, None))])
SETTINGS = answer(
    logprobs=(
        answer(logprobs_mode=(Name, "raw_logprobs")) | None,
        Field(None, alias="model_config"),
    ),
    instance_id=(Name | None, None),  # new at each start of a server
)
SERVER_INFO = answer(vllm_config=(SETTINGS | None, None))
RESET = answer(success=(bool, True))
RESULTS = answer(results=list[Any])  # what each worker returns
CHOICE = answer(
    index=Literal[0],
    finish_reason=Literal["stop", "length", "abort"],
    token_ids=(list[TokenId] | None, None),
    prompt_token_ids=(list[TokenId] | None, None),
    logprobs=(answer(token_logprobs=list[LogProb]) | None, None),
)
COMPLETIONS = answer(model=Name, choices=Annotated[list[CHOICE], One])
