"""The ground floor: video <-> latent <-> bits <-> sequence. It imports no other room."""

from tokenizer.codes import Codes
from tokenizer.errors import UserError
from tokenizer.quantizer import MultiScaleQuantizer
from tokenizer.scales import ScaleSchedule

__all__ = ["Codes", "MultiScaleQuantizer", "ScaleSchedule", "UserError", "VideoTokenizer"]


def __getattr__(name: str):
    # the autoencoder is the heavy part: configuration and sequence code import this room without it
    if name == "VideoTokenizer":
        from tokenizer.tokenizer import VideoTokenizer

        return VideoTokenizer
    raise AttributeError(f"module 'tokenizer' has no attribute '{name}'")
