"""What clients get: the JSON of jobs, lists of them, and the model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from inference.pipeline import VideoARPipeline
from inference.serving.config import ServeConfig
from inference.serving.jobs import CANCELLED, COMPLETED, FAILED, Job, JobStore
from inference.serving.requests import MAX_SIDE, trained_frames

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


class JobError(BaseModel):
    """Why a job failed: a word for programs and one sentence."""

    code: str
    message: str


class Video(BaseModel):
    """A job. Times are seconds since 1970, `size` is WIDTHxHEIGHT, `seconds` a text as in OpenAI's interface."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int
    frames_done: int
    queue_position: int | None
    created_at: int
    started_at: int | None
    completed_at: int | None
    prompt: str
    seconds: str
    num_frames: int
    fps: float
    size: str
    seed: int
    guidance: str | float
    temperature: float
    input_reference: Literal["image", "video"] | None
    error: JobError | None


class VideoList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A job that is no more."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Limits(BaseModel):
    """What may be asked for."""

    max_num_frames: int
    max_pixels: int
    max_side: int
    max_prompt_characters: int
    max_prompt_tokens: int | None
    max_upload_bytes: int


class Model(BaseModel):
    """The served model; `size` is WIDTHxHEIGHT."""

    id: str
    object: Literal["model"] = "model"
    owned_by: str = "videoar"
    fps: float
    num_frames: int
    size: str
    class_names: list[str] | None
    limits: Limits


class ModelList(BaseModel):
    """The one model."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether videos are being made."""

    status: Literal["ok", "failing"]
    model: str
    queue_length: int


def video(job: Job, store: JobStore, model: str, fps: float) -> Video:
    """A job as clients see it."""
    wanted = job.wanted
    progress = 100 if job.status == COMPLETED else min(99, 100 * job.frames_done // wanted.num_frames)
    return Video(
        id=job.id, model=model, status=job.status, progress=progress, frames_done=job.frames_done,  # type: ignore[arg-type]
        queue_position=store.position(job), created_at=job.created_at, started_at=job.started_at,
        completed_at=job.completed_at, prompt=wanted.prompt, seconds=f"{wanted.num_frames / fps:g}",
        num_frames=wanted.num_frames, fps=fps, size=f"{wanted.size[1]}x{wanted.size[0]}", seed=wanted.seed,
        guidance=wanted.guidance, temperature=wanted.temperature, input_reference=job.given,  # type: ignore[arg-type]
        error=JobError(code=job.error[0], message=job.error[1]) if job.error else None,
    )  # fmt: skip


def model(name: str, pipe: VideoARPipeline, config: ServeConfig) -> Model:
    """The model as clients see it."""
    height, width = pipe.size
    longest = pipe.frames_for(config.max_seconds)
    limits = Limits(
        max_num_frames=longest, max_pixels=config.max_pixels, max_side=MAX_SIDE,
        max_prompt_characters=config.max_prompt_characters,
        max_prompt_tokens=pipe.config.max_text_length if pipe.encoder is not None else None, max_upload_bytes=config.max_upload_bytes,
    )  # fmt: skip
    return Model(
        id=name, fps=pipe.fps, num_frames=min(longest, trained_frames(pipe)), size=f"{width}x{height}",
        class_names=pipe.class_names, limits=limits,
    )  # fmt: skip


def why_no_content(job: Job) -> tuple[str, str]:
    """Code and message where a video is asked for that is not there."""
    if job.status == FAILED and job.error:
        return "job_failed", f"this video failed ({job.error[1].rstrip('.')}): make another one."
    if job.status == CANCELLED:
        return "job_cancelled", "this video was cancelled: make another one."
    return "not_ready", "this video is not finished: ask for it again when its status is completed."
