"""The ground floor: video <-> latent <-> bits <-> sequence. It imports no other room."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenizer.errors import UserError
from tokenizer.scales import ScaleSchedule

if TYPE_CHECKING:
    from tokenizer.codes import Codes
    from tokenizer.quantizer import MultiScaleQuantizer
    from tokenizer.tokenizer import VideoTokenizer

__all__ = ["Codes", "MultiScaleQuantizer", "ScaleSchedule", "UserError", "VideoTokenizer"]

# configuration and the command line's help must answer without loading torch
_LAZY = {"Codes": "codes", "MultiScaleQuantizer": "quantizer", "VideoTokenizer": "tokenizer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"tokenizer.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'tokenizer' has no attribute '{name}'")
