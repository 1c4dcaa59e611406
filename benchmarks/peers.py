"""A Python for what we are compared with: it sees all the packages of this one, and a few more that must not come among them.

It is made on first use, in .venv/NAME, and made anew when it, or this Python, is to have other packages.
"""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from filelock import FileLock

HOME = Path(__file__).resolve().parents[1] / ".venv"
_SHARED = ("torch", "numpy")  # a second copy would take gigabytes, or be another one than ours reads with
_PATIENCE = 600  # seconds for a package index to answer


def environment(name: str, *requirements: str) -> Path:
    """The python of the environment `name`, which has these packages. Raises RuntimeError where they can not be installed."""
    folder = HOME / name
    python, made = folder / "bin" / "python", folder / "made.json"
    shared = [f"{package}=={metadata.version(package)}" for package in _SHARED]
    packages = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    wanted = json.dumps([sys.version, packages, shared, requirements])
    HOME.mkdir(exist_ok=True)
    with FileLock(HOME / f"{name}.lock"):
        if not made.exists() or made.read_text() != wanted:
            print(f"installing {' '.join(requirements)} in {folder}", file=sys.stderr)
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            own = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
            (own / "ours.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in packages))
            constraints = folder / "constraints.txt"
            constraints.write_text("\n".join(shared) + "\n")
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
            _run([*pip, "--only-binary", ":all:", "--constraint", str(constraints), *requirements])
            made.write_text(wanted)
    return python


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout
    except subprocess.CalledProcessError as error:
        told = [line for line in error.stderr.splitlines() if line.startswith("ERROR")] or error.stderr.splitlines() or ["no word"]
        raise RuntimeError(f"{' '.join(command)}: {told[-1]}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)}: no answer in {_PATIENCE} s") from None
