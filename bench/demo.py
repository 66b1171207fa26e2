"""The demo's numbers, each against its bound: time, memory, loss, emissions, goodput, stall, and every time the same.

    python bench/demo.py [--once] [--json] [key=value ...]        (or: make bench-demo)
    ONEDNN_MAX_CPU_ISA=AVX512_CORE make bench-demo                as a processor without bfloat16 runs it

Runs configs/demo.yaml by launch.py (three times, unless --once), samples the memory of all its processes (PSS) every
five seconds, and reads everything else from the run's own files. Timing depends on the machine: the bounds are for 2 cores,
with bfloat16 in hardware and without.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import config  # noqa: E402
import devices  # noqa: E402


def tree_pss(root: psutil.Process) -> int:
    """Bytes of memory of a process and all below it, shared pages counted once."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def run(name: str, extra: list[str]) -> dict:
    started, peak = time.monotonic(), 0
    command = [sys.executable, "launch.py", "configs/demo.yaml", f"run={name}", "fresh=true", *extra]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    root = psutil.Process(process.pid)
    while process.returncode is None:
        try:
            process.wait(5.0)  # adding up the pages of all processes takes a tenth of a second
        except subprocess.TimeoutExpired:
            peak = max(peak, tree_pss(root))
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"bench/demo.py: the demo ended with exit code {process.returncode}")
    folder = REPO / "runs" / name
    summary = json.loads((folder / "summary.json").read_text())
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    losses = {s: [json.loads(x)["loss"] for x in (folder / f"{s}.jsonl").read_text().splitlines()] for s in summary["sites"]}
    return {"seconds": seconds, "peak_pss_gib": peak / 2**30, "summary": summary, "journal": journal, "losses": losses}


def without_wall(value):
    if isinstance(value, dict):
        return {k: without_wall(v) for k, v in value.items() if k != "wall"}
    return [without_wall(v) for v in value] if isinstance(value, list) else value


def main(argv: list[str]) -> int:
    once, as_json = "--once" in argv, "--json" in argv
    extra = [a for a in argv if not a.startswith("--")]
    runs = [run(f"bench-demo-{i}", extra) for i in range(1 if once else 3)]
    first, s = runs[0], runs[0]["summary"]
    shares = {r: s["emissions_kg"] / kg for r, kg in s["baselines"].items()}
    falls = {site: float(np.mean(x[:20]) - np.mean(x[-20:])) for site, x in first["losses"].items()}
    stall = s["wall"]["sync_stall_s"]
    seconds = sorted(r["seconds"] for r in runs)
    bound_s = 150 if devices.multiplies_bfloat16(torch.device("cpu")) else 210
    rows = [
        ("demo, seconds, median", float(np.median(seconds)), f"<= {bound_s}", lambda v: v <= bound_s),
        ("peak memory of all processes (PSS), GiB", max(r["peak_pss_gib"] for r in runs), "< 4", lambda v: v < 4),
        ("val_bpb", s["val_bpb"], "<= 2.1", lambda v: v <= 2.1),
        ("least fall of a site's loss, first 20 to last 20 logged", min(falls.values()), "> 0", lambda v: v > 0),
        ("least share of a baseline's emissions", min(shares.values()), ">= 0.03", lambda v: v >= 0.03),
        ("largest share of a baseline's emissions", max(shares.values()), "<= 0.14", lambda v: v <= 0.14),
        ("goodput", s["goodput"], ">= 0.85", lambda v: v >= 0.85),
        ("sync stall p50, s", stall["p50"], "< 0.25", lambda v: v < 0.25),
        ("sync stall p95, s", stall["p95"], "< 0.6", lambda v: v < 0.6),
    ]
    if not once:
        same = all(without_wall(first[k]) == without_wall(r[k]) for r in runs[1:] for k in ("journal", "summary"))
        rows.append(("every time the same journal and summary, but for wall", same, "True", bool))
    if as_json:
        print(json.dumps({name: {"value": value, "bound": bound, "ok": bool(ok(value))} for name, value, bound, ok in rows}))
    else:
        for name, value, bound, ok in rows:
            text = str(value) if isinstance(value, bool) else f"{value:.3f}"
            print(f"{'ok  ' if ok(value) else 'MISS'} {name:58} {text:>9}   bound {bound}")
        print(f"     seconds of each run: {', '.join(f'{x:.1f}' for x in seconds)}; {s['val_loss']:.4f} nats/token")
    return 0 if all(ok(value) for _, value, _, ok in rows) else 1


if __name__ == "__main__":
    config.command(main)
