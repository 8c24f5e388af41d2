"""The devices that commands run on."""

from __future__ import annotations

from tokenizer.errors import UserError


def check_device(name: str) -> None:
    """Raises UserError unless `name` is "cpu", or "cuda" (with or without a number) on a machine that has such a device."""
    kind, _, number = name.partition(":")
    if kind == "cpu" and not number:
        return
    if kind != "cuda" or (number and not number.isdigit()):
        raise UserError(f"there is no device '{name}': choose cpu or cuda.")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise UserError(
            f"the device '{name}' was asked for and this machine has {count} NVIDIA GPUs: choose cpu, or check the driver."
        )
