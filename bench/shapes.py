"""Random shapes of users' jobs, as many as one likes, each proved as tests/test_shapes.py does with a few.

    python bench/shapes.py [--runs 20] [--seed 1] [--at-once 2] [--keep DIR]

One line a shape: its settings, seconds, and `ok` or what broke, with the ends of the logs; exit code 1 if
anything did. The same seed gives the same shapes. Some 15 s a shape on 2 cores, three times that where it is
compiled. Where there is no Linux, torchrun starts cold.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from conftest import ENV, write_corpus  # noqa: E402
from shapes import Lab, Shape, compiler, random_shape  # noqa: E402
from warm import Warm  # noqa: E402


def proved(lab: Lab, shape: Shape) -> bool:
    began = time.monotonic()
    try:
        lab.prove(shape)
    except Exception as error:
        said, notes = f"BROKEN {type(error).__name__}: {error}", getattr(error, "__notes__", [])
    else:
        said, notes = "ok", []
    print(f"{shape}  {time.monotonic() - began:.0f} s  {said}", *notes, sep="\n", flush=True)
    return said == "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for what the runs write; it must not exist")
    args = parser.parse_args()
    rng, folder = random.Random(args.seed), args.keep or Path(tempfile.mkdtemp(prefix="shapes-"))
    shapes = [random_shape(rng) for _ in range(args.runs)]
    if not compiler():
        print("no C++ compiler here: shapes with model.compile are left out", flush=True)
        shapes = [shape for shape in shapes if not shape.compile]
    (folder / "corpus").mkdir(parents=True)
    write_corpus(folder / "corpus")
    warm = Warm(ENV) if sys.platform == "linux" else None
    lab = Lab(folder.resolve() / "runs", folder.resolve() / "corpus", warm)
    try:
        with ThreadPoolExecutor(args.at_once) as pool:
            good = sum(pool.map(lambda shape: proved(lab, shape), shapes))
    finally:
        lab.close()
        if warm:
            warm.close()
        if not args.keep:
            shutil.rmtree(folder)
    print(f"{good} of {len(shapes)} shapes hold")
    return int(good < len(shapes))


if __name__ == "__main__":
    os.nice(5)  # the machine may be in use
    sys.exit(main())
