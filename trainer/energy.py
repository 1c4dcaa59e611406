"""The energy that a run uses, in joules by rank: measured where the machine can, else estimated from a stated power.

- A GPU's is NVML's counter of the whole device (`nvmlDeviceGetTotalEnergyConsumption`; on GPUs before Volta its power, once a step).
- A CPU's is RAPL's counters of packages and memory, which are of everything on the machine: a node's first rank counts it for all.
- Else it is `track.watts` times the time.
"""

import importlib
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from manta.cluster.protocol import LONGEST_LINE, open_regular
from manta.trainer.config.sections import TrackConfig
from manta.trainer.dist.world import World
from manta.trainer.metrics import Line, parse_line, read_all_metrics

log = logging.getLogger(__name__)
POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6


class EnergyTotals(NamedTuple):
    """Joules of all ranks in a step, and how many ranks can neither measure nor estimate theirs."""

    measured: float = 0.0
    estimated: float = 0.0
    unknown: float = 0.0


class Counter(Protocol):
    """Counts joules from any start. Reading may raise OSError, or NVML's error."""

    name: str

    def joules(self) -> float: ...


class EnergyMeter:
    """What this rank has used since the last reading. Rank 0 adds up what all have, over all attempts of the run."""

    def __init__(self, config: TrackConfig, counter: Counter | None, *, metrics: Path | None = None, is_counted: bool = True) -> None:
        """counter: measures; None: it is estimated. metrics: the file that earlier attempts have logged to, on rank 0.

        is_counted: whether this rank is the one of its node that counts what the counter measures.
        """
        self._config, self._counter, self._is_counted = config, counter, is_counted
        self._kwh = last_kwh(metrics) if metrics else 0.0
        self._joules, self._time = self._read(), time.monotonic()

    @classmethod
    def open(cls, config: TrackConfig, world: World, metrics: Path | None) -> "EnergyMeter":
        """Return this rank's meter, with the counter of its device if it can be read."""
        if world.device.type == "cuda":
            return cls(config, open_nvml(str(torch.cuda.get_device_properties(world.device).uuid)), metrics=metrics)
        return cls(config, open_rapl(), metrics=metrics, is_counted=world.local_rank == 0)

    def take(self) -> EnergyTotals:
        """Return the joules since the last call, to be summed over ranks."""
        now, joules = time.monotonic(), self._read()
        seconds, before = now - self._time, self._joules
        self._time, self._joules = now, joules
        if joules is not None and before is not None:
            return EnergyTotals(measured=joules - before if self._is_counted else 0.0)
        if self._config.watts is not None:
            return EnergyTotals(estimated=self._config.watts * seconds)
        return EnergyTotals(unknown=1.0)

    def line(self, totals: EnergyTotals) -> Line:
        """Return the keys of metrics.jsonl from the sums over all ranks; none if a rank's energy is unknown, which the sum would lack."""
        if totals.unknown:
            return {}
        self._kwh += (totals.measured + totals.estimated) / JOULES_PER_KWH
        names = [self._counter.name if self._counter else "measured"] if totals.measured or not totals.estimated else []
        source = " and ".join([*names, *(["estimate"] if totals.estimated else [])])
        line: Line = {"energy/kwh": self._kwh, "energy/source": source}
        if self._config.grid_intensity is not None:
            line["energy/co2_kg"] = self._kwh * self._config.grid_intensity / 1000
        return line

    def _read(self) -> float | None:
        if self._counter is None:
            return None
        try:
            return self._counter.joules()
        except Exception as error:  # noqa: BLE001  of a driver: training continues without it
            log.warning("energy is no longer measured by %s: %s", self._counter.name, error)
            self._counter = None
            return None


class NvmlCounter:
    name = "NVML"

    def __init__(self, nvml: Any, handle: Any) -> None:
        """nvml: the module pynvml. Raises its NVMLError if the device has neither counter."""
        self._nvml, self._handle = nvml, handle
        self._power_joules: float | None = None  # the power over time, of devices without a counter
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError:
            self._power_joules, self._time, self._watts = 0.0, time.monotonic(), self._power()

    def joules(self) -> float:
        if self._power_joules is None:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        now, watts = time.monotonic(), self._power()
        self._power_joules += (watts + self._watts) / 2 * (now - self._time)
        self._time, self._watts = now, watts
        return self._power_joules

    def _power(self) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3


def open_nvml(uuid: str) -> NvmlCounter | None:
    """Return the counter of a GPU. None without the package nvidia-ml-py, or if the driver has none."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        log.info("energy of the GPU is not measured: pip install 'manta[energy]'")
        return None
    try:
        nvml.nvmlInit()
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        return NvmlCounter(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
    except nvml.NVMLError as error:
        log.warning("energy of the GPU is not measured: %s", error)
        return None


class RaplCounter:
    name = "RAPL"

    def __init__(self, zones: Sequence[Path]) -> None:
        """zones: directories with the files `energy_uj` and `max_energy_range_uj`. Raises OSError and ValueError."""
        self._zones = [(zone / "energy_uj", _number(zone / "max_energy_range_uj")) for zone in zones]
        self._last = [_number(file) for file, _ in self._zones]
        self._total = 0

    def joules(self) -> float:
        for index, (file, largest) in enumerate(self._zones):
            now = _number(file)
            self._total += now - self._last[index] + (largest if now < self._last[index] else 0)  # it has wrapped around
            self._last[index] = now
        return self._total / 1e6


def open_rapl(powercap: Path = POWERCAP) -> RaplCounter | None:
    """Return the counter of this machine's packages and memory. None if there is none that this process may read."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _is_counted(zone)]
    try:
        return RaplCounter(zones) if zones else None
    except (OSError, ValueError) as error:
        log.info("energy of the CPU is not measured: %s", error)
        return None


def _is_counted(zone: Path) -> bool:
    """Whether this zone's energy is in no other one: cores are a part of their package, and psys has all packages."""
    try:
        name = (zone / "name").read_text(encoding="utf-8").strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _number(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))


def last_kwh(metrics: Path) -> float:
    """Return what the last line with `energy/kwh` has, 0 without one. Recomputed steps count twice: so did their energy."""
    try:
        with open_regular(metrics) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_LINE))
            end = file.read()
    except FileNotFoundError:
        return 0.0
    for text in reversed(end.split(b"\n")):  # the first one may be a part of a line, as may the last one
        with suppress(ValueError):
            if (value := parse_line(text).get("energy/kwh")) is not None:
                return float(value)
    values = (line["energy/kwh"] for line in reversed(read_all_metrics(metrics)) if "energy/kwh" in line)
    return float(next(values, 0.0))
