"""The host's time per step, without a model: schedule and commit, what `--speculative ngram` and the metrics add, and
the pickled plan's bytes. The texts do not repeat themselves, so nothing is drafted: the search for drafts is timed.

    python benchmarks/scheduling.py --sequences 256

Prints a table of the medians over the steps, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.plan import StepOutput
from engine.request import CANCELLED, Request, SamplingParams
from engine.scheduler import Scheduler
from engine.speculation import Speculation
from serving.metrics import ServerMetrics

PROMPT_LEN, STEPS = 64, 500
MAX_DRAFTS, MAX_DRAFT_ROWS = 8, 32  # as on a GPU


def measure(num_sequences: int, speculation: Speculation | None = None) -> dict[str, float]:
    """Medians of the decode steps of `num_sequences` greedy requests that run at once, and of each request's end."""
    rng = random.Random(0)
    scheduler = Scheduler(num_sequences, 2048, 8192, 16, num_sequences * 128)
    scheduler.speculation = speculation
    for index in range(num_sequences):
        scheduler.add(Request([index] * PROMPT_LEN, SamplingParams(STEPS + 10), (0,)))
    metrics = ServerMetrics("model", 2048)
    times: list[float] = []
    metrics_times: list[float] = []
    plan_bytes = 0
    while len(times) < STEPS:
        started = time.perf_counter()
        plan = scheduler.schedule()
        middle = time.perf_counter()
        rows = plan.num_sequences
        output = StepOutput([rng.randrange(1, 10**9) for _ in range(rows)], [-0.5] * rows)
        after = time.perf_counter()
        progress = scheduler.commit(output)
        ended = time.perf_counter()
        metrics.count_plan(plan.num_tokens)
        metrics.count_progress(progress)
        counted = time.perf_counter()
        if not plan.chunks:
            assert rows == num_sequences, rows
            times.append(middle - started + ended - after)
            metrics_times.append(counted - ended)
            plan_bytes = len(pickle.dumps(plan, protocol=pickle.HIGHEST_PROTOCOL))
    return {
        "sequences": num_sequences,
        "schedule_commit_ms": statistics.median(times) * 1e3,
        "metrics_us": statistics.median(metrics_times) * 1e6,
        "metrics_per_request_us": statistics.median(_ends(scheduler, metrics)) * 1e6,
        "plan_bytes": plan_bytes,
    }


def _ends(scheduler: Scheduler, metrics: ServerMetrics) -> list[float]:
    """Seconds to count the end of each request."""
    times = []
    for request in scheduler.unfinished():
        scheduler.cancel(request, CANCELLED)
        started = time.perf_counter()
        metrics.count_finished(request)
        times.append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256, 512])
    flags = parser.parse_args()
    results = []
    for count in flags.sequences:
        with_look = measure(count, Speculation(MAX_DRAFTS, MAX_DRAFT_ROWS))["schedule_commit_ms"]
        results.append(measure(count) | {"with_look_for_drafts_ms": with_look})
    print("sequences  schedule + commit  and look for drafts  metrics per step  per request  pickled plan")
    for result in results:
        print(
            f"{result['sequences']:9}  {result['schedule_commit_ms']:14.3f} ms"
            f"  {result['with_look_for_drafts_ms']:16.3f} ms  {result['metrics_us']:13.1f} µs"
            f"  {result['metrics_per_request_us']:8.1f} µs  {result['plan_bytes']:10} B"
        )
    print(json.dumps({"benchmark": "scheduling", "results": results}))


if __name__ == "__main__":
    main()
