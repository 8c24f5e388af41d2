"""`videoar serve`: one model behind an HTTP interface and a page. Only what runs the server imports FastAPI."""

from inference.serving.config import ServeConfig

__all__ = ["ServeConfig"]
