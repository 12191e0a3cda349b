"""File to file: ``graft fuse`` against ``cp -r`` of the base and against PEFT's merge_and_unload.

    python benchmarks/models.py /tmp/m3b --size 3b
    python benchmarks/fuse_files.py /tmp/m3b [--runs 5] [--peft 2]

Each way is a process of its own, run in turn, with the base in the page cache and dirty pages written out
before each run. ``import torch`` is measured as a way of its own, and taken off where the table says so.
Anonymous memory is the largest RssAnon + RssShmem (no file behind it) seen in /proc, every 2 ms.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import machine, median_ratio

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def run(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Wall seconds and peak anonymous MB of one process."""
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    peak = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            held = [int(n.split()[1]) for n in lines if n.startswith(("RssAnon", "RssShmem"))]
            peak = max(peak, sum(held))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.002)
    error = process.communicate()[1].decode()
    if process.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{error[-2000:]}")
    return time.perf_counter() - begin, peak / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peft", type=int, default=2, help="how many of the runs include PEFT")
    parser.add_argument("--options", default="", help="more options for graft fuse")
    args = parser.parse_args()
    base, adapter = str(args.folder / "base"), str(args.folder / "adapter")
    outs = {name: args.folder / f"out-{name}" for name in ("cp", "graft", "peft")}
    python = sys.executable
    ways = {
        "import torch": [python, "-c", "import torch"],
        "cp": ["cp", "-r", base, str(outs["cp"])],
        "cp, sync": ["sh", "-c", 'cp -r "$0" "$1" && sync', base, str(outs["cp"])],
        "graft": [python, "-m", "graft", "fuse", base, adapter, "-o", str(outs["graft"]),
                  *args.options.split()],
        "peft": [python, "-c", PEFT, base, adapter, str(outs["peft"])],
    }  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(-1, args.runs):
        for name, command in ways.items():
            if name == "peft" and n >= args.peft:
                continue
            for out in outs.values():
                shutil.rmtree(out, ignore_errors=True)
            t, m = run(command, env)
            if n >= 0:
                seconds[name].append(t)
                memory[name].append(m)
    report(args.folder, seconds, memory)


def report(folder: Path, seconds: dict[str, list[float]], memory: dict[str, list[float]]) -> None:
    size = sum(f.stat().st_size for f in (folder / "base").iterdir()) / 1e9
    print(f"{machine()}; base {size:.2f} GB")
    start, floor = statistics.median(seconds["import torch"]), statistics.median(memory["import torch"])
    print("| way | wall s, median (min – max) | less import torch | anonymous MB above import torch |")
    print("|---|---|---|---|")
    for name, t in seconds.items():
        if not t:
            continue
        less = f"{statistics.median(t) - start:.2f}" if name in ("graft", "peft") else ""
        above = f"{statistics.median(memory[name]) - floor:.0f}" if name in ("graft", "peft") else ""
        print(f"| {name} | {statistics.median(t):.2f} ({min(t):.2f} – {max(t):.2f}) | {less} | {above} |")
    less = [g - i for g, i in zip(seconds["graft"], seconds["import torch"], strict=True)]
    print(f"graft less import torch, over cp: {median_ratio(less, seconds['cp']):.2f}")
    print(f"graft less import torch, over cp and sync: {median_ratio(less, seconds['cp, sync']):.2f}")
    if seconds["peft"]:
        n = len(seconds["peft"])
        print(f"peft over graft, wall: {median_ratio(seconds['peft'], seconds['graft'][:n]):.1f}")
        both = [p - i for p, i in zip(seconds["peft"], seconds["import torch"], strict=False)]
        print(f"peft over graft, both less import torch: {median_ratio(both, less[:n]):.1f}")
        lean = (statistics.median(memory["peft"]) - floor) / (statistics.median(memory["graft"]) - floor)
        print(f"peft over graft, anonymous memory above import: {lean:.0f}")


if __name__ == "__main__":
    main()
