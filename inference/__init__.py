"""The network in plain PyTorch, the sampler and the pipeline. It imports no room but the tokenizer's."""

from inference.config import ModelConfig

__all__ = ["ModelConfig", "VideoARPipeline", "VideoARTransformer"]


def __getattr__(name: str):
    # configuration alone must stay cheap to import (capacity planning, command-line help)
    if name == "VideoARPipeline":
        from inference.pipeline import VideoARPipeline

        return VideoARPipeline
    if name == "VideoARTransformer":
        from inference.model import VideoARTransformer

        return VideoARTransformer
    raise AttributeError(f"module 'inference' has no attribute '{name}'")
