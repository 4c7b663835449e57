#!/usr/bin/env python3
"""Conversion rate and memory: convert.py on a random checkpoint of a given shape, beside `cp` of the same files.

    python benchmarks/convert.py --architecture opt --shape 6.7B --source-data-type bf16 --tps 1 8 --folder /scratch

GPT-2's matrices are stored as FasterTransformer wants them; OPT's, as those of most other sources, are transposed.
Each run is a process of its own and includes forcing the files to the disk, for cp too. Before each the source is
read once, so that it is in the page cache as far as that is large enough. The last columns: the share of cp's rate
on bytes read plus bytes written, the fair ceiling where the data type changes; the most resident memory, and the
bound on it: two of the largest tensor and 1 GiB.
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
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHAPES, BenchmarkFlags, report
from engine.flags import add_flags
from weights.model_config import DATA_TYPES
from weights.reader import TORCH_DTYPES

ROOT = Path(__file__).resolve().parent.parent
POSITIONS = 1024
SHARD_BYTES = 5 << 30  # as the Hub's checkpoints have them
BLOCK = 8 << 20  # random values, repeated
MEASURE = """
import json, re, sys, time
from pathlib import Path
from convert import convert
start = time.perf_counter()
folder = convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
size = sum(path.stat().st_size for path in folder.glob("*.bin"))
print(json.dumps({"seconds": round(seconds, 2), "peak_mib": round(peak), "bytes": size}))
"""


def main() -> None:
    flags = parse_flags()
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=flags.folder or None))
    try:
        largest = make_source(folder / "source", flags.architecture, flags.shape, flags.source_data_type)
        size = sum(path.stat().st_size for path in (folder / "source").iterdir())
        runs = [run for _ in range(flags.repeats) for run in measure_all(folder, flags)]
    finally:
        shutil.rmtree(folder)
    best = {run["name"]: run for run in sorted(runs, key=lambda run: -run["seconds"])}
    ceiling = 2 * size / best["cp"]["seconds"]
    bound = (2 * largest >> 20) + 1024
    print(
        f"{flags.architecture} {flags.shape}, {size / 1e9:.2f} GB in {flags.source_data_type}; best of {flags.repeats}"
    )
    print(f"{'':12}{'seconds':>9}{'MB/s read':>11}{'MB/s written':>14}{'of cp':>8}{'peak MiB':>10}{'bound':>7}")
    for name, run in best.items():
        run["share_of_cp"] = round((size + run["bytes"]) / run["seconds"] / ceiling, 3)
        rates = [size / 1e6 / run["seconds"], run["bytes"] / 1e6 / run["seconds"]]
        peak = f"{run['peak_mib']:10}{bound:7}" if "peak_mib" in run else ""
        print(f"{name:12}{run['seconds']:9.2f}{rates[0]:11.0f}{rates[1]:14.0f}{run['share_of_cp']:8.0%}{peak}")
    what = dict(architecture=flags.architecture, shape=flags.shape, source_data_type=flags.source_data_type)
    runs = list(best.values())
    report(torch.device("cpu"), benchmark="convert", **what, source_bytes=size, bound_mib=bound, runs=runs)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=("gpt2", "opt"), default="opt")
    add_flags(parser, BenchmarkFlags, "source", ("shape", "repeats", "folder"), shape="350M", repeats=2)
    parser.add_argument("--source-data-type", choices=list(DATA_TYPES), default="fp32")
    parser.add_argument("--data-types", nargs="+", choices=list(DATA_TYPES), default=["fp16", "bf16"])
    parser.add_argument("--tps", nargs="+", type=int, default=[1, 8], help="tensor parallel sizes (default: 1 8)")
    return parser.parse_args()


def make_source(folder: Path, architecture: str, shape: str, data_type: str) -> int:
    """Write a checkpoint of repeated random values, never held in memory; returns the largest tensor's bytes."""
    heads, head_size, layers, vocab = SHAPES[shape]
    h, dtype = heads * head_size, TORCH_DTYPES[data_type]
    ids = dict(vocab_size=vocab, bos_token_id=vocab - 1, eos_token_id=vocab - 1)
    if architecture == "gpt2":
        config = dict(model_type="gpt2", n_embd=h, n_head=heads, n_layer=layers, n_positions=POSITIONS)
        tensors = dict(gpt2_tensors(h, layers, vocab))
    else:
        config = dict(model_type="opt", hidden_size=h, num_attention_heads=heads, num_hidden_layers=layers)
        config |= dict(ffn_dim=4 * h, max_position_embeddings=POSITIONS)
        tensors = dict(opt_tensors(h, layers, vocab))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | ids))
    shards: list[dict[str, dict]] = [{}]
    end = 0
    for name, sizes in tensors.items():
        size = torch.Size(sizes).numel() * dtype.itemsize
        if end and end + size > SHARD_BYTES:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": data_type.upper().replace("FP", "F"), "shape": sizes}
        shards[-1][name]["data_offsets"] = [end, end + size]
        end += size
    block = memoryview(torch.empty(BLOCK // dtype.itemsize).normal_(std=0.02).to(dtype).view(torch.uint8).numpy())
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(files, shards, strict=True):
        header = json.dumps(shard).encode()
        end = max(entry["data_offsets"][1] for entry in shard.values())
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for start in range(0, end, len(block)):
                file.write(block[: end - start])
    index = {tensor: name for name, shard in zip(files, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return max(torch.Size(sizes).numel() for sizes in tensors.values()) * dtype.itemsize


def gpt2_tensors(h: int, layers: int, vocab: int) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes; matrices are [in, out]."""
    yield from {"wte.weight": [vocab, h], "wpe.weight": [POSITIONS, h], "ln_f.weight": [h], "ln_f.bias": [h]}.items()
    parts = {"ln_1": [h], "attn.c_attn": [h, 3 * h], "attn.c_proj": [h, h]}
    parts |= {"ln_2": [h], "mlp.c_fc": [h, 4 * h], "mlp.c_proj": [4 * h, h]}
    for layer in range(layers):
        for name, sizes in parts.items():
            yield f"h.{layer}.{name}.weight", sizes
            yield f"h.{layer}.{name}.bias", sizes[-1:]


def opt_tensors(h: int, layers: int, vocab: int) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes; matrices are [out, in]."""
    yield from {"embed_tokens.weight": [vocab, h], "embed_positions.weight": [POSITIONS + 2, h]}.items()
    parts = {f"self_attn.{part}": [h, h] for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
    parts |= {"fc1": [4 * h, h], "fc2": [h, 4 * h], "self_attn_layer_norm": [h], "final_layer_norm": [h]}
    for name, sizes in [(f"layers.{i}.{part}", sizes) for i in range(layers) for part, sizes in parts.items()]:
        yield f"{name}.weight", sizes
        yield f"{name}.bias", sizes[:1]
    yield from {"final_layer_norm.weight": [h], "final_layer_norm.bias": [h]}.items()


def measure_all(folder: Path, flags: argparse.Namespace) -> Iterator[dict]:
    """One run of cp and of each data type and tp; every result is deleted at once."""
    source, output = folder / "source", folder / "out"
    read_once(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, output], check=True)
    subprocess.run(["sync", *output.iterdir()], check=True)
    seconds = round(time.perf_counter() - start, 2)
    yield {"name": "cp", "seconds": seconds, "bytes": sum(path.stat().st_size for path in output.iterdir())}
    shutil.rmtree(output)
    for data_type, tp in [(data_type, tp) for data_type in flags.data_types for tp in flags.tps]:
        read_once(source)
        command = [sys.executable, "-c", MEASURE, source, output, str(tp), data_type]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        yield {"name": f"{data_type} tp {tp}", **json.loads(done.stdout)}
        shutil.rmtree(output)


def read_once(source: Path) -> None:
    """Read the source into the page cache, once all writes are on the disk."""
    os.sync()
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(BLOCK):
                pass


if __name__ == "__main__":
    main()
