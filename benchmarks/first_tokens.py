#!/usr/bin/env python3
"""How long requests wait for tokens beside others, at the engine's interface, with random weights.

    python benchmarks/first_tokens.py --shapes 6.7B
    python benchmarks/first_tokens.py --shapes 8M --requests 8 --prompt-len 1024 --limits 0 128

prefix  --requests prompts begin with the same --prefix-len tokens: the time to the first token of all but the first
        one, with the prefix cache and without it, sent one at a time, and together after the first one.
gaps    --requests sequences decode when a prompt of --prompt-len tokens arrives: the time between two tokens of a
        sequence before the prompt and beside it, and the time to the prompt's first token, for each of --limits, the
        values of the server's --max-mixed-tokens.
behind  32 prompts of half as many tokens run when a request of one token arrives: the time to its first token. The
        bound: it comes from the next step that is planned; on a GPU, one more is launched before, and with pipeline
        stages as many for each.

Prints a table for each part, in milliseconds, then one JSON line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags, report
from benchmarks.shapes import ENGINE_FLAGS, for_each_shape, format_name, run_to_end
from engine.config import EngineConfig
from engine.engine import Engine
from engine.flags import add_flags
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from server import ModelFlags
from weights.model_config import ModelConfig

_NUM_LONG = 32
_WARM_UP = 4  # requests of a round that is not in the figures
_SUFFIX_LEN, _OUTPUT_LEN = 32, 16
_DECODING_LEN = 128  # tokens of the prompts of sequences that decode
_STEADY_STEPS = 32
Row = dict[str, Any]


def main() -> None:
    flags = parse_flags()
    max_seq_len = max(flags.prefix_len + _SUFFIX_LEN, flags.prompt_len) + _DECODING_LEN
    slots = max(flags.requests, _NUM_LONG) + 1
    for_each_shape(flags, slots, max_seq_len, partial(measure, flags), partial(show, flags))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(_PARTS), default=list(_PARTS), help="what to time")
    parser.add_argument("--prefix-len", type=int, default=1024, help="tokens that prompts share (default: 1024)")
    parser.add_argument("--prompt-len", type=int, default=4096, help="tokens of the long prompt (default: 4096)")
    limits = [0, 2048, 1024, 512, 384, 256]
    parser.add_argument("--limits", type=int, nargs="+", default=limits, help=f"of mixed steps (default: {limits})")
    parser.set_defaults(max_mixed_tokens=0)
    add_flags(parser, ModelFlags, "ranks", ("tp", "pp"))
    add_flags(parser, EngineConfig, "engine", [name for name in ENGINE_FLAGS if name != "max_mixed_tokens"])
    add_flags(parser, BenchmarkFlags, "load", ("shapes", "threads", "requests", "repeats"), requests=64, repeats=1)
    return parser.parse_args()


class Timed:
    """A request of random tokens, and when it was sent and when each of its tokens came."""

    def __init__(self, prompt_ids: np.ndarray, output_len: int) -> None:
        self.request = Request(prompt_ids.tolist(), SamplingParams(output_len), (), self._note)
        self.sent = 0.0
        self.times: list[float] = []

    def _note(self, request: Request) -> None:
        self.times.append(time.perf_counter())

    @property
    def wait_ms(self) -> float:
        """To its first token."""
        return (self.times[0] - self.sent) * 1e3

    def gaps_ms(self, since: int) -> np.ndarray:
        """Between its tokens from one on."""
        return np.diff(self.times[since:]) * 1e3


def send(engine: Engine, timed: Sequence[Timed]) -> None:
    """Submit requests together, as one client does."""
    for one in timed:
        one.sent = time.perf_counter()
    engine.submit(*[one.request for one in timed])


def step_until(engine: Engine, is_done: Callable[[], bool]) -> list[float]:
    """Step until it is done; returns the milliseconds of each step."""
    steps = []
    while not is_done():
        started = time.perf_counter()
        engine.step()
        steps.append((time.perf_counter() - started) * 1e3)
    return steps


def end(engine: Engine, timed: Sequence[Timed]) -> None:
    """Cancel what is left of requests, and let the engine come to rest."""
    for one in timed:
        engine.cancel(one.request)
    run_to_end(engine, [])


def renew(engine: Engine, has_prefix_cache: bool, max_mixed_tokens: int) -> None:
    """Give an idle engine a scheduler of other settings, which knows of nothing that was computed before."""
    memory, executor = engine.scheduler.memory, engine.executor
    limits = executor.max_seq_len, executor.max_step_tokens, memory.block_size, executor.num_blocks
    engine.scheduler = Scheduler(memory.num_slots, *limits, has_prefix_cache, max_mixed_tokens, executor.num_stages)


def measure(
    flags: argparse.Namespace, engine: Engine, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, list[Row]]:
    """The rows of each part's table."""
    rng = np.random.default_rng(0)
    return {part: _PARTS[part](flags, engine, partial(rng.integers, 0, config.vocab_size)) for part in flags.parts}


