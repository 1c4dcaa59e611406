"""What the device could do at best, in floating point operations a second: what MFU is measured against."""

import time

import torch

# Dense bf16 without sparsity, from NVIDIA's data sheets.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """A GPU's bf16 figure by its name, None where we do not know it or the dtype is another.

    A CPU's as a matrix product finds it, in `dtype` or fp32, whichever is faster: without AMX bf16 is the slower one.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in PEAKS.items() if key in name), None) if dtype is torch.bfloat16 else None
    side = 512
    seconds = min(_seconds(torch.ones(side, side, dtype=kind)) for _ in range(12) for kind in {dtype, torch.float32})
    return 2 * side**3 / seconds


def _seconds(square: torch.Tensor) -> float:
    """Of a product short enough to fall between what else the machine does."""
    start = time.perf_counter()
    torch.mm(square, square)
    return time.perf_counter() - start
