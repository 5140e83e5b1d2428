"""The one place that knows whether the work runs on the CPU or on a CUDA device."""

import contextlib
import gc
from dataclasses import dataclass
from typing import Any

import torch

# Dense bfloat16 peak in FLOP/s by what the card's name holds, from the makers' data sheets; first match counts.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class Device:
    """Where the work runs: `cpu` or `cuda`."""

    type: str

    @classmethod
    def found(cls) -> "Device":
        """CUDA where there is one, else the CPU."""
        return cls("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def cuda(self) -> bool:
        return self.type == "cuda"

    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""
        if self.cuda:
            torch.cuda.synchronize()

    def autocast(self) -> Any:
        """bfloat16 over float32 weights on CUDA, the default there; nothing on the CPU."""
        return torch.autocast("cuda", dtype=torch.bfloat16) if self.cuda else contextlib.nullcontext()

    def release(self) -> None:
        """Gives back what nothing holds any more, so that one case does not crowd the next."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def peak_flops(self) -> float | None:
        """Dense bfloat16 peak of this card in FLOP/s; None where it is not in the table."""
        if not self.cuda:
            return None
        name = torch.cuda.get_device_name()
        return next((peak for part, peak in PEAKS.items() if part in name), None)
