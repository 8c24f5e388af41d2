"""The HTTP interface, in the manner of OpenAI's /v1/videos, and the page."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import numpy as np
import pydantic_core
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from inference.serving import errors, views
from inference.serving.config import ServeConfig
from inference.serving.errors import ApiError, ErrorBody, refused
from inference.serving.guard import Guard
from inference.serving.jobs import COMPLETED, Job, QueueFull, Wanted
from inference.serving.requests import checked, parsed, request_schemas
from inference.serving.service import VideoService
from inference.serving.uploads import DECODERS, read_reference
from inference.serving.variants import MEDIA_TYPES, make_variant

PAGE = Path(__file__).parent / "page"
FORM_SLACK = 65536  # bytes of a form beside its file
FIELD_BYTES = 16  # of a prompt's character, as JSON or in a form, at most
KEEP_ALIVE = 10.0  # seconds after which a silent stream says that it lives


class ListQuery(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, description="the id after which the list goes on")
    order: Literal["asc", "desc"] = "desc"


class ContentQuery(BaseModel):
    """Which file to send."""

    model_config = ConfigDict(extra="forbid")

    variant: Literal["mp4", "gif", "png"] = "mp4"


class FramesQuery(BaseModel):
    """Where to begin."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(0, ge=0, le=10**9, description="the first frame to send")


def create_app(service: VideoService) -> FastAPI:
    """The application of a service, which it neither starts nor closes."""
    # the usual documentation pages load scripts from elsewhere
    app = FastAPI(title="VideoAR", version="1", docs_url=None, redoc_url=None)
    config = service.config
    plain = _plain_bytes(config)
    app.add_middleware(
        Guard,
        metrics=service.metrics,
        max_bytes=config.max_upload_bytes + plain,
        max_plain_bytes=plain,
        seconds=config.upload_seconds,
    )
    app.add_exception_handler(ApiError, errors.on_api_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(RequestValidationError, errors.on_invalid)
    app.add_exception_handler(ClientDisconnect, errors.on_vanished)
    app.add_exception_handler(OSError, errors.on_os_error)
    app.add_exception_handler(MemoryError, errors.on_no_memory)
    app.add_exception_handler(Exception, errors.on_crash)
    app.include_router(_videos(service))
    app.include_router(_about(service))
    app.include_router(_page())
    return app


def _plain_bytes(config: ServeConfig) -> int:
    """The largest request without its file."""
    return FORM_SLACK + FIELD_BYTES * config.max_prompt_characters


def _error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


def _key_check(service: VideoService) -> list[Any]:
    """The dependency that asks for the key, where there is one."""
    if service.api_key is None:
        return []
    expected = service.api_key.encode()

    async def check(given: Annotated[Any, Depends(HTTPBearer(auto_error=False))]) -> None:
        sent = given.credentials.encode() if given else b""
        if not hmac.compare_digest(sent, expected):
            message = "the key is missing or wrong: send the header 'Authorization: Bearer KEY'."
            raise ApiError(401, "invalid_api_key", message, {"WWW-Authenticate": "Bearer"})

    return [Depends(check)]


def _videos(service: VideoService) -> APIRouter:
    common = _error_answers(400, 401, 403, 408, 413)
    router = APIRouter(prefix="/v1", dependencies=_key_check(service), responses=common)
    store, config = service.store, service.config
    plain = _plain_bytes(config)
    # each of them takes memory; downloads must not wait for uploads
    decoders, writers, checkers = CapacityLimiter(DECODERS), CapacityLimiter(1), CapacityLimiter(1)

    def shown(job: Job) -> views.Video:
        return views.video(job, store, service.name, service.pipe.fps)

    def known(name: str) -> Job:
        job = store.get(name)
        if job is None:
            raise ApiError(
                404, "unknown_video", "there is no video of this id: it was deleted, or is older than those kept."
            )
        return job

    @router.post(
        "/videos",
        summary="Make a video",
        responses=_error_answers(415, 422, 429, 503, 507),
        openapi_extra={"requestBody": {"required": True, "content": request_schemas()}},
    )
    async def create(request: Request) -> views.Video:
        try:
            with store.place() as folder:
                fields, upload = await _read(request, plain)
                try:
                    wanted = await to_thread.run_sync(_wanted, fields, upload, limiter=checkers)
                    job = Job(folder, wanted)
                    if isinstance(upload, UploadFile):
                        job.given = await to_thread.run_sync(_keep_reference, upload, job, limiter=decoders)
                finally:
                    if isinstance(upload, UploadFile):
                        await upload.close()
                if store.stopped:
                    raise ApiError(503, "ending", "the server ends: try again when it is back.")
                store.add(job)
        except QueueFull as full:
            headers = {"Retry-After": str(full.retry_after)}
            raise ApiError(429, "queue_full", str(full), headers) from None
        return shown(job)

    def _wanted(fields: Any, upload: UploadFile | Literal[True] | None) -> Wanted:
        """In a thread of its own: a text encoder may be a network."""
        wanted = checked(parsed(fields, strict=upload is None), service.pipe, service.name, config)
        service.check_memory(wanted)
        return wanted

    def _keep_reference(upload: UploadFile, job: Job) -> str:
        wanted = job.wanted
        # as many frames as the pipeline takes by itself: up to half of the result
        kind, frames = read_reference(
            upload.file, job.folder, wanted.size, service.pipe.fps, (wanted.num_frames + 1) // 2, config
        )
        service.check_memory(wanted, len(frames))
        frames = np.ascontiguousarray(frames)
        with job.given_file.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(frames))
            file.write(frames.data)  # of a full disk np.save does not say that it is full
        return kind

    @router.get("/videos", summary="The jobs", responses=_error_answers(404, 422))
    async def listed(query: Annotated[ListQuery, Query()]) -> views.VideoList:
        jobs = store.listed()
        if query.order == "desc":
            jobs.reverse()
        if query.after is not None:
            jobs = jobs[jobs.index(known(query.after)) + 1 :]
        part = [shown(job) for job in jobs[: query.limit]]
        ends = (part[0].id, part[-1].id) if part else (None, None)
        return views.VideoList(data=part, first_id=ends[0], last_id=ends[1], has_more=len(jobs) > len(part))

    @router.get("/videos/{video_id}", summary="A job", responses=_error_answers(404, 422))
    async def status(video_id: str) -> views.Video:
        return shown(known(video_id))

    @router.delete("/videos/{video_id}", summary="Cancel or delete a job", responses=_error_answers(404, 422))
    async def delete(video_id: str) -> views.Deleted:
        known(video_id)
        store.remove(video_id)
        return views.Deleted(id=video_id)

    @router.get(
        "/videos/{video_id}/content",
        summary="A finished video",
        response_class=Response,
        responses={
            200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}},
            **_error_answers(404, 409, 422, 503, 507),
            206: {"description": "a part", "content": {kind: {} for kind in MEDIA_TYPES.values()}},
        },
    )
    async def content(video_id: str, query: Annotated[ContentQuery, Query()]) -> Response:
        job = known(video_id)
        if job.status != COMPLETED:
            raise ApiError(409, *views.why_no_content(job))
        file = job.variant_file(query.variant)
        if not file.is_file():
            await to_thread.run_sync(make_variant, job, query.variant, service.pipe.fps, limiter=writers)
            store.grown(job)
            known(video_id)  # it may have been deleted meanwhile
        return FileResponse(file, media_type=MEDIA_TYPES[query.variant], filename=f"{job.id}.{query.variant}")

    @router.get(
        "/videos/{video_id}/frames",
        summary="Watch a video grow (server-sent events)",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}, **_error_answers(404, 422)},
    )
    async def frames(video_id: str, query: Annotated[FramesQuery, Query()]) -> Response:
        """Events `job` (its JSON, whenever it got on), `frame` ({"index", "image"}: a JPEG as a data URL) and, last, `end` (its JSON)."""
        job = known(video_id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(job, query.start), media_type="text/event-stream", headers=headers)

    async def events(job: Job, index: int) -> AsyncIterator[str]:
        with job.watched() as change:
            while True:
                change.clear()
                ended = job.ended or store.stopped  # before the others: what ended changes no more
                state, done = shown(job), job.frames_done
                if not ended:
                    yield _event("job", state.model_dump_json())
                while index < done:
                    try:
                        picture = await anyio.Path(job.frame_file(index)).read_bytes()
                    except FileNotFoundError:  # deleted meanwhile
                        index = done
                        break
                    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
                    yield _event("frame", json.dumps({"index": index, "image": url}))
                    index += 1
                if ended:
                    yield _event("end", state.model_dump_json())
                    return
                try:
                    async with asyncio.timeout(KEEP_ALIVE):
                        await change.wait()
                except TimeoutError:
                    yield ": waiting\n\n"

    @router.get("/models", summary="The served model")
    async def models() -> views.ModelList:
        return views.ModelList(data=[views.model(service.name, service.pipe, config)])

    return router


