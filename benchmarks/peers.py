"""Virtual environments for competitors: all packages of this Python, and a few more that must not be installed here.

An environment is made in .venv/NAME on first use, and again when its packages or this Python's change.
"""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from filelock import FileLock

HOME = Path(__file__).resolve().parents[1] / ".venv"
_SHARED = ("torch", "numpy")  # a second copy would take gigabytes, or be another version
_TIMEOUT = 600  # seconds for the package index


def environment(name: str, *requirements: str) -> Path:
    """Return the python of an environment with these packages. Raises RuntimeError if they cannot be installed."""
    folder = HOME / name
    python, made = folder / "bin" / "python", folder / "made.json"
    shared = [f"{package}=={metadata.version(package)}" for package in _SHARED]
    packages = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    contents = json.dumps([sys.version, packages, shared, requirements])
    HOME.mkdir(exist_ok=True)
    with FileLock(HOME / f"{name}.lock"):
        if not made.exists() or made.read_text() != contents:
            print(f"installing {' '.join(requirements)} in {folder}", file=sys.stderr)
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            own = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
            (own / "ours.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in packages))
            constraints = folder / "constraints.txt"
            constraints.write_text("\n".join(shared) + "\n")
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
            _run([*pip, "--only-binary", ":all:", "--constraint", str(constraints), *requirements])
            made.write_text(contents)
    return python


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True).stdout
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        problem = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise RuntimeError(f"{' '.join(command)}: {problem[-1]}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)}: no answer in {_TIMEOUT} s") from None
