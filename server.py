#!/usr/bin/env python3
"""Serve a GPT on tp × pp MPI ranks behind Triton Inference Server.

    mpirun -n 4 ./server.py --hf-model-name gpt2 --tp 2 --pp 2

Rank 0 downloads and converts the checkpoint. Every rank loads its shards. Rank 0 runs Triton and the engine's loop; the
other ranks follow it. SIGTERM, SIGINT or SIGUSR1: requests in flight are finished, then all ranks exit with 0; with 1
where --drain-timeout cut some off.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from convert import ConversionFlags, Names, convert, verify
from engine import check
from engine.config import EngineConfig, ParallelConfig
from engine.engine import Engine, follow
from engine.flags import add_flags, flag, from_flags
from engine.judge import attempt, num_ranks
from engine.signals import SecondSignal, end_start_up, ignore_late_sigusr1, on_stop_signals
from engine.startup import make_engine
from engine.watchdog import Watchdog
from engine.world import Mail, World, check_size
from executor.startup import Backend, WeightFolder, connect, load, pick_backend
from helpers import ProgressLine, find_checkpoint, model_key, one_line, setup_logging, use_one_arena, weight_bytes
from serving.chat import ChatTemplate
from serving.load_tokenizer import load_tokenizer
from serving.startup import FrontEnd, FrontEndFlags

_LOG = logging.getLogger("server")
_PROGRESS_INTERVAL_S = 2.0
_WAY_OUT_S = 60.0  # from the last step to the end of the process: Triton may take up to half of it


@dataclass(frozen=True)
class ModelFlags(ConversionFlags):
    """The checkpoint, the folder of converted weights, the number of ranks."""

    hf_model_name: str = flag(
        "gpt2",
        "Hugging Face Hub id, repo:file, a local checkpoint, or a converted N-gpu folder",
        aliases=("--model-repo-id",),
    )
    revision: str = flag("", "the Hub repository's branch, tag or commit; by default its main branch")
    output_dir: str = flag("ft_models", "folder of the converted weights; on several nodes, on a shared file system")
    lib_path: str = flag(
        os.path.join(os.environ.get("FT_REPO_DIR", ""), "build/lib/libth_transformer.so"),
        "FasterTransformer's library, ${FT_REPO_DIR}/build/lib/libth_transformer.so",
    )
    check: bool = flag(
        False,
        "check ranks, GPUs, network, ports, --output-dir and Triton's libraries, print a line for each, and end: at "
        "most a minute",
    )
    verify_checksums: bool = flag(False, "compare the weight files with their checksums first (up to about 4 GB/s)")
    pp: int = flag(1, "pipeline parallel size: groups of layers, one after the other")

    @property
    def served_name(self) -> str:
        """The model's name in Triton. Raises ValueError for one that Triton cannot route."""
        name = self.model_name or model_key(self.hf_model_name)
        if not self.model_name and re.fullmatch(r"\d+-gpu", name):  # a converted folder: its parent has the name
            name = Path(self.hf_model_name).resolve().parent.name
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(f"model_name is {name!r}; it may have letters, digits, '_', '.' and '-' only")
        return name


def main() -> int:
    """Run one rank; returns its exit code."""
    started = time.monotonic()
    use_one_arena()
    model_flags, engine_config, front_end_flags = parse_flags()
    on_stop_signals(end_start_up)
    if model_flags.check:
        return _check(model_flags, engine_config, front_end_flags)
    world = World()
    setup_logging(model_flags.verbose, world.rank, world.size, front_end_flags.log.log_format)
    try:
        return _serve(model_flags, engine_config, front_end_flags, world, started)
    except Exception as error:  # after start-up: a defect, or a lost rank
        _LOG.error("%s: %s; ending the job", type(error).__name__, one_line(error), exc_info=model_flags.verbose)
        world.abort()
        return 1


def parse_flags(argv: list[str] | None = None) -> tuple[ModelFlags, EngineConfig, FrontEndFlags]:
    """The command line as three checked configurations; argparse ends the process with code 2 for a wrong one."""
    parser = argparse.ArgumentParser(
        description="Serve a GPT on tp × pp MPI ranks behind Triton Inference Server.",
        epilog="example: mpirun -n 4 ./server.py --hf-model-name gpt2 --tp 2 --pp 2",
    )
    add_flags(parser, ModelFlags, "model")
    add_flags(parser, EngineConfig, "engine")
    for title, cls in FrontEndFlags.parts().items():
        add_flags(parser, cls, title)
    flags = parser.parse_args(argv)
    try:
        front_end_flags = FrontEndFlags(**{name: from_flags(cls, flags) for name, cls in FrontEndFlags.parts().items()})
        return from_flags(ModelFlags, flags), from_flags(EngineConfig, flags), front_end_flags
    except ValueError as error:
        parser.error(str(error))


