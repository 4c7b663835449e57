"""The queue of requests that wait for their slots: those who ask take turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import zip_longest
from typing import Any

from engine.request import Request


class WaitingQueue(Collection[Request]):
    """Waiting requests by origin (Request.origin). Origins take turns; of one origin, first come, first served.

    A new origin's turn comes after those that wait already, and an origin whose request was taken goes behind all
    others. So an origin waits for at most one request of each other one, however many they have. Requests that were put
    back come before all others, the latest first.

    Every call takes constant time, and iterating linear time. `len` may be asked from any thread.
    """

    def __init__(self) -> None:
        self._by_origin: OrderedDict[Any, OrderedDict[Request, None]] = OrderedDict()  # in the order of turns
        self._put_back: OrderedDict[Request, None] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, request: object) -> bool:
        if not isinstance(request, Request):
            return False
        return request in self._put_back or request in self._by_origin.get(_origin(request), ())

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they would be taken."""
        yield from self._put_back
        for one_of_each in zip_longest(*self._by_origin.values()):
            yield from (request for request in one_of_each if request is not None)

    @property
    def first(self) -> Request:
        """The request whose turn it is. The queue must not be empty."""
        return next(iter(self._put_back or next(iter(self._by_origin.values()))))

    def add(self, request: Request) -> None:
        """Let a request wait behind those of its origin."""
        self._by_origin.setdefault(_origin(request), OrderedDict())[request] = None
        self._count += 1

    def put_back(self, request: Request) -> None:
        """Let a request that was taken wait before all others."""
        self._put_back[request] = None
        self._put_back.move_to_end(request, last=False)
        self._count += 1

    def take(self, request: Request) -> None:
        """Remove a waiting request that runs now: its origin has had its turn."""
        had_turn = request in self._put_back
        self.remove(request)
        if not had_turn and _origin(request) in self._by_origin:
            self._by_origin.move_to_end(_origin(request))

    def remove(self, request: Request) -> None:
        """Remove a waiting request."""
        if request in self._put_back:
            del self._put_back[request]
            self._count -= 1
            return
        requests = self._by_origin[_origin(request)]
        del requests[request]
        self._count -= 1
        if not requests:
            del self._by_origin[_origin(request)]


def _origin(request: Request) -> Any:
    return request if request.origin is None else request.origin
