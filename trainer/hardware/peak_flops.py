"""The device's peak floating-point operations per second, the reference for MFU."""

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
    """Return a GPU's bf16 peak by its name; None if it is not listed, or for another dtype.

    A CPU's peak is measured by matrix products in `dtype` and in fp32, and the faster counts: without AMX bf16 is slower than fp32.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in PEAKS.items() if key in name), None) if dtype is torch.bfloat16 else None
    side = 512
    seconds = min(_product_seconds(torch.ones(side, side, dtype=kind)) for _ in range(12) for kind in {dtype, torch.float32})
    return 2 * side**3 / seconds


def _product_seconds(square: torch.Tensor) -> float:
    """Time one product, short enough to fall between interruptions by other processes."""
    start = time.perf_counter()
    torch.mm(square, square)
    return time.perf_counter() - start
