"""What clients send, and whether this model and this server can do it."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inference.pipeline import VideoARPipeline
from inference.serving.config import ServeConfig
from inference.serving.errors import first_problem, refused
from inference.serving.jobs import Wanted
from tokenizer.clip_shape import check_num_frames
from tokenizer.errors import UserError

MAX_SIDE = 4096
"""Longest side of a frame in pixels, whatever the area; video encoders have limits."""
MAX_SEED = 2**53 - 1
"""JavaScript's largest exact integer."""


class VideoRequest(BaseModel):
    """A video to make."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1, description="What to show; a class's name where the model knows classes.")
    model: str | None = Field(None, description="The served model's name; nothing else is served.")
    seconds: Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,6})?$")] | None = (
        Field(None, description="Length; the nearest one that the model can make is taken.")
    )
    num_frames: int | None = Field(None, ge=1, description="Length in frames, 1+4n, in the place of seconds.")
    size: str | None = Field(
        None, pattern=r"^[0-9]{1,5}x[0-9]{1,5}$", description="WIDTHxHEIGHT in pixels, multiples of 16."
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Of the noise; a random one is taken and told if none is given."
    )
    guidance: Literal["t2v", "ucf"] | Annotated[float, Field(ge=-100, le=100)] = Field(
        "t2v", description="How closely to follow the prompt: a schedule, or a number."
    )
    temperature: float = Field(1.0, ge=0, le=100, description="Of the drawn bits; 0: the likelier bit.")


def request_schemas() -> dict[str, Any]:
    """The request body in OpenAPI's words: JSON, or a form with a file."""
    schema = VideoRequest.model_json_schema()
    form = {**schema, "properties": {**schema["properties"]}}
    form["properties"]["input_reference"] = {
        "type": "string",
        "format": "binary",
        "description": "An image to start from, or a video to go on from.",
    }
    return {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}


def parsed(fields: Any, strict: bool) -> VideoRequest:
    """The request in what a client sent.

    Args:
        fields: JSON's value, or a form's texts.
        strict: numbers are not taken from texts.

    Raises:
        ApiError: a field is unknown, missing or ill-typed.
    """
    if not isinstance(fields, dict):
        raise refused("invalid_value", 'the body is no JSON object: send one such as {"prompt": "a red circle"}.')
    try:
        return VideoRequest.model_validate(fields, strict=strict)
    except ValidationError as error:
        meanings = {name: field.description for name, field in VideoRequest.model_fields.items()}
        raise refused(*first_problem(error.errors(), meanings)) from None


def checked(request: VideoRequest, pipe: VideoARPipeline, name: str, config: ServeConfig) -> Wanted:
    """What is to be made.

    Args:
        request: what a client sent.
        pipe: the model.
        name: the model's.
        config: the limits.

    Raises:
        ApiError: the model can't do it, or it is over a limit.
    """
    if request.model not in (None, name):
        raise refused("unknown_model", f"this server has only the model '{name}': ask for it, or leave model out.")
    return Wanted(
        _prompt(request.prompt, pipe, config), _num_frames(request, pipe, config), _size(request.size, pipe, config),
        secrets.randbelow(2**31) if request.seed is None else request.seed, request.guidance, request.temperature,
    )  # fmt: skip


def _prompt(prompt: str, pipe: VideoARPipeline, config: ServeConfig) -> str:
    prompt = prompt.strip()
    if not prompt:
        raise refused("empty_prompt", "the prompt is empty: say what the video shall show.")
    if len(prompt) > config.max_prompt_characters:
        raise refused(
            "prompt_too_long",
            f"the prompt has {len(prompt)} characters: use at most {config.max_prompt_characters}.",
        )
    if pipe.encoder is not None:
        tokens, most = len(pipe.encoder.encode(prompt)), pipe.config.max_text_length
        if not 1 <= tokens <= most:  # the pipeline would cut it
            raise refused(
                "prompt_too_long" if tokens else "empty_prompt",
                f"the prompt has {tokens} text tokens, and this model takes 1 to {most}: write it otherwise.",
            )
    classes, names = pipe.config.num_classes, pipe.class_names
    if names and prompt not in names:
        raise refused("unknown_class", f"the class '{prompt[:60]}' is unknown: take one of {', '.join(names[:5])}, ...")
    if classes and not names and not (prompt.isascii() and prompt.isdigit() and int(prompt[:9]) < classes):
        raise refused(
            "unknown_class", f"this model is steered by classes: give a number from 0 to {classes - 1} as prompt."
        )
    return prompt


def _num_frames(request: VideoRequest, pipe: VideoARPipeline, config: ServeConfig) -> int:
    if request.seconds is not None and request.num_frames is not None:
        raise refused("invalid_value", "both seconds and num_frames were given: give one of them.")
    longest = pipe.frames_for(config.max_seconds)
    if request.num_frames is not None:
        frames = request.num_frames
    elif request.seconds is not None:
        frames = pipe.frames_for(min(float(request.seconds), 1e6))
    else:
        frames = min(longest, trained_frames(pipe))
    if frames > longest:
        raise refused(
            "too_long",
            f"a video of {frames} frames is too long: ask for at most {longest}, {longest / pipe.fps:g} seconds.",
        )
    try:
        check_num_frames(frames)
    except UserError as error:
        raise refused("invalid_value", str(error)) from None
    return frames


def _size(text: str | None, pipe: VideoARPipeline, config: ServeConfig) -> tuple[int, int]:
    width, height = (int(side) for side in text.split("x")) if text else reversed(pipe.size)
    if max(width, height) > MAX_SIDE or width * height > config.max_pixels:
        raise refused(
            "too_large",
            f"frames of {width}x{height} are too large: ask for at most {config.max_pixels} pixels and sides of at most {MAX_SIDE}.",
        )
    try:
        pipe.config.layout(1, pipe.tokenizer.schedule_for(height, width) if text else None)
    except UserError as error:
        raise refused("invalid_value", str(error)) from None
    return height, width


def trained_frames(pipe: VideoARPipeline) -> int:
    """Frames of the clips that the model was trained on."""
    return 1 + 4 * (pipe.config.num_frames - 1)
