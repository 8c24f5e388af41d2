"""Settings of `videoar serve`."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizer.errors import UserError, check_each


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `videoar serve`.

    Args:
        host: address to listen at; 127.0.0.1 is reached from this machine only, 0.0.0.0 from everywhere.
        port: to listen at; 0: any free one, which the first line of output names.
        max_queue: jobs that may wait beside the one that runs; further ones are answered with 429.
        max_seconds: longest video.
        max_pixels: largest frame, width times height.
        max_prompt_characters: longest prompt.
        max_upload_bytes: largest uploaded file.
        max_upload_pixels: largest uploaded image, or frame of an uploaded video, width times height.
        max_upload_frames: frames of the longest uploaded video, both its own and at the model's rate.
        max_upload_video_pixels: of all frames of an uploaded video together, which bounds the time that its decoding takes.
        upload_seconds: time that a client has to send a request.
        keep_videos: finished jobs that are kept; the oldest go first.
        keep_bytes: what the finished jobs may take on disk together; the oldest go first.
        api_key_variable: environment variable that holds the key which clients have to send; no key is asked for where it is not set.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_queue: int = 16
    max_seconds: float = 30.0
    max_pixels: int = 1024 * 1024
    max_prompt_characters: int = 2000
    max_upload_bytes: int = 64 * 1024 * 1024
    max_upload_pixels: int = 50_000_000
    max_upload_frames: int = 3000
    max_upload_video_pixels: int = 2_000_000_000
    upload_seconds: float = 120.0
    keep_videos: int = 100
    keep_bytes: int = 2 * 1024**3
    api_key_variable: str = "VIDEOAR_API_KEY"

    def __post_init__(self) -> None:
        counts = ("max_queue", "max_pixels", "max_prompt_characters", "max_upload_bytes", "max_upload_pixels")
        counts += ("max_upload_frames", "max_upload_video_pixels", "keep_videos", "keep_bytes")
        check_each(self, counts, lambda value: value >= 1, "be at least 1", "the server's ")
        check_each(self, ("max_seconds", "upload_seconds"), lambda value: value > 0, "be above 0", "the server's ")
        check_each(self, ("port",), lambda value: 0 <= value <= 65535, "lie between 0 and 65535", "the server's ")
        if not self.host or not self.api_key_variable:
            raise UserError("the server's host and api_key_variable can't be empty: give them, or leave them out.")
