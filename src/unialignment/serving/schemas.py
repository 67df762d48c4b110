"""Bodies of requests and responses: OpenAI's, with a few fields more. Unknown fields are refused, as OpenAI does.

Fields of OpenAI's that mean nothing here are accepted and have no effect; those that would change the result but can't
be honoured are refused. Knows nothing of how requests are carried out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Ignored = Annotated[Any, Field(description="Accepted for compatibility; has no effect.")]
Seed = Annotated[int | None, Field(ge=0, le=2**62, description="Repeatable result; new unless given.")]
Priority = Annotated[int, Field(ge=-10, le=10, description="Higher ones leave the queue first.")]
Timeout = Annotated[float | None, Field(ge=0.001, le=3600, description="Seconds until the request fails.")]
OutputFormat = Literal["png", "jpeg", "webp"]
Solver = Literal["euler", "heun", "dpmpp", "stochastic"]


class Strict(BaseModel):
    """A body without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class Sampling(Strict):
    """Fields that every task takes beside OpenAI's."""

    seed: Seed = None
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps; the model's unless given.")
    guidance_scale: float | None = Field(None, ge=0, description="Pull towards the text; 1 is none.")
    image_guidance_scale: float | None = Field(None, ge=0, description="Pull towards the pictures given; 1 is none.")
    negative_prompt: str | None = Field(None, description="What to move away from.")
    fit: Literal["crop", "pad"] | None = Field(None, description="How pictures of another shape are fitted.")
    priority: Priority = 0
    timeout: Timeout = None


class DrawingOptions(Sampling):
    """What requests for pictures have in common."""

    model: str | None = Field(None, max_length=200)
    n: int = Field(1, ge=1, description="How many pictures; picture i has seed + i.")
    size: str | None = Field(
        None,
        max_length=20,
        description="'auto' or 'WIDTHxHEIGHT'. Drawn at the model's own size and shape-fitting area, then resized; "
        "give width and height to draw at exactly that size.",
    )
    width: int | None = Field(None, ge=1, description="Draw at exactly this width in pixels.")
    height: int | None = Field(None, ge=1, description="Draw at exactly this height in pixels.")
    response_format: str | None = Field(None, max_length=20, description="'b64_json'; this server keeps no files.")
    output_format: OutputFormat = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool | None = False
    partial_images: int | None = Field(None, ge=0, le=3, description="Previews in a stream.")
    guidance_interval: tuple[float, float] | None = Field(None, description="Noise levels 0–1 with guidance.")
    solver: Solver | None = None
    shift: float | None = Field(None, gt=0)
    rewrite: bool | None = Field(
        None, description="Have the model word the prompt first, see revised_prompt; the model's default unless given."
    )
    best_of: int | None = Field(None, ge=1, description="Draw so many and keep the n most similar to the prompt.")
    best_of_text: str | None = Field(None, description="What best_of compares pictures with, instead of the prompt.")
    background: Literal["auto", "opaque", "transparent"] | None = None
    svg: Any = None
    frame_count: Any = None
    quality: str | None = Field(None, max_length=20)
    style: Ignored = None
    moderation: Ignored = None
    complexity: Ignored = None
    frame_duration_ms: Ignored = None
    safety_identifier: Ignored = None
    user: Ignored = None


class GenerationBody(DrawingOptions):
    """``POST /v1/images/generations``."""

    prompt: str = Field(description="What to draw.")


class ImageData(BaseModel):
    """One picture."""

    b64_json: str
    seed: int
    revised_prompt: str | None = None


class Usage(BaseModel):
    """Tokens, counted as this model does: words of the prompt, patches of pictures."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]


class ImagesResponse(BaseModel):
    """Pictures."""

    created: int
    data: list[ImageData]
    size: str
    output_format: OutputFormat
    background: Literal["opaque"] = "opaque"
    quality: str = "auto"
    usage: Usage
    task: str


class ImageURL(Strict):
    """A picture as a data: URL."""

    url: str
    detail: Ignored = None


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Ignored = None


class ImagePart(Strict):
    """A part of a message."""

    type: Literal["image_url"]
    image_url: ImageURL
    prompt_cache_breakpoint: Ignored = None


class Message(BaseModel):
    """A message of a conversation; of the assistant's only the role matters."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None
    name: str | None = None


class StreamOptions(Strict):
    """What a stream holds beside the text."""

    include_usage: bool | None = False
    include_canvas: bool | None = Field(False, description="Also the whole text so far, with [MASK] at open places.")
    include_obfuscation: Ignored = None


class ChatBody(Sampling):
    """``POST /v1/chat/completions``: one picture and a question, an instruction to describe it, or a text with gaps.

    With ``task="rewrite"`` a prompt alone, to be said as the model's own captions are.
    """

    model: str | None = Field(None, max_length=200)
    messages: list[Message] = Field(min_length=1, max_length=100)
    task: Literal["caption", "answer", "infill", "rewrite"] | None = Field(
        None, description="From the text unless given."
    )
    n: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    decoding: Literal["confidence", "ancestral"] | None = None
    confidence_threshold: float | None = Field(None, gt=0, le=1, description="Fill what is surer than this at once.")
    stop: Annotated[str, Field(max_length=200)] | Annotated[list[str], Field(max_length=16)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    tool_choice: Ignored = None
    function_call: Ignored = None
    frequency_penalty: Ignored = None
    presence_penalty: Ignored = None
    logit_bias: Ignored = None
    metadata: Ignored = None
    moderation: Ignored = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning_effort: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    user: Ignored = None
    verbosity: Ignored = None
    web_search_options: Ignored = None


class ChatUsage(BaseModel):
    """Tokens of a conversation."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One of the answers asked for."""

    index: int
    message: ChatMessage
    logprobs: None = None
    finish_reason: Literal["stop"] = "stop"


class ChatResponse(BaseModel):
    """Answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    system_fingerprint: str | None = None


class EmbeddingBody(Strict):
    """``POST /v1/embeddings``: texts, and pictures as data: URLs or image parts, in any mixture."""

    model: str | None = Field(None, max_length=200)
    input: str | list[str | Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(
        description="A text, a picture as data: URL, or a list of them."
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1, description="Only the model's own.")
    priority: Priority = 0
    timeout: Timeout = None
    user: Ignored = None


class Embedding(BaseModel):
    """One vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """Vectors, in the order of the input."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "unialignment"


class ModelList(BaseModel):
    """All that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(BaseModel):
    """Of the server."""

    status: Literal["ok", "unavailable"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorDetail
