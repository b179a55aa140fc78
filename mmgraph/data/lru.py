"""A least-recently-used cache that threads can share."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import count
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

_caches: "weakref.WeakSet[ShardedLRU[Any]]" = weakref.WeakSet()


class ShardedLRU(Generic[Value]):
    """Keeps the ``capacity`` entries used last, over all its shards together.

    An entry belongs to a shard by the hash of its key; each shard has a lock and an order of use of its own, so that
    threads rarely wait for each other. Every use is numbered, and the entry that goes is the oldest of the shards'
    oldest: exactly the one that a single list would drop. A copy in another process (fork or pickle) has its own locks;
    a pickled one starts empty.
    """

    def __init__(self, capacity: int, shards: int = 16):
        self.capacity = capacity
        self.shards = max(1, min(shards, capacity))
        self._reset()
        _caches.add(self)

    def get(self, key: Hashable, read: Callable[[], Value]) -> Value:
        """The value of ``key``; on a miss ``read()`` makes it, outside of any lock."""
        lock, entries = self._shards[hash(key) % self.shards]
        with lock:
            if key in entries:
                value = entries.pop(key)[1]
                entries[key] = (next(self._clock), value)  # pop and set: to the end of the order
                return value
        value = read()
        if self.capacity:
            with lock:
                entries.pop(key, None)
                entries[key] = (next(self._clock), value)
            while len(self) > self.capacity:
                self._drop_oldest()
        return value

    def __len__(self) -> int:
        return sum(len(entries) for _, entries in self._shards)

    def _drop_oldest(self) -> None:
        oldest = min(self._shards, key=self._last_use_of_oldest)
        with oldest[0]:
            if oldest[1] and len(self) > self.capacity:  # another thread may have been here first
                oldest[1].popitem(last=False)

    @staticmethod
    def _last_use_of_oldest(shard: tuple[Any, OrderedDict[Hashable, tuple[int, Any]]]) -> float:
        lock, entries = shard
        with lock:
            return next(iter(entries.values()))[0] if entries else float("inf")

    def _reset(self) -> None:
        self._clock = count()
        self._shards: list[tuple[Any, OrderedDict[Hashable, tuple[int, Value]]]] = [
            (threading.Lock(), OrderedDict()) for _ in range(self.shards)
        ]

    def _renew_locks(self) -> None:
        self._shards = [(threading.Lock(), entries) for _, entries in self._shards]

    def __getstate__(self) -> dict[str, int]:
        return {"capacity": self.capacity, "shards": self.shards}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _renew_locks_after_fork() -> None:
    for cache in list(_caches):
        cache._renew_locks()  # a thread of the parent may have held one


os.register_at_fork(after_in_child=_renew_locks_after_fork)
