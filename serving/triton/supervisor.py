"""Keeps a Triton running in front of the engine: starts it, watches it, starts another one when it fails, ends it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from serving.triton.frontend import TritonFlags, TritonModel

if TYPE_CHECKING:  # imported late: PyTriton takes a second
    from serving.triton.instance import TritonInstance

_LOG = logging.getLogger("serving")
_FIRST_TRIES = 3  # at the server's start; PyTriton's hand-shake socket loses a race now and then
_DRAIN_NOTICE_S = 1.0  # who ends tritonserver (Slurm does) may be about to end this process, too
_REFUSE_TIMEOUT_S = 1.0  # tritonserver stops listening some 10 ms after SIGTERM
_EXIT_TIMEOUT_S = 15.0  # for tritonserver to send its last answers and to end
_WINDOW_S = 60.0
_RESTARTS_AT_ONCE = 2  # within the window; later ones wait
_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 15.0  # the longest lets three restarts fall into the window


class Backoff:
    """How long to wait before each restart."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._wait_s = 0.0

    def wait_s(self, now: float) -> float:
        """Seconds to wait before the restart that is due now: 0 for the first two within a minute."""
        self._times = [*(t for t in self._times if now - t < _WINDOW_S), now]
        if len(self._times) <= _RESTARTS_AT_ONCE:
            self._wait_s = 0.0
        else:
            self._wait_s = min(max(_FIRST_WAIT_S, 2 * self._wait_s), _LONGEST_WAIT_S)
        return self._wait_s

    @property
    def is_waiting(self) -> bool:
        """Whether the last restart had to wait."""
        return self._wait_s > 0


class TritonSupervisor:
    """The front end of Triton. Its thread starts every tritonserver, which ends with the thread that started it."""

    def __init__(
        self,
        flags: TritonFlags,
        models: Sequence[TritonModel],
        verbose: bool,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self.flags = flags
        self.models = models
        self.verbose = verbose
        self.num_restarts = 0
        self._on_restart = on_restart
        self._instance: TritonInstance | None = None
        self._is_ending = threading.Event()  # no restarts any more
        self._may_end = threading.Event()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="triton supervisor", daemon=True)
        self._closing: list[threading.Thread] = []

    @property
    def urls(self) -> list[str]:
        """Where clients find it."""
        flags = self.flags
        host = socket.gethostname() if flags.http_address == "0.0.0.0" else flags.http_address
        grpc = "grpcs" if flags.grpc_certfile else "grpc"
        return [f"http://{host}:{flags.http_port}", f"{grpc}://{host}:{flags.grpc_port}"]

    def start(self) -> None:
        """Start Triton, and the thread that watches it. Raises RuntimeError where Triton does not start."""
        self._thread.start()
        self._started.result()

    def refuse(self) -> None:
        """Let Triton take no new connections, and finish what it has; returns once it refuses them."""
        self._is_ending.set()
        process = self._instance.process if self._instance is not None else None
        if process is None:
            return
        process.terminate()
        deadline = time.monotonic() + _REFUSE_TIMEOUT_S
        while self.flags.is_listening() and time.monotonic() < deadline:
            time.sleep(0.01)

    def stop(self) -> None:
        """End Triton once it has sent what it has, at the latest after 15 s."""
        self.refuse()
        self._may_end.set()
        self._thread.join()
        for thread in self._closing:
            thread.join(_EXIT_TIMEOUT_S)

    def kill(self) -> None:
        """End Triton now, from any thread."""
        self._is_ending.set()
        if self._instance is not None:
            self._instance.kill()
        self._may_end.set()

    def _run(self) -> None:
        try:
            self._instance = self._first_start()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        backoff = Backoff()
        while not self._is_ending.is_set():
            trouble = self._watch(self._instance)
            if trouble is not None:
                _LOG.error("Triton failed (%s): what came through it is cancelled, another one is started", trouble)
                self._replace(backoff)
        self._may_end.wait()
        if self._instance is not None:
            assert self._instance.process is not None
            if not self._instance.process.wait(_EXIT_TIMEOUT_S):
                _LOG.warning("tritonserver did not end within %g s and is killed", _EXIT_TIMEOUT_S)
            self._instance.kill()
            self._instance.close()

    def _first_start(self) -> TritonInstance:
        for attempt in range(1, _FIRST_TRIES + 1):
            try:
                return self._start_instance()
            except Exception as error:  # PyTriton raises many kinds; the last one is the user's
                if attempt == _FIRST_TRIES:
                    raise RuntimeError(f"Triton did not start: {_sentence(error)}") from error
                _LOG.warning("Triton did not start (try %d of %d), once more", attempt, _FIRST_TRIES)
        raise AssertionError("the last try returns or raises")

    def _start_instance(self) -> TritonInstance:
        from serving.triton.instance import HOME, TritonInstance
        from serving.triton.workspace import remove_leftovers, remove_temporary_folders

        count = remove_leftovers(HOME)
        if count:
            _LOG.info("removed the leftovers of %d killed Tritons in %s and /dev/shm", count, HOME)
        remove_temporary_folders()
        return TritonInstance(self.flags, self.models, self.verbose)

    def _watch(self, instance: TritonInstance | None) -> str | None:
        """Wait until Triton fails; returns how, or None where it is to end."""
        from serving.triton.health import LOOK_S, Health

        if instance is None:
            return "it did not start"
        health = Health(instance)
        try:
            while not self._is_ending.wait(LOOK_S):
                trouble = health.look()
                if trouble is not None:
                    return None if self._is_ending.wait(_DRAIN_NOTICE_S) else trouble
        except Exception as error:  # of threads that end just now
            return f"{type(error).__name__}: {_sentence(error)}"
        finally:
            health.close()
        return None

    def _replace(self, backoff: Backoff) -> None:
        """End the instance and start another one, with a wait where this happens often."""
        failed, self._instance = self._instance, None
        began = time.monotonic()
        if failed is not None:
            failed.kill()
            failed.cancel_all()
            # Its threads may have work to end first, such as a prompt's tokens; nobody waits for that.
            closing = threading.Thread(target=failed.close, name="triton closes", daemon=True)
            closing.start()
            self._closing = [*(thread for thread in self._closing if thread.is_alive()), closing]
        was_waiting, wait_s = backoff.is_waiting, backoff.wait_s(began)
        if wait_s and not was_waiting:
            _LOG.error("Triton fails again and again: from now on a restart waits for 5 to 15 s")
        if self._is_ending.wait(wait_s):
            return
        try:
            self._instance = self._start_instance()
        except Exception as error:
            _LOG.error("Triton did not start: %s", _sentence(error))
            return
        self.num_restarts += 1
        self._on_restart()
        _LOG.info("Triton is back after %.1f s", time.monotonic() - began)


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