def _event(kind: str, data: str) -> str:
    return f"event: {kind}\ndata: {data}\n\n"


async def _read(request: Request, field_bytes: int) -> tuple[Any, UploadFile | Literal[True] | None]:
    """What was sent: the fields, and the file; True in the file's place for a form without one, None for JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            return pydantic_core.from_json(await request.body(), allow_inf_nan=False), None
        except ValueError as error:
            raise refused("invalid_json", f"the body is no JSON ({str(error)[:100]}): send a JSON object.") from None
    if kind != "multipart/form-data":
        raise ApiError(
            415, "unsupported_type", "the body's type is unknown: send application/json or multipart/form-data."
        )
    form = await request.form(max_files=1, max_fields=20, max_part_size=field_bytes)  # of files the guard counts them
    fields: dict[str, Any] = {}
    upload: UploadFile | Literal[True] = True
    for name, value in form.multi_items():
        if name == "input_reference":
            if isinstance(value, UploadFile):
                upload = value if value.filename or value.size else True
            elif value:
                raise refused("bad_input_reference", "input_reference is no file: send it with a file name.")
        elif not isinstance(value, str):
            raise refused("invalid_value", f"the field '{name[:100]}' is a file: only input_reference is one.")
        elif name in fields:
            raise refused("invalid_value", f"the field '{name[:100]}' was sent twice: send it once.")
        else:
            fields[name] = value
    return fields, upload


def _about(service: VideoService) -> APIRouter:
    router = APIRouter()

    @router.get("/health", summary="Whether videos are being made", responses={503: {"model": views.Health}})
    async def health() -> Response:
        alive = service.worker.well and not service.store.stopped
        body = views.Health(
            status="ok" if alive else "failing", model=service.name, queue_length=service.store.waiting()
        )
        return JSONResponse(body.model_dump(), 200 if alive else 503)

    @router.get(
        "/metrics", summary="For Prometheus", response_class=Response, responses={200: {"content": {"text/plain": {}}}}
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def _page() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    def serve(path: str, name: str, kind: str) -> None:
        body = (PAGE / name).read_bytes()

        async def send() -> Response:
            return Response(body, media_type=kind, headers={"Cache-Control": "no-cache"})

        router.add_api_route(path, send)

    serve("/", "index.html", "text/html")
    serve("/page.css", "page.css", "text/css")
    serve("/page.js", "page.js", "text/javascript")
    serve("/favicon.ico", "icon.svg", "image/svg+xml")
    return router
