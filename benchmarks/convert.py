#!/usr/bin/env python3
"""Conversion rate and memory: convert.py on a random GPT-2 of a given shape, beside `cp` of the same bytes.

    python benchmarks/convert.py --shape 1.3B --tp 2 --data-types fp32 fp16 bf16 --folder /scratch

Each run is a process of its own and includes forcing the files to the disk, for cp too (`sync` of its one file).
The source is in the page cache, as after a download. The last column is the share of cp's rate on bytes read
plus bytes written, the fair ceiling where the data type changes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHAPES, report

ROOT = Path(__file__).resolve().parent.parent
MEASURE = """
import json, re, sys, time
from pathlib import Path
from convert import convert
start = time.perf_counter()
folder = convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
size = sum(path.stat().st_size for path in folder.glob("*.bin"))
print(json.dumps({"seconds": seconds, "peak_mib": peak, "bytes": size}))
"""


def main() -> None:
    flags = parse_flags()
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=flags.folder))
    try:
        size = make_source(folder / "source", flags.shape)
        runs = [run for _ in range(flags.repeats) for run in measure_all(folder, flags, size)]
    finally:
        shutil.rmtree(folder)
    best = {run["name"]: run for run in sorted(runs, key=lambda run: -run["seconds"])}
    names = ["cp", *flags.data_types]
    ceiling = 2 * size / best["cp"]["seconds"]
    print(f"GPT-2 {flags.shape}, {size / 1e9:.2f} GB in fp32, tp {flags.tp}; best of {flags.repeats}")
    print(f"{'':6}{'seconds':>9}{'MB/s read':>11}{'MB/s written':>14}{'peak MiB':>10}{'of cp':>8}")
    for name in names:
        run = best[name]
        run["share_of_cp"] = round((size + run["bytes"]) / run["seconds"] / ceiling, 3)
        rates = [size / 1e6 / run["seconds"], run["bytes"] / 1e6 / run["seconds"]]
        peak = f"{run['peak_mib']:10.0f}" if "peak_mib" in run else " " * 10
        print(f"{name:6}{run['seconds']:9.2f}{rates[0]:11.0f}{rates[1]:14.0f}{peak}{run['share_of_cp']:8.0%}")
    report(torch.device("cpu"), benchmark="convert", shape=flags.shape, tp=flags.tp, runs=[best[n] for n in names])


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="350M")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--data-types", nargs="+", default=["fp32", "fp16", "bf16"])
    parser.add_argument("--folder", type=Path, help="where source and results go (default: the system's temporary one)")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def make_source(folder: Path, shape: str) -> int:
    """Write a GPT-2 in fp32 whose values repeat every 16 MB, without holding it in memory; returns its bytes."""
    heads, head_size, layers, vocab = SHAPES[shape]
    h = heads * head_size
    folder.mkdir()
    config = dict(model_type="gpt2", n_embd=h, n_head=heads, n_layer=layers, n_positions=1024, vocab_size=vocab)
    (folder / "config.json").write_text(json.dumps(config | dict(bos_token_id=vocab - 1, eos_token_id=vocab - 1)))
    shapes = {"wte.weight": [vocab, h], "wpe.weight": [1024, h], "ln_f.weight": [h], "ln_f.bias": [h]}
    for layer in range(layers):
        for name, sizes in (
            ("ln_1", [h]),
            ("attn.c_attn", [h, 3 * h]),
            ("attn.c_proj", [h, h]),
            ("ln_2", [h]),
            ("mlp.c_fc", [h, 4 * h]),
            ("mlp.c_proj", [4 * h, h]),
        ):
            shapes[f"h.{layer}.{name}.weight"] = sizes
            shapes[f"h.{layer}.{name}.bias"] = sizes[-1:]
    header, end = {}, 0
    for name, sizes in shapes.items():
        size = 4 * torch.Size(sizes).numel()
        header[name] = {"dtype": "F32", "shape": sizes, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    block = memoryview(torch.empty(4 << 20).normal_(std=0.02).numpy()).cast("B")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    return end


def measure_all(folder: Path, flags: argparse.Namespace, size: int) -> list[dict]:
    """One run of cp and of each data type; every result is deleted at once."""
    source, output = folder / "source", folder / "out"
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", source / "model.safetensors", folder / "copy"], check=True)
    subprocess.run(["sync", folder / "copy"], check=True)
    runs = [{"name": "cp", "seconds": time.perf_counter() - start, "bytes": size}]
    (folder / "copy").unlink()
    for data_type in flags.data_types:
        os.sync()
        command = [sys.executable, "-c", MEASURE, source, output, str(flags.tp), data_type]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        runs.append({"name": data_type, **json.loads(done.stdout)})
        shutil.rmtree(output)
    return runs


if __name__ == "__main__":
    main()
