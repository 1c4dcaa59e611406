"""A run's energy: measured by NVML and RAPL, estimated from a stated power, and added up over ranks and attempts."""

import json
import os
import signal
import sys
import time
from itertools import groupby
from types import ModuleType

import pytest
from fuzz import manta
from runs import METRICS, events, lines, resume, wait_for_step

from manta.trainer.config.sections import TrackConfig
from manta.trainer.energy import EnergyMeter, EnergyTotals, NvmlCounter, last_kwh, open_nvml, open_rapl
from manta.trainer.metrics import energy, format_energy, parse_lines, read_all_metrics

WATTS, INTENSITY = 50.0, 400.0
LARGEST = 262_143_328_850  # of Intel's packages, in microjoules


def write_zone(powercap, zone: str, name: str, microjoules: int):
    folder = powercap / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{LARGEST}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_rapl_adds_packages_and_memory_but_nothing_twice(tmp_path):
    zones = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "psys"}
    files = [write_zone(tmp_path, zone, name, 5_000_000) for zone, name in zones.items()]
    counter = open_rapl(tmp_path)
    assert counter is not None
    assert counter.joules() == 0.0
    for file, joules in zip(files, (30, 20, 3, 60), strict=True):
        file.write_text(str(5_000_000 + joules * 1_000_000))
    assert counter.joules() == pytest.approx(33.0)


def test_rapl_wraps_around_at_its_largest_value(tmp_path):
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", LARGEST - 7_000_000)
    counter = open_rapl(tmp_path)
    assert counter is not None
    for microjoules, expected in ((LARGEST - 1_000_000, 6.0), (4_000_000, 11.0), (9_000_000, 16.0)):
        file.write_text(str(microjoules))
        assert counter.joules() == pytest.approx(expected)


def test_a_machine_without_readable_rapl_has_no_counter(tmp_path):
    assert open_rapl(tmp_path / "missing") is None
    write_zone(tmp_path, "intel-rapl:0", "core", 1)
    assert open_rapl(tmp_path) is None
    write_zone(tmp_path, "intel-rapl:1", "package-0", 1).unlink()  # as for a user who may not read it
    assert open_rapl(tmp_path) is None


def test_a_node_counts_its_rapl_energy_once(tmp_path):
    file, totals = write_zone(tmp_path, "intel-rapl:0", "package-0", 0), []
    meters = [EnergyMeter(TrackConfig(watts=WATTS), open_rapl(tmp_path), is_counted=local_rank == 0) for local_rank in range(2)]
    file.write_text("36000000")
    totals = [meter.take() for meter in meters]
    assert totals == [EnergyTotals(measured=36.0), EnergyTotals(measured=0.0)]
    line = meters[0].line(EnergyTotals(*map(sum, zip(*totals, strict=True))))
    assert line == {"energy/kwh": pytest.approx(1e-5), "energy/source": "RAPL"}