def _check(flags: ModelFlags, engine_config: EngineConfig, front_end_flags: FrontEndFlags) -> int:
    """--check on one rank; returns its exit code."""
    from executor.check import this_machine

    mail = Mail()
    setup_logging(flags.verbose, mail.rank, mail.size, front_end_flags.log.log_format)

    def world() -> str:
        _check_size(flags, mail.size)
        return f"{num_ranks(mail.size)} for tp {flags.tp} × pp {flags.pp}"

    own = [lambda: attempt("world", world), *front_end_flags.checks()]
    wants_library = engine_config.engine == "fastertransformer" or flags.lib_path != ModelFlags.lib_path
    machine = this_machine(engine_config.device, Path(flags.lib_path), wants_library)
    folder = Path(flags.output_dir).expanduser().resolve()
    return check.run(mail, own, machine, folder, weight_bytes(flags.hf_model_name) // mail.size)


def _check_size(flags: ModelFlags, size: int) -> None:
    """Raise ValueError if the MPI world does not have tp × pp ranks."""
    wanted = ParallelConfig(flags.tp, flags.pp).world_size
    check_size(size, wanted, f"mpirun -n {wanted} {shlex.join(sys.argv)}")


def _serve(
    model_flags: ModelFlags,
    engine_config: EngineConfig,
    front_end_flags: FrontEndFlags,
    world: World,
    started: float,
) -> int:
    """Start up together, then run rank 0's loop or follow it. Start-up errors end all ranks with code 1."""
    start = _Start(model_flags, engine_config, front_end_flags, world)
    meetings = (start.connect, start.prepare)  # collective: an error on one rank must end the others, which wait for it
    times = []
    for stage in (start.check, start.find_weights, start.pick_backend, start.connect, start.load, start.prepare):
        began = time.monotonic()
        error = _attempt(stage, model_flags.verbose)
        if error is not None and stage in meetings and world.size > 1:
            _LOG.error("%s", error)
            world.abort()
        if stage not in (start.check, *meetings):
            error = world.agree(error)
        if error is not None:
            if world.rank == 0:
                _LOG.error("%s", error)
            return 1
        times.append(f"{stage.__name__} {time.monotonic() - began:.1f} s")
    if world.rank == 0:
        _LOG.info("start-up took: %s", ", ".join(times).replace("_", " "))
        return _lead(start, front_end_flags, started)
    on_stop_signals(SecondSignal(lambda number: None))  # this rank ends when rank 0 says so
    watchdog = Watchdog()
    follow(world, start.executor, watchdog, engine_config.step_timeout_s)
    watchdog.allow(_WAY_OUT_S, "the other ranks do not end")
    start.close()
    return 0


def _attempt(stage: Any, verbose: bool) -> str | None:
    try:
        stage()
        return None
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if verbose:
            _LOG.exception("start-up failed")
        return one_line(error)


class _Start:
    """Start-up in stages; all ranks finish or fail a stage together."""

    def __init__(
        self, model_flags: ModelFlags, engine_config: EngineConfig, front_end_flags: FrontEndFlags, world: World
    ) -> None:
        self.flags = model_flags
        self.engine_config = engine_config
        self.front_end_flags = front_end_flags
        self.world = world
        self.parallel: ParallelConfig
        self.backend: Backend

    def check(self) -> None:
        """Check the number of ranks; every rank gets the same result."""
        _check_size(self.flags, self.world.size)
        self.parallel = ParallelConfig(self.flags.tp, self.flags.pp, self.world.rank)

    def find_weights(self) -> None:
        """Rank 0 downloads and converts; the others wait for the folder's path."""
        if self.world.rank == 0:
            folder = None
            try:
                self.served_name = self.flags.served_name
                self.front_end_flags.check_free()
                folder = self._converted_folder()
            finally:
                self.world.send(folder)
        else:
            folder = self.world.receive()
        if folder is None:
            return  # rank 0 has the error
        if not (folder / "config.ini").is_file():
            host = os.uname().nodename
            raise ValueError(
                f"rank {self.world.rank} on {host} does not see {folder}: output_dir must be on a shared file system"
            )
        self.weights = WeightFolder.read(folder)
        self.model_config = self.weights.config
        if self.model_config.tensor_para_size != self.flags.tp:
            raise ValueError(
                f"{folder} was converted for tp {self.model_config.tensor_para_size}, and --tp is {self.flags.tp}"
            )
        self.model_config.check_tp(self.flags.tp)
        self.parallel.layers(self.model_config.num_layer)

    def _converted_folder(self) -> Path:
        flags = self.flags
        source = find_checkpoint(flags.hf_model_name, flags.revision or None)
        options = flags.source_options
        if (source / "config.ini").is_file():
            if flags.tokenizer or flags.num_heads:
                raise ValueError(f"{source} is converted already, and takes neither --tokenizer nor --num-heads")
            verify(source, checksums=flags.verify_checksums)
            return source.resolve()
        output_dir = Path(flags.output_dir).expanduser().resolve() / model_key(flags.hf_model_name)
        started = time.monotonic()
        folder = convert(
            source,
            output_dir,
            flags.tp,
            flags.weight_data_type,
            Names(source_name=flags.hf_model_name, revision=flags.revision or None),
            ProgressLine(),
            options,
        )
        if flags.verify_checksums:
            verify(folder, checksums=True)
        _LOG.info("weights are in %s after %.1f s", folder, time.monotonic() - started)
        return folder

    def pick_backend(self) -> None:
        """Pick engine, device and data type; rank 0 also reads the tokenizer."""
        lib_path, local_rank = Path(self.flags.lib_path), self.world.local_rank
        self.backend = pick_backend(self.engine_config, self.model_config, lib_path, local_rank, self.flags.pp)
        if self.world.rank == 0:
            self.tokenizer = load_tokenizer(self.weights.path)
            self.chat_template = ChatTemplate(self.tokenizer, self.front_end_flags.openai.read_chat_template())
            self.chat_template.check(str(self.weights.path))

    def connect(self) -> None:
        """Join the tp and pp groups; collective."""
        self.comm = connect(self.world, self.parallel, self.backend)

    def load(self) -> None:
        """Load this rank's shards."""
        self.executor = load(
            self.weights,
            self.engine_config,
            self.parallel,
            self.world,
            self.comm,
            self.backend,
            _LoadProgress(),
        )

    def prepare(self) -> None:
        """The executor's collective part, after all ranks have loaded."""
        self.executor.prepare()

    def close(self) -> None:
        """Leave the groups."""
        if self.comm is not None:
            self.executor.close()
            self.comm.close()


class _LoadProgress:
    """Logs how far loading is, every few seconds and at its end."""

    def __init__(self) -> None:
        self.started = self.logged = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self.logged > _PROGRESS_INTERVAL_S:
            self.logged = now
            _LOG.info("loaded %d of %d parts in %.1f s", done, total, now - self.started)


def _lead(start: _Start, flags: FrontEndFlags, started: float) -> int:
    """Rank 0: the front ends, and the engine's loop in this thread, until a signal or a failure."""
    from gpt import triton_models
    from serving.generation import Generator
    from serving.metrics import ServerMetrics
    from serving.request_log import RequestLog
    from serving.startup import make_front_ends
    from serving.tokenization import RequestEncoder

    front_ends: list[FrontEnd] = []

    def kill() -> None:
        for front_end in front_ends:
            front_end.kill()

    watchdog = Watchdog(before_exit=kill)
    engine = make_engine(start.executor, start.model_config, start.engine_config, start.world, watchdog)
    config = start.model_config
    encoder = RequestEncoder(
        start.tokenizer,
        config.end_ids,
        config.vocab_size,
        start.executor.max_seq_len,
        spells_bad_words=start.backend.engine == "fastertransformer",
        chat_template=start.chat_template,
    )
    name, root, verbose = start.served_name, start.flags.hf_model_name, start.flags.verbose
    metrics = ServerMetrics(name, start.executor.max_seq_len)
    metrics.watch(lambda: engine.load)
    generator = Generator(engine, encoder, RequestLog(flags.log, metrics))
    models = triton_models(name, generator, flags.openai.key)
    front_ends += make_front_ends(generator, models, name, root, flags, metrics, verbose)
    try:
        for front_end in front_ends:
            front_end.start()
        engine.warm_up()
        engine.observer = metrics
        drain = partial(_drain_in_background, engine, front_ends, flags.triton.drain_timeout)
        on_stop_signals(SecondSignal(drain, kill))
        _log_ready(start, front_ends, time.monotonic() - started)
        engine.run()
    except BaseException:
        kill()
        raise
    finished, cut_off = engine.drained
    _LOG.info("%d requests in flight were finished, %d were cut off", finished, cut_off)
    watchdog.allow(_WAY_OUT_S, "a front end or another rank does not end")
    for front_end in front_ends:
        front_end.stop()
    start.close()
    return 1 if cut_off else 0


def _log_ready(start: _Start, front_ends: Sequence[FrontEnd], seconds: float) -> None:
    backend = start.backend
    _LOG.info(
        "ready: model %s, engine %s (%s), tp %d × pp %d, %s on %s, %s, pid %d, after %.1f s",
        start.served_name,
        backend.engine,
        backend.reason,
        start.flags.tp,
        start.flags.pp,
        str(backend.dtype).removeprefix("torch."),
        backend.device.type,
        " and ".join(url for front_end in front_ends for url in front_end.urls),
        os.getpid(),
        seconds,
    )


def _drain_in_background(engine: Engine, front_ends: Sequence[FrontEnd], drain_timeout: float, number: int) -> None:
    """Let requests in flight finish; the signal's handler must not keep the engine's loop from them."""
    _LOG.info("%s: finishing what is in flight (at most %g s)", signal.Signals(number).name, drain_timeout)

    def drain() -> None:
        for front_end in front_ends:  # before the engine refuses: a load balancer sees it first
            front_end.refuse()
        engine.stop(drain_timeout)

    threading.Thread(target=drain, name="drain", daemon=True).start()


if __name__ == "__main__":
    code = main()
    ignore_late_sigusr1()
    sys.exit(code)
