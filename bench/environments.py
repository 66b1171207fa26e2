"""Environments of their own for what we compare ourselves with, beside .venv, made on first use.

    python bench/environments.py                  what can be made
    python bench/environments.py transformers     make .venv-transformers; prints its bin folder
    python bench/environments.py all              make all of them

Each holds one pinned package and, with our own pins, what that needs to run our files beside it.
"""

import fcntl
import subprocess
import sys
import venv
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PACKAGES = {
    "flower": ("flwr==1.25.0", ("torch", "numpy", "nvidia-ml-py", "omegaconf", "safetensors", "blake3", "tokenizers", "pyarrow")),
    "transformers": ("transformers==5.24.0", ("torch", "numpy", "omegaconf", "safetensors", "tokenizers", "pyarrow")),
    "vessim": ("vessim[live]==0.16.0", ()),
}  # name -> (what for, which of our requirements beside it)


def folder(name: str) -> Path:
    return REPO / f".venv-{name}"


def make(name: str) -> Path:
    """The bin folder of .venv-NAME, made if it is not there; one process makes it, the others wait."""
    package, ours = PACKAGES[name]
    bin_ = folder(name) / "bin"
    with open(REPO / f".venv-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready, what = folder(name) / ".ready", " ".join((package, *ours))
        if not ready.exists() or ready.read_text() != what:
            pins = [line for line in (REPO / "requirements.txt").read_text().split() if line.split("==")[0] in ours]
            venv.create(folder(name), with_pip=True, clear=True)  # or what an interrupted attempt left
            subprocess.run([bin_ / "python", "-m", "pip", "install", "--quiet", package, *pins], check=True, stdout=sys.stderr)
            ready.write_text(what)
    return bin_


if __name__ == "__main__":
    if sys.argv[1:] == ["all"] or (sys.argv[1:] and sys.argv[1] in PACKAGES):
        for name in PACKAGES if sys.argv[1] == "all" else sys.argv[1:2]:
            print(make(name), flush=True)
    else:
        print(f"say one of: all, {', '.join(PACKAGES)}", file=sys.stderr)
        sys.exit(2)