class FakeNvml(ModuleType):
    """The part of NVML that is used, of one GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, counts: bool):
        super().__init__("pynvml")
        self.counts, self.millijoules, self.milliwatts = counts, 1_000_000, 200_000
        self.nvmlInit = lambda: None
        self.nvmlDeviceGetHandleByUUID = self.device
        self.nvmlDeviceGetTotalEnergyConsumption = self.total_energy
        self.nvmlDeviceGetPowerUsage = lambda device: self.milliwatts * bool(device)

    def device(self, uuid):
        if uuid != "GPU-1234":
            raise self.NVMLError("Not Found")
        return uuid

    def total_energy(self, device):
        if not self.counts:
            raise self.NVMLError("Not Supported")
        return self.millijoules * bool(device)


def test_nvml_counts_the_energy_of_the_rank_s_gpu(monkeypatch):
    nvml = FakeNvml(counts=True)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = EnergyMeter(TrackConfig(grid_intensity=INTENSITY), open_nvml("1234"))
    nvml.millijoules += 7_200_000
    totals = meter.take()
    assert totals == EnergyTotals(measured=7200.0)
    assert meter.line(totals) == {"energy/kwh": pytest.approx(0.002), "energy/source": "NVML", "energy/co2_kg": pytest.approx(0.0008)}
    assert open_nvml("another") is None


def test_the_power_of_a_gpu_without_a_counter_is_added_up_over_time():
    nvml = FakeNvml(counts=False)
    start = time.monotonic()
    counter = NvmlCounter(nvml, "GPU-1234")
    time.sleep(0.2)
    assert counter.joules() == pytest.approx(200 * (time.monotonic() - start), rel=0.1)


def test_a_counter_that_fails_is_replaced_by_the_estimate(caplog):
    nvml = FakeNvml(counts=True)
    meter = EnergyMeter(TrackConfig(watts=WATTS), NvmlCounter(nvml, "GPU-1234"))
    nvml.counts = False
    time.sleep(0.1)
    assert meter.take().estimated >= 0.1 * WATTS
    assert "energy is no longer measured by NVML: Not Supported" in caplog.text


def test_measured_and_estimated_ranks_are_both_named():
    meter = EnergyMeter(TrackConfig(watts=WATTS), NvmlCounter(FakeNvml(counts=True), "GPU-1234"))
    assert meter.line(EnergyTotals(measured=1.0, estimated=2.6))["energy/source"] == "NVML and estimate"


def test_without_any_source_nothing_is_logged():
    meter = EnergyMeter(TrackConfig(grid_intensity=INTENSITY), None)
    assert meter.take() == EnergyTotals(unknown=1.0)
    assert meter.line(EnergyTotals(measured=5.0, unknown=1.0)) == {}


def test_a_resumed_count_starts_from_the_last_line_with_energy(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert last_kwh(file) == 0.0
    written = [{"step": 1, "energy/kwh": 0.5}, {"step": 2, "energy/kwh": 0.75}, {"step": 3}]
    text = "".join(json.dumps(METRICS | line) + "\n" for line in written)
    file.write_text(text + "damaged\n" + text.splitlines()[0].replace("0.5", "0.9")[:-20])  # the last line is incomplete
    assert last_kwh(file) == 0.75
    file.write_text(text + "".join(json.dumps(METRICS | {"step": step, "pad": "x" * 1000}) + "\n" for step in range(4, 2000)))
    assert last_kwh(file) == 0.75


def test_energy_is_shown_with_its_source():
    line = METRICS | {"step": 1, "energy/kwh": 0.123456, "energy/source": "estimate", "energy/co2_kg": 0.05}
    found = energy([line, METRICS | {"step": 2}])
    assert found == {"energy_kwh": 0.123456, "energy_source": "estimate", "co2_kg": 0.05}
    assert format_energy(found) == {"energy": "0.1235 kWh (estimate)", "CO2": "0.05 kg (estimate)"}
    assert energy([METRICS]) == format_energy({}) == {}


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_counts_the_energy_of_all_attempts(workspace):
    stated = (f"track.watts={WATTS}", f"track.grid_intensity={INTENSITY}")
    shape = ("train.global_batch=64", "train.micro_batch=8", "evaluate.every_steps=1000", "evaluate.samples=1")
    with workspace.start("train", str(workspace.config_file), "run.dir=energy", *stated, *shape) as running:
        wait_for_step(workspace, "energy", 16, running)
        os.kill(next(e for e in events(workspace, "energy") if e["event"] == "attempt-started")["ranks"][1]["pid"], signal.SIGKILL)
        assert running.communicate(timeout=90)[1] == ""
        assert running.returncode == 0
    resume(workspace, "energy", "train.steps=60")
    written = parse_lines((workspace.directory / "energy/metrics.jsonl").read_text())
    attempts = [list(group) for _, group in groupby(written, key=lambda line: line["attempt"])]
    assert len(attempts) == 3
    assert len(written) > 60, "no step was recomputed"
    assert [line["energy/kwh"] for line in written] == sorted(line["energy/kwh"] for line in written)
    seconds = sum(of_attempt[-1]["time"] - of_attempt[0]["time"] + of_attempt[0]["step_time"] for of_attempt in attempts)
    kwh = lines(workspace, "energy")[-1]["energy/kwh"]
    assert kwh == pytest.approx(WATTS * 2 * seconds / 3.6e6, rel=0.05)
    assert {line["energy/source"] for line in written} == {"estimate"}
    reported = json.loads(workspace.manta("goodput", "energy", "--json").stdout)
    assert (reported["energy_kwh"], reported["co2_kg"]) == (kwh, pytest.approx(kwh * INTENSITY / 1000))
    shown = manta("goodput", str(workspace.directory / "energy")).stdout
    assert f"energy {kwh:.4g} kWh (estimate)" in shown
    assert "kWh (estimate)" in (workspace.directory / "energy/report.html").read_text()


def test_a_run_without_a_source_logs_no_energy(workspace, finished_run):
    if open_rapl() is None:
        assert not [
            key for line in read_all_metrics(workspace.directory / finished_run / "metrics.jsonl") for key in line if "energy" in key
        ]
