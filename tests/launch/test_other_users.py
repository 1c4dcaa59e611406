"""What another user of the machine may put in the folder for temporary files, and what the umask may be, does not matter."""

import getpass
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from fuzz import manta
from runs import copy_run

from manta.cluster.protocol import Env, deny_writes_by_others
from manta.cluster.ray import temporary as temporary_folders
from manta.cluster.ray.errors import NoClusterError
from manta.cluster.ray.runtime import JoinedRay
from manta.data.errors import InputError
from manta.data.storage.cache import CachedFile, ShardCache
from manta.trainer.compile_cache import use_own_compile_cache

OTHER = 12345  # a user who need not exist
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
never_waits = pytest.mark.timeout(60)  # a named pipe that is opened waits for ever


@pytest.fixture
def temporary(public_directory, monkeypatch) -> Path:
    """A folder for temporary files, as /tmp is."""
    public_directory.chmod(0o1777)
    monkeypatch.setattr(temporary_folders, "temporary_folders", lambda: [public_directory])
    return public_directory


def as_other(script: str) -> None:
    """Run a shell script as another user."""
    command = ["setpriv", "--reuid", str(OTHER), "--regid", str(OTHER), "--clear-groups", "sh", "-euc", script]
    subprocess.run(command, check=True, timeout=20)


def stale(directory: Path) -> Path:
    """Make what a killed run has left behind."""
    directory.mkdir(mode=0o700)
    (directory / "token").write_text("secret")
    old = time.time() - 3600
    os.utime(directory / "token", (old, old))
    return directory


@never_waits
def test_only_what_killed_runs_left_is_removed(temporary):
    left, host = stale(temporary / "manta-ray-left"), stale(temporary / "manta-host-left")
    os.utime(left / "token")  # a moment ago
    pipe, elsewhere = temporary / "manta-ray-pipe", stale(temporary / "elsewhere")
    pipe.mkdir()
    os.mkfifo(pipe / "token")
    (temporary / "manta-ray-link").symlink_to(elsewhere)
    (temporary / "manta-ray-inner").mkdir()
    (temporary / "manta-ray-inner/token").symlink_to(elsewhere / "token")
    (temporary / "manta-ray-file").touch()
    stale(temporary / "manta-ray-young")
    (temporary / "manta-ray-young/token").write_text("")  # and not locked yet
    temporary_folders.remove_stale_folders()
    assert not left.exists()
    assert not host.exists()
    names = {path.name for path in temporary.iterdir()}
    assert names == {"elsewhere", *(f"manta-ray-{name}" for name in ("pipe", "link", "inner", "file", "young"))}
    assert (elsewhere / "token").exists()


@never_waits
@pytest.mark.root
@needs_root
def test_another_user_s_directory_is_never_opened(temporary):
    as_other(
        f"cd {temporary}; mkdir -m 777 manta-ray-theirs manta-ray-fifo; echo x > manta-ray-theirs/token; mkfifo -m 666 manta-ray-fifo/token"
    )
    old = time.time() - 3600
    for name in ("theirs/token", "fifo/token"):
        os.utime(temporary / f"manta-ray-{name}", (old, old))
    temporary_folders.remove_stale_folders()
    assert (temporary / "manta-ray-theirs/token").exists()


@never_waits
@pytest.mark.root
@needs_root
@pytest.mark.parametrize("make", ["echo 127.0.0.1:1 >", "mkfifo"])
def test_auto_joins_no_cluster_that_another_user_has_named(temporary, monkeypatch, make):
    monkeypatch.setenv("RAY_TMPDIR", str(temporary))
    as_other(f"mkdir {temporary}/ray; {make} {temporary}/ray/ray_current_cluster")
    with pytest.raises(NoClusterError, match="is another user's; name HOST:PORT"), JoinedRay("auto").connected():
        pass


@never_waits
@pytest.mark.root
@needs_root
@pytest.mark.parametrize("make", ["echo 12345 >", "mkfifo -m 666", "ln -s /etc/hostname"])
@pytest.mark.parametrize("name", ["{}", ".{}.tmp"])
def test_a_file_that_another_user_put_into_the_cache_is_never_read(temporary, make, name):
    file = CachedFile(url="s3://bucket/shard.bin", size=6, xxh3="0" * 16)
    as_other(f"{make} {temporary}/{name.format(file.name)}")
    cached = ShardCache(temporary, limit=1000)
    with pytest.raises(InputError, match=r"expected files of this user, got .*Choose another directory"), cached.hold(file):
        pass


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("make", ["mkdir -m 777", "ln -s /", "mkfifo"])
def test_compiled_code_is_loaded_from_no_directory_of_another_user(temporary, monkeypatch, make):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    own = temporary / f"manta-compiled-{os.geteuid()}"
    as_other(f"{make} {own}")
    for expected in (False, True):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        use_own_compile_cache()
        used = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert (used == own) is expected
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        use_own_compile_cache()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(used)  # it is used again
        assert (used.stat().st_uid, used.stat().st_mode & 0o777) == (os.geteuid(), 0o700)
        if not expected:
            as_other(f"rm -r {own}")


@pytest.mark.root
@needs_root
def test_a_rank_starts_whatever_another_user_has_called_as_torch_calls_its_directory(temporary):
    theirs = temporary / f"torchinductor_{getpass.getuser()}"
    as_other(f"touch {theirs}")
    environment = os.environ | {"TMPDIR": str(temporary), Env.STANDBY: "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, "-P", "-m", "manta.trainer", str(temporary)]
    ended = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")  # it imports everything, and ends because it gets no task


def test_commands_that_only_read_execute_no_code_of_a_run(workspace, finished_run, tmp_path):
    run, executed = copy_run(workspace, finished_run, "with code"), tmp_path / "executed"
    code = f"import pathlib\npathlib.Path({str(executed)!r}).touch()\nclass Theirs: pass"
    (tmp_path / "their_code.py").write_text(code)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "code": str(tmp_path)}))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("family: llama", "family: their_code:Theirs"))
    for command in (
        "status",
        "logs",
        "attach",
        "data inspect",
        "data verify",
        "checkpoint list",
        "checkpoint inspect",
        "checkpoint verify",
    ):
        assert manta(*command.split(), str(run), seconds=60).code == 0, command
        assert not executed.exists(), command
    manta("generate", str(run), seconds=60)
    assert executed.exists()  # as docs/security.md says


@pytest.mark.parametrize(("before", "after"), [(0o000, 0o022), (0o002, 0o002), (0o022, 0o022), (0o077, 0o077), (0o020, 0o022)])
def test_a_umask_that_lets_everybody_write_is_not_kept(before, after):
    own = os.umask(before)
    deny_writes_by_others()
    assert os.umask(own) == after


def writable_by_others(directory: Path) -> list[str]:
    modes = [(path, path.lstat().st_mode) for path in (directory, *directory.rglob("*"))]
    return [str(path) for path, mode in modes if mode & 0o022 and not stat.S_ISLNK(mode)]


def test_nothing_that_a_run_writes_is_writable_by_others(workspace, finished_run):
    """The fixtures prepare the corpus and train under umask 000."""
    assert writable_by_others(workspace.directory / finished_run) == []
    assert writable_by_others(workspace.directory / "corpora") == []