def measure_prefix(flags: argparse.Namespace, engine: Engine, draw: Callable[[int], np.ndarray]) -> list[Row]:
    """A row for each way to send requests; draw: makes so many random tokens."""
    rows = []
    for sent in ("one at a time", "together"):
        row: Row = {"sent": sent}
        for name, has_prefix_cache in (("cache", True), ("without", False)):
            wait = partial(_waits_ms, flags.prefix_len, engine, draw, has_prefix_cache, sent == "together")
            wait(_WARM_UP)
            waits = [ms for _ in range(flags.repeats) for ms in wait(flags.requests)]
            row |= {f"{name}_ms": float(np.median(waits)), f"{name}_longest_ms": max(waits)}
        rows.append(row | {"ratio": row["cache_ms"] / row["without_ms"]})
    return rows


def _waits_ms(
    prefix_len: int,
    engine: Engine,
    draw: Callable[[int], np.ndarray],
    has_prefix_cache: bool,
    together: bool,
    count: int,
) -> list[float]:
    """To the first tokens of all requests but the first one."""
    renew(engine, has_prefix_cache, 0)
    prefix = draw(prefix_len)
    first, *others = [Timed(np.concatenate([prefix, draw(_SUFFIX_LEN)]), _OUTPUT_LEN) for _ in range(count)]
    for batch in ([first], others) if together else [[one] for one in (first, *others)]:
        send(engine, batch)
        run_to_end(engine, [])
    return [one.wait_ms for one in others]


def measure_gaps(flags: argparse.Namespace, engine: Engine, draw: Callable[[int], np.ndarray]) -> list[Row]:
    """A row for each limit, after one that warms up."""
    return [_gaps(flags, engine, draw, limit) for limit in (flags.limits[0], *flags.limits)][1:]


def _gaps(flags: argparse.Namespace, engine: Engine, draw: Callable[[int], np.ndarray], limit: int) -> Row:
    renew(engine, False, limit)
    decoding = [Timed(draw(_DECODING_LEN), engine.executor.max_seq_len - _DECODING_LEN) for _ in range(flags.requests)]
    first, prompt = decoding[0], Timed(draw(flags.prompt_len), _OUTPUT_LEN)
    send(engine, decoding)
    step_until(engine, lambda: all(one.times for one in decoding))
    start = len(first.times)
    step_until(engine, lambda: len(first.times) == start + _STEADY_STEPS)
    before = first.gaps_ms(start - 1)
    send(engine, [prompt])
    step_until(engine, lambda: bool(prompt.times))
    beside = first.gaps_ms(start - 1 + _STEADY_STEPS)
    end(engine, [*decoding, prompt])
    return {
        "max_mixed_tokens": limit,
        "before_ms": float(np.median(before)),
        "before_longest_ms": float(before.max()),
        "beside_ms": float(np.median(beside)),
        "beside_longest_ms": float(beside.max()),
        "ratio": float(beside.max() / np.median(before)),
        "num_steps": len(beside),
        "first_token_ms": prompt.wait_ms,
    }


def measure_behind(flags: argparse.Namespace, engine: Engine, draw: Callable[[int], np.ndarray]) -> list[Row]:
    """A row for each limit, after one that warms up."""
    return [_behind(flags, engine, draw, limit) for limit in (flags.limits[0], *flags.limits)][1:]


def _behind(flags: argparse.Namespace, engine: Engine, draw: Callable[[int], np.ndarray], limit: int) -> Row:
    renew(engine, False, limit)
    prompts = [Timed(draw(flags.prompt_len // 2), _OUTPUT_LEN) for _ in range(_NUM_LONG)]
    short = Timed(draw(1), 1)
    send(engine, prompts)
    before = step_until(engine, lambda: any(one.times for one in prompts))
    bound = engine.scheduler.num_cohorts * (1 + engine.executor.num_ahead)
    send(engine, [short])
    steps = step_until(engine, lambda: bool(short.times))
    end(engine, [*prompts, short])
    return {
        "max_mixed_tokens": limit,
        "first_token_ms": short.wait_ms,
        "num_steps": len(steps),
        "bound_steps": bound,
        "bound_ms": bound * max(before + steps),
    }


_PARTS = {"prefix": measure_prefix, "gaps": measure_gaps, "behind": measure_behind}


def show(
    flags: argparse.Namespace, shape: str, parts: dict[str, list[Row]], device: torch.device, dtype: torch.dtype
) -> None:
    name = format_name(flags, dtype)
    print(f"{shape} {name} tp {flags.tp} pp {flags.pp}, ms")
    titles = {
        "prefix": f"first tokens of {flags.requests - 1} prompts of {flags.prefix_len} + {_SUFFIX_LEN} tokens",
        "gaps": f"gaps of {flags.requests} sequences that decode when a prompt of {flags.prompt_len} tokens arrives",
        "behind": f"first token of a request of one token behind {_NUM_LONG} prompts of {flags.prompt_len // 2} tokens",
    }
    for part, rows in parts.items():
        print(f"\n{titles[part]}\n" + " ".join(f"{column.removesuffix('_ms'):>16}" for column in rows[0]))
        for row in rows:
            print(" ".join(f"{value:>16.2f}" if isinstance(value, float) else f"{value:>16}" for value in row.values()))
    report(device, benchmark="first_tokens", shape=shape, dtype=name, tp=flags.tp, pp=flags.pp, **parts)


if __name__ == "__main__":
    main()
