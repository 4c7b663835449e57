#!/usr/bin/env python3
"""Seconds from a weight folder to the first token, stage by stage, beside reading the files alone; one rank.

    python benchmarks/loading.py --shape 6.7B --folder /scratch

Makes a folder of repeated random values, and deletes it. Files are read alone by as many threads and in as large chunks
as the server's, into memory that is not kept. Cold: the files are not in the page cache (dropped by posix_fadvise,
which a file system may not do: compare the two rates), and Triton's cache of compiled kernels is empty. Warm: both are
there. Each start is a process of its own; its stages: "connect" makes the GPU's context, "load" reads the weights onto
the device, "prepare" makes the key-value cache, compiles kernels and captures graphs, "first token" answers a prompt.
The last columns: load's seconds in those of reading alone, and by how much the host's memory grew.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags, model_config, report
from engine.config import EngineConfig, ParallelConfig
from engine.flags import add_flags, from_flags
from engine.request import Request, SamplingParams
from engine.startup import make_engine
from engine.watchdog import Watchdog
from engine.world import World
from executor.startup import WeightFolder, connect, load, pick_backend
from weights.model_config import DATA_TYPES
from weights.read_ahead import CHUNK_BYTES, NUM_THREADS, read_chunk
from weights.reader import TORCH_DTYPES
from weights.table import weight_specs

BLOCK = 8 << 20  # random values, repeated
STAGES = ("connect", "load", "prepare", "first token")


def main() -> None:
    flags = parse_flags()
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=flags.folder or None))
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    try:
        started = time.perf_counter()
        size = make_folder(folder, flags.shape, flags.file_data_type)
        print(f"{flags.shape}, {size / 1e9:.2f} GB in {flags.file_data_type}, made in {seconds_since(started):.1f} s")
        runs = [measure(folder, flags, is_cold) for is_cold in (True, False)]
    finally:
        shutil.rmtree(folder)
    print(f"{'':6}{'read alone':>11}{'GB/s':>7}" + "".join(f"{name:>13}" for name in STAGES) + f"{'load':>7}{'MiB':>8}")
    for run in runs:
        rate = size / 1e9 / run["read_s"]
        stages = "".join(f"{run['stages'][name]:11.2f} s" for name in STAGES)
        ratio = run["stages"]["load"] / run["read_s"]
        print(f"{run['name']:6}{run['read_s']:9.2f} s{rate:7.2f}{stages}{ratio:6.2f}×{run['grown_mib']:8}")
    device = torch.device("cuda" if torch.cuda.is_available() and flags.device != "cpu" else "cpu")
    what = dict(shape=flags.shape, file_data_type=flags.file_data_type, bytes=size, int8_mode=flags.int8_mode)
    report(device, benchmark="loading", **what, runs=runs)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, BenchmarkFlags, "model", ("shape", "folder"))
    parser.add_argument("--file-data-type", choices=list(DATA_TYPES), default="bf16", help="of the files")
    add_flags(parser, EngineConfig, "engine")
    return parser.parse_args()


def make_folder(folder: Path, shape: str, data_type: str) -> int:
    """Write config.ini and the files for tp 1, on the disk at the end; the head is the embedding. Returns bytes."""
    config = dataclasses.replace(model_config(shape, 1), weight_data_type=data_type)
    config.write(folder / "config.ini")
    dtype = TORCH_DTYPES[data_type]
    values = torch.empty(BLOCK // dtype.itemsize).normal_(std=0.02).to(dtype)
    block = memoryview(values.view(torch.uint8).numpy())
    total = 0
    for spec in weight_specs(config):
        if spec.name == "lm_head.weight":
            continue
        size = spec.num_elements(1) * dtype.itemsize
        with (folder / spec.file_name(0)).open("wb", buffering=0) as file:
            for start in range(0, size, BLOCK):
                file.write(block[: size - start])
        total += size
    os.sync()
    return total


def measure(folder: Path, flags: argparse.Namespace, is_cold: bool) -> dict:
    """Read the files alone, then start in a new process."""
    if is_cold:
        drop_from_cache(folder)
    started = time.perf_counter()
    read_alone(folder)
    read_s = seconds_since(started)
    if is_cold:
        drop_from_cache(folder)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        stages, grown_mib = pool.apply(start, (folder, from_flags(EngineConfig, flags)))
    name = "cold" if is_cold else "warm"
    return {"name": name, "read_s": round(read_s, 3), "stages": stages, "grown_mib": grown_mib}


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.bin"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_alone(folder: Path) -> None:
    """Read all weights, as the server's threads do."""
    local = threading.local()

    def read(path: Path, first: int, size: int) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(CHUNK_BYTES))
        read_chunk(path, first, local.buffer[:size])

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        reads = [
            threads.submit(read, path, first, min(CHUNK_BYTES, size - first))
            for path in folder.glob("*.bin")
            for size in [path.stat().st_size]
            for first in range(0, size, CHUNK_BYTES)
        ]
        for done in reads:
            done.result()


def start(folder: Path, engine_config: EngineConfig) -> tuple[dict[str, float], int]:
    """Start as the server does, up to the first token. Returns the seconds of STAGES, and MiB of memory for weights."""
    logging.basicConfig(level=logging.INFO, format="  %(message)s", stream=sys.stdout)
    world, parallel = World(), ParallelConfig()
    weights = WeightFolder.read(folder)
    backend = pick_backend(engine_config, weights.config, Path("none"), world.local_rank)
    times = [time.perf_counter()]
    comm = connect(world, parallel, backend)
    if backend.device.type == "cuda":
        torch.zeros(1, device=backend.device)
    times.append(time.perf_counter())
    before = resident_mib()
    executor = load(weights, engine_config, parallel, world, comm, backend)
    if backend.device.type == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter())
    grown_mib = resident_mib() - before
    executor.prepare()
    times.append(time.perf_counter())
    engine = make_engine(executor, weights.config, engine_config, world, Watchdog())
    request = Request([1] * min(128, executor.max_seq_len - 2), SamplingParams(1))
    engine.submit(request)
    while not request.is_finished:
        engine.step()
    times.append(time.perf_counter())
    executor.close()
    comm.close()
    return {name: round(times[i + 1] - times[i], 3) for i, name in enumerate(STAGES)}, grown_mib


def resident_mib() -> int:
    """The most memory that this process ever had, pages of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def seconds_since(started: float) -> float:
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
