"""What server.py --check asks of torch: a rank's device, and FasterTransformer's library."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from engine.check import Machine
from engine.judge import Device
from executor.collectives import TorchPairs
from executor.fastertransformer import load_library
from executor.runner import host_memory
from executor.startup import pick_device


def this_machine(wish: str, lib_path: Path, wants_library: bool) -> Machine:
    """What engine.check asks. wish: of --device; wants_library: whether the lack of FasterTransformer is an error."""
    return Machine(
        device=lambda local_rank: find_device(wish, local_rank),
        library=lambda: try_library(lib_path, wants_library),
        gpu_pairs=TorchPairs,
    )


def find_device(wish: str, local_rank: int) -> Device:
    """The device of a rank with its memory; of a CPU, all ranks of the host share it. wish: of --device."""
    try:
        device = pick_device(wish, local_rank)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return Device(torch.cuda.get_device_name(device), True, free, total)
    except RuntimeError as error:
        return Device("", wish != "cpu", 0, 0, " ".join(str(error).split()))
    page = os.sysconf("SC_PAGE_SIZE")
    return Device("CPU", False, host_memory(), os.sysconf("SC_PHYS_PAGES") * page)


def try_library(lib_path: Path, is_wanted: bool) -> str | None:
    """Load FasterTransformer's library: "" if it loads, else why not; None where there is none and none is wanted."""
    if not lib_path.is_file():
        return f"lib_path is {lib_path}, and there is no such file" if is_wanted else None
    try:
        load_library(lib_path)
    except RuntimeError as error:
        return str(error)
    return ""
