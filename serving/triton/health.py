"""Tells a Triton that has failed from one that is slow.

`Health.look` is called twice a second. It takes Triton for failed where

- a process, or a thread of this process that serves it, has ended (at once);
- a process stands still under SIGSTOP for 2.5 s;
- a process has held three quarters of the memory that it may have for 5 s: it seldom gives any back, and requests fail
  for lack of it here and there;
- a model answers wrongly, three times in a row, a second apart;
- a model does not answer for 3 s in which nothing works on it;
- a model does not answer for a minute, whatever works.

A model is asked once a second for something that it must refuse: the refusal has come through tritonserver, the Python
stub, this process's side of the proxy and the callable. Nothing works where, at every look of the 3 s, no thread of
Triton runs or waits for a processor or a disk, and Triton has used next to no processor time. A look does not count
where this process is the slow one: where the look comes late, or its own event loops have not answered since the last
look. Nor does it where tritonserver takes no connections: it finishes what it has, and ends, because somebody has sent
it SIGTERM.
"""

from __future__ import annotations

import json
import socket
import time

from serving.triton.instance import MEMORY_LIMIT, TritonInstance
from serving.triton.process import has_busy_thread, status

LOOK_S = 0.5
_ASK_LOOKS = 2  # from one question to the next
_STOPPED_LOOKS = 5
_FULL_LOOKS = 10
_WRONG_ANSWERS = 3
_IDLE_LOOKS = 6
_SILENT_LOOKS = 120
_IDLE_CPU_S = 0.03  # of all Triton's processes between two looks
_FULL = MEMORY_LIMIT * 3 // 4  # bytes
_CONNECT_TIMEOUT_S = 0.2  # of this machine's own address, which takes a millisecond


class Question:
    """A request that a model must refuse: to stop a request that is not running. It runs nothing."""

    def __init__(self, address: str, port: int, model: str) -> None:
        self.num_wrong = 0  # wrong answers in a row
        self.is_pending = False
        self._place = (address, port)
        self._socket: socket.socket | None = None
        self._answer = b""
        body = json.dumps({"request_id": "", "stop": True})
        self._request = (
            f"POST /v2/models/{model}/generate HTTP/1.1\r\nHost: {address}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        ).encode()

    def ask(self) -> None:
        """Send the request, on the last connection where there is one."""
        self._answer, self.is_pending = b"", True
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._place, _CONNECT_TIMEOUT_S)
                self._socket.setblocking(False)
            self._socket.sendall(self._request)
        except OSError:
            self.close()

    def look(self) -> None:
        """Take the answer if it has come. A connection that broke gives none; the next look asks again."""
        if self._socket is None:
            self.ask()
            return
        try:
            part = self._socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        self._answer += part
        end = b"\r\n0\r\n\r\n" if b"chunked\r\n" in self._answer else b"}"  # of a body that is one JSON object
        if not part:
            self.close()
        elif self._answer.endswith(end):
            self.is_pending = False
            self.num_wrong = 0 if b"BadRequest: " in self._answer else self.num_wrong + 1

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Health:
    """Watches one TritonInstance."""

    def __init__(self, instance: TritonInstance) -> None:
        assert instance.process is not None
        self.instance = instance
        self.process = instance.process
        flags = instance.flags
        self._questions = [Question(flags.local_address, flags.http_port, m.model_name) for m in instance.models]
        self._num_looks = self._num_full = self._num_stopped = self._num_idle = self._num_silent = 0
        self._looked_at = time.monotonic()
        self._cpu_s = self._used_s = 0.0  # of Triton's processes: so far, since the last look
        self._heard: set[int] = set()  # loops that have answered since the last look

    def look(self) -> str | None:
        """What has failed, as a sentence; None where nothing has."""
        now = time.monotonic()
        is_late, self._looked_at = now - self._looked_at > 2 * LOOK_S, now
        self._num_looks += 1
        return self._look_at_processes() or self._look_at_answers(is_late)

    def close(self) -> None:
        """Close the connections."""
        for question in self._questions:
            question.close()

    def _look_at_processes(self) -> str | None:
        found = {pid: status(pid) for pid in self.process.pids}
        for pid, seen in found.items():
            name = "tritonserver" if pid == self.process.pid else "a Python stub"
            if seen is None or seen.state in "ZX":
                code = self.process.exit_code() if pid == self.process.pid else None
                return f"{name} ended" + (f" with code {code}" if code is not None else "")
        states = [seen.state for seen in found.values() if seen is not None]
        self._num_stopped = self._num_stopped + 1 if {"T", "t"} & set(states) else 0
        if self._num_stopped >= _STOPPED_LOOKS:
            return "a process was stopped by a signal"
        is_full = any(seen is not None and seen.memory > _FULL for seen in found.values())
        self._num_full = self._num_full + 1 if is_full else 0
        if self._num_full >= _FULL_LOOKS:
            return "the memory that it may have is nearly used up"
        if not self.instance.has_all_threads:
            return "a thread of its proxy ended"
        cpu_s = sum(seen.cpu_s for seen in found.values() if seen is not None)
        self._used_s, self._cpu_s = cpu_s - self._cpu_s, cpu_s
        return None

    def _look_at_answers(self, is_late: bool) -> str | None:
        for question in self._questions:
            if question.is_pending:
                question.look()
        if any(question.num_wrong >= _WRONG_ANSWERS for question in self._questions):
            return "a model answered wrongly"
        if not any(question.is_pending for question in self._questions):
            self._num_idle = self._num_silent = 0
            if self._num_looks % _ASK_LOOKS == 0:
                for question in self._questions:
                    question.ask()
            self._call_loops()
            return None
        counts = self._loops_answered() and not is_late and self.instance.flags.is_listening()
        self._call_loops()
        if not counts:
            self._num_idle = 0
            return None
        self._num_silent += 1
        is_idle = self._used_s <= _IDLE_CPU_S and not any(map(has_busy_thread, self.process.pids))
        self._num_idle = self._num_idle + 1 if is_idle else 0
        if self._num_idle >= _IDLE_LOOKS:
            return f"no answer for {self._num_idle * LOOK_S:g} s, and nothing works on one"
        if self._num_silent >= _SILENT_LOOKS:
            return f"no answer for {self._num_silent * LOOK_S:g} s"
        return None

    def _call_loops(self) -> None:
        heard = self._heard = set()
        for index, loop in enumerate(self.instance.loops):
            loop.call_soon_threadsafe(heard.add, index)

    def _loops_answered(self) -> bool:
        return len(self._heard) == len(self.instance.loops)
