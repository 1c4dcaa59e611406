"""Compiled blocks train like eager ones, and are compiled once, not per layer or step."""

import shutil
from collections import Counter

import pytest
import torch
from parity import BOUNDS, Cell, Trace, run_cell, run_plain
from spmd import spmd

from manta.data.errors import InputError
from manta.trainer.config.sections import ParallelConfig
from manta.trainer.hardware import require_compiler

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__, reason="no C++ compiler on this machine, or torch is in a path with a space"
)
GRAPHS = {
    Cell("llama", 2): 1,
    Cell("llama", 2, parallel=ParallelConfig(zero=2, offload=True)): 1,
    Cell("bert", 2, parallel=ParallelConfig(zero=2)): 1,
    Cell("gpt2", 2, parallel=ParallelConfig(zero=0)): 1,
    Cell("llama", 2, parallel=ParallelConfig(sequence=2)): 1,
    Cell("gpt2", 2, "fp8"): 1,
    Cell("gpt2", 2, "fp8", ParallelConfig(zero=2), checkpointing="selective"): 1,
    Cell("llama", 1, "fp8", checkpointing="full"): 1,
    Cell("gpt2", 1, checkpointing="selective"): 1,
    Cell("bert", 1, "bf16-autocast"): 1,
    Cell("moe", 2, parallel=ParallelConfig(expert=2)): 2,  # before and after the mixture
    Cell("gpt2-moe", 1, checkpointing="full"): 2,
}


def compiled(cell: Cell) -> tuple[Trace, Counter[str]]:
    trace = run_cell(cell, "adamw", compiled=True)
    from torch._dynamo.utils import counters

    return trace, counters["stats"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("cell", "graphs"), GRAPHS.items(), ids=str)
def test_compiled_blocks_keep_parity_and_share_one_graph(cell, graphs):
    assert cell.refusal is None
    reference = spmd(run_plain, 1, cell.model, cell.precision, "adamw")[0]
    for trace, counters in spmd(compiled, cell.ranks, cell, timeout=240.0):
        assert trace.difference(reference).within(BOUNDS[cell.precision])
        assert counters["unique_graphs"] == graphs


@needs_compiler
def test_a_machine_with_a_compiler_is_accepted():
    require_compiler("cpu")


@pytest.mark.parametrize(("device", "compilers"), [("cpu", "g++"), ("cuda", "gcc or clang")])
def test_a_missing_compiler_is_refused_in_one_line(device, compilers, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=f"on PATH, got no {compilers.replace('+', '.')}. Install") as refused:
        require_compiler(device)
    assert "\n" not in str(refused.value)


def test_a_compiler_named_by_cxx_must_exist(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(InputError, match="expected a compiler on PATH, got no no-such-compiler"):
        require_compiler("cpu")


def test_missing_python_headers_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/there")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match=r"expected Python's headers, got no .*Python\.h"):
        require_compiler("cuda")
