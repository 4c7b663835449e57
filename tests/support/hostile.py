"""Runs attacks with checkpoints, each in a fork with limits, and measures them.

    python -m tests.support.hostile FOLDER NAME…

All forks are of one process, which has imported what a conversion needs: only an attack's own processor time and its
own peak of memory count. Prints a JSON object, name → outcome.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.ranks import ROOT

MEMORY_BYTES = 1 << 30
SECONDS = 5
_ALARM_S = 30  # a guard against hangs


@dataclass(frozen=True)
class Outcome:
    """How an attack ended: its error's class and sentence, seconds of the processor, bytes above those at the start."""

    kind: str
    sentence: str
    seconds: float
    num_bytes: int


def measure(attack: Callable[[], Any]) -> Outcome:
    """Run it in a fork. kind is "no error", or "killed by …" where the process did not end by itself, too."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            theirs.send(_run(attack))
        os._exit(0)
    theirs.close()
    outcome = None
    with contextlib.suppress(EOFError):
        outcome = ours.recv()
    _, status, usage = os.wait4(pid, 0)
    if outcome is None:
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "itself"
        return Outcome(f"killed by {how}", "", usage.ru_utime + usage.ru_stime, 0)
    return outcome


def _run(attack: Callable[[], Any]) -> Outcome:
    from helpers import one_line

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_ALARM_S)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is used now
    before = _status("VmRSS")
    limit = _status("VmSize") + 2 * MEMORY_BYTES  # address space is more than memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    began, sentence, kind = time.process_time(), "", "no error"
    try:
        attack()
    except BaseException as error:
        kind, sentence = type(error).__name__, one_line(error)
        if not isinstance(error, (ValueError, RuntimeError, OSError)):  # a defect: show its place
            sentence += " " + " ".join(traceback.format_exc().split())[-900:]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = max(time.process_time() - began, children.ru_utime + children.ru_stime)
    return Outcome(kind, sentence, seconds, max(0, _status("VmHWM") - before))


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def main(folder: Path, names: Iterable[str]) -> None:
    """Run the attacks of these names; each gets a new folder below `folder`, and leaves nothing there."""
    sys.path.insert(0, str(ROOT))
    logging.disable(logging.CRITICAL)
    from tests.support.hostile_checkpoints import ATTACKS, prepare

    prepare(folder)
    outcomes = {}
    for number, name in enumerate(names):
        own = folder / str(number)
        own.mkdir()
        outcome = measure(ATTACKS[name].make(own))
        outcomes[name] = dataclasses.asdict(outcome) | {"sentence": outcome.sentence.replace(str(own), "")}
        left = sorted(str(path.relative_to(own)) for path in own.glob("out/*") if path.name != ".convert.lock")
        outcomes[name]["left"] = left
        shutil.rmtree(own)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
