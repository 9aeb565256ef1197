"""What a client may send. Everything else is refused by its name, all problems at once.

A field is served as its owner defines it, or refused; nothing is dropped in silence. Exceptions are
listed here: fields that only say who asks (``IGNORED``), and unsupported ones at the value that
asks for nothing (``NEUTRAL``). A field that is null counts as left out.

Numbers that shape the draw pass unread: the engine says what is wrong with them.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PositiveInt,
    ValidationError,
)
from pydantic_core import ErrorDetails, from_json

from npr_megatron.serving.errors import ApiError

IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_logprobs": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields of OpenAI's that are not supported, and what they may be all the same."""
MAX_CHOICES = 128
_MAX_STOPS = 4
_MAX_SHOWN = 60


class _Sent(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _text_of(content: object) -> str:
    """Return the text of a message, which may come in parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts: list[str] = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text), **rest} if not rest:
                texts.append(text)
            case _:
                raise ValueError(
                    'must be a string or a list of {"type": "text", "text": "..."}; this server '
                    "reads text only"
                )
    return "".join(texts)


def _prompts_of(prompt: object) -> list[str | list[int]]:
    """Return the prompts of a completion: one text, one list of ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(x, str) for x in prompt):
            return prompt
        if all(type(x) is int for x in prompt):
            return [prompt]
        if all(isinstance(x, list) and x and all(type(i) is int for i in x) for x in prompt):
            return prompt
    raise ValueError(
        "must be a string, a list of token ids, or a list with at least one of either kind"
    )


def _stops_of(stop: object) -> list[str]:
    stops = stop if isinstance(stop, list) else [stop]
    texts = [text for text in stops if isinstance(text, str) and text]
    if len(texts) < len(stops) or len(texts) > _MAX_STOPS:
        raise ValueError(f"must be a text or at most {_MAX_STOPS} of them, none empty")
    return texts


class Message(_Sent):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_text_of, json_schema_input_type=str | list[dict])]
    name: str | None = None


class StreamOptions(_Sent):
    """What a stream tells besides the answer."""

    include_usage: bool = False


class Extension(_Sent):
    """What only this server has; clients of OpenAI's send it as ``extra_body={"npr": {...}}``."""

    mode: Literal["parallel", "sequential"] = "parallel"
    """Decode branches at once, or plain text."""
    max_critical_path: PositiveInt | None = None
    """Longest path through an answer [tokens]; ``max_tokens`` counts all its branches."""
    branches: bool = False
    """Stream branches as they run; see :mod:`npr_megatron.serving`."""


class Asked(_Sent):
    """What both kinds of completion have in common."""

    model: str | None = None
    """None is the one that is served."""
    max_tokens: PositiveInt | None = None
    """Generated tokens over all branches; None: half of the model's positions, at most 8192, or
    what the prompt leaves."""
    temperature: Any = 1.0
    top_p: Any = 1.0
    top_k: Any = 0
    min_p: Any = 0.0
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64)
    """Equal requests with equal seeds get equal answers; None draws one."""
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: Annotated[
        list[str], PlainValidator(_stops_of, json_schema_input_type=str | list[str])
    ] = []
    """The answer ends before the first of these in its linear text."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    npr: Extension = Extension()

    @property
    def tells_logprobs(self) -> bool:
        """Whether the log-prob of each token is told."""
        return False


class ChatAsked(Asked):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: PositiveInt | None = None
    """Same as ``max_tokens``."""
    logprobs: bool = False

    @property
    def tells_logprobs(self) -> bool:
        """Whether the log-prob of each token is told."""
        return self.logprobs


class CompletionAsked(Asked):
    """Body of ``/v1/completions``."""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(
            _prompts_of, json_schema_input_type=str | list[int] | list[str] | list[list[int]]
        ),
    ]
    logprobs: Literal[0] | None = None
    """0 tells the log-probs of the answer's tokens; alternatives to them are not kept."""

    @property
    def tells_logprobs(self) -> bool:
        """Whether the log-prob of each token is told."""
        return self.logprobs is not None


AnyAsked = ChatAsked | CompletionAsked
SomeAsked = TypeVar("SomeAsked", bound=Asked)


def read_body(body: bytes) -> dict[str, Any]:
    """Return the fields of a request that ask for something.

    Raises:
        ApiError: the body is no JSON object.
    """
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, "invalid_json", f"the body is no JSON: {error}; send one object") from (
            error
        )
    if not isinstance(fields, dict):
        raise ApiError(
            400, "invalid_json", f"the body is a JSON {type(fields).__name__}; send an object"
        )
    return {
        name: value
        for name, value in fields.items()
        if value is not None and name not in IGNORED and not _asks_for_nothing(name, value)
    }


def parse(kind: type[SomeAsked], fields: dict[str, Any]) -> tuple[SomeAsked | None, list[str]]:
    """Return what is asked, or None and one sentence for each problem."""
    try:
        asked = kind.model_validate(fields)
    except ValidationError as error:
        return None, [_sentence(problem, kind) for problem in error.errors(include_url=False)]
    problems = _contradictions(asked)
    return (None, problems) if problems else (asked, [])


def _asks_for_nothing(name: str, value: object) -> bool:
    return any(type(value) in (type(x), float) and value == x for x in NEUTRAL.get(name, ()))


def _contradictions(asked: Asked) -> list[str]:
    problems: list[str] = []
    if asked.stream_options is not None and not asked.stream:
        problems.append("stream_options is given without stream; add stream: true or drop it")
    if asked.npr.branches and not asked.stream:
        problems.append("npr.branches is given without stream; add stream: true or drop it")
    if asked.npr.branches and asked.stop:
        problems.append(
            "stop and npr.branches exclude each other: branches are shown as they run, so what "
            "lies behind a stop in linear order may have been shown before it; drop one of them"
        )
    if asked.tells_logprobs and asked.stop:
        problems.append(
            "stop and logprobs exclude each other: a stop may end inside a token; drop one of them"
        )
    if isinstance(asked, ChatAsked):
        if len({asked.max_tokens, asked.max_completion_tokens} - {None}) > 1:
            problems.append(
                f"max_tokens is {asked.max_tokens} and max_completion_tokens "
                f"{asked.max_completion_tokens}; they mean the same, give one of them"
            )
        if asked.messages[-1].role != "user":
            problems.append(
                f"messages ends with a turn of role {asked.messages[-1].role}; end it with the "
                "user's question"
            )
    return problems


def _sentence(problem: ErrorDetails, kind: type[Asked]) -> str:
    path = ""
    for place in problem["loc"]:
        path += f"[{place}]" if isinstance(place, int) else f".{place}" if path else place
    match problem["type"]:
        case "extra_forbidden" if path in NEUTRAL:
            return f"{path} is not supported by this server; leave it out"
        case "extra_forbidden":
            near = difflib.get_close_matches(path, [*kind.model_fields, *NEUTRAL], n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            return f"{path} is no field that this server knows; {hint}"
        case "missing":
            return f"{path} is missing; it must be given"
    text = problem["msg"].removeprefix("Value error, ")
    found = repr(problem["input"])
    if len(found) > _MAX_SHOWN:
        found = f"{found[:_MAX_SHOWN]}..."
    return f"{path} is {found}: {text[0].lower()}{text[1:]}"
