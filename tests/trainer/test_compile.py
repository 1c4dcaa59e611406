"""Blocks that torch.compile has written code for train as they would without; they are compiled once, not once a layer or a step."""

import shutil
from collections import Counter

import pytest
import torch
from parity import BOUNDS, Cell, Trace, plain, under
from spmd import spmd

from manta.data.errors import InputError
from manta.trainer.config.training import ParallelConfig
from manta.trainer.hardware.compiler import ask_for_compiler

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__, reason="no C++ compiler on this machine, or torch lies in a path with a space"
)
GRAPHS = {
    Cell("llama", 2): 1,
    Cell("llama", 2, parallel=ParallelConfig(zero=2, offload=True)): 1,
    Cell("bert", 2, parallel=ParallelConfig(zero=2)): 1,
    Cell("gpt2", 2, parallel=ParallelConfig(zero=0)): 1,
    Cell("llama", 2, parallel=ParallelConfig(sequence=2)): 1,
    Cell("gpt2", 2, "fp8"): 1,
    Cell("gpt2", 2, "fp8", ParallelConfig(zero=2), recompute="selective"): 1,
    Cell("llama", 1, "fp8", recompute="full"): 1,
    Cell("gpt2", 1, recompute="selective"): 1,
    Cell("bert", 1, "bf16-autocast"): 1,
    Cell("moe", 2, parallel=ParallelConfig(expert=2)): 2,  # before the mixture, and after
    Cell("gpt2-moe", 1, recompute="full"): 2,
}


def compiled(cell: Cell) -> tuple[Trace, Counter[str]]:
    trace = under(cell, "adamw", compiled=True)
    from torch._dynamo.utils import counters

    return trace, counters["stats"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("cell", "graphs"), GRAPHS.items(), ids=str)
def test_compiled_blocks_are_the_same_mathematics_and_one_graph_for_all_layers_and_steps(cell, graphs):
    assert cell.refusal is None
    reference = spmd(plain, 1, cell.model, cell.precision, "adamw")[0]
    for trace, counted in spmd(compiled, cell.ranks, cell, timeout=240.0):
        assert trace.differs(reference).within(BOUNDS[cell.precision])
        assert counted["unique_graphs"] == graphs


@needs_compiler
def test_a_machine_with_a_compiler_is_not_refused():
    ask_for_compiler("cpu")


@pytest.mark.parametrize(("device", "looked_for"), [("cpu", "g++"), ("cuda", "gcc or clang")])
def test_without_a_compiler_it_says_so_in_a_line(device, looked_for, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=f"no {looked_for.replace('+', '.')} on PATH; install") as refused:
        ask_for_compiler(device)
    assert "\n" not in str(refused.value)


def test_a_compiler_that_is_named_must_be_there(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(InputError, match="there is no no-such-compiler on PATH"):
        ask_for_compiler("cpu")


def test_without_pythons_headers_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/there")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match=r"there is no .*Python\.h"):
        ask_for_compiler("cuda")
