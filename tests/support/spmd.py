"""Distributed tests as plain functions: `spmd(function, ranks, *args)` runs one on gloo ranks and returns every rank's result.

The ranks are forked from a process that has imported torch and deepspeed, so that a test costs tenths of a second.
"""

import multiprocessing
import os
import shutil
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["manta.trainer.rank"])


def spmd(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run function(*args) on `ranks` gloo ranks. Raises AssertionError with the traceback of the first rank that fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workdir = tempfile.mkdtemp(prefix="spmd-")
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # several ranks share the machine
        forkserver.ensure_running()
    pipes = [_forks.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        _forks.Process(target=_rank, args=(r, ranks, port, workdir, pipes[r][1], function, args), daemon=True) for r in range(ranks)
    ]
    for process, (_, writing) in zip(processes, pipes, strict=True):
        process.start()
        writing.close()
    try:
        results = [_result(reading, process, timeout) for (reading, _), process in zip(pipes, processes, strict=True)]
    finally:
        for process, (reading, _) in zip(processes, pipes, strict=True):
            process.kill()
            process.join()
            process.close()
            reading.close()
        shutil.rmtree(workdir, ignore_errors=True)
    for rank, (error, _) in enumerate(results):
        if error is not None:
            raise AssertionError(f"rank {rank} of {ranks}:\n{error}")
    return [value for _, value in results]


def _result(reading: Connection, process: Any, timeout: float) -> tuple[str | None, Any]:
    if not reading.poll(timeout):
        return f"no result within {timeout} s", None
    try:
        return reading.recv()
    except EOFError:
        process.join()
        return f"died with exit code {process.exitcode}", None


def _rank(rank: int, ranks: int, port: int, workdir: str, writing: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    os.chdir(Path(workdir))
    import torch

    torch.set_num_threads(1)
    from manta.trainer.dist.world import World

    try:
        World.from_environment().join()
        writing.send((None, function(*args)))
    except BaseException:
        writing.send((traceback.format_exc(), None))
        raise
    finally:
        writing.close()
        os._exit(0)
