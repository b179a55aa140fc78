"""A least-recently-used cache that threads can share."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import count
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

SHARDS = 16
# One of each shard, of all caches; never held while a value is made. A fork waits for them: in the child no thread
# would release them, and an entry might be half moved.
_locks = [threading.Lock() for _ in range(SHARDS)]


def _acquire_all() -> None:
    for lock in _locks:
        lock.acquire()


def _release_all() -> None:
    for lock in _locks:
        lock.release()


os.register_at_fork(before=_acquire_all, after_in_parent=_release_all, after_in_child=_release_all)


class ShardedLRU(Generic[Value]):
    """Keeps the ``capacity`` entries used last, over all its shards together. A pickled cache starts empty.

    An entry belongs to a shard by the hash of its key, so that threads rarely wait for each other. Every use is
    numbered, and the entry that goes is the oldest of the shards' oldest: the one that a single list would drop.
    Written here because cachetools has one list, without locks, and forks and pickles with what it holds.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._clock = count()
        self._shards: list[OrderedDict[Hashable, tuple[int, Value]]] = [OrderedDict() for _ in range(SHARDS)]

    def get(self, key: Hashable, read: Callable[[], Value]) -> Value:
        """The value of ``key``; on a miss ``read()`` makes it, outside of any lock."""
        number = hash(key) % SHARDS
        with _locks[number]:
            if key in self._shards[number]:
                return self._use(number, key, self._shards[number][key][1])
        value = read()
        if self.capacity:
            with _locks[number]:
                self._use(number, key, value)
            while len(self) > self.capacity:
                self._drop_oldest()
        return value

    def _use(self, number: int, key: Hashable, value: Value) -> Value:
        self._shards[number][key] = next(self._clock), value
        self._shards[number].move_to_end(key)
        return value

    def _drop_oldest(self) -> None:
        number = min(range(SHARDS), key=self._oldest_use)
        with _locks[number]:
            if self._shards[number] and len(self) > self.capacity:  # another thread may have been here first
                self._shards[number].popitem(last=False)

    def _oldest_use(self, number: int) -> float:
        with _locks[number]:
            return next(iter(self._shards[number].values()))[0] if self._shards[number] else float("inf")

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def __reduce__(self) -> tuple[type["ShardedLRU[Any]"], tuple[int]]:
        return ShardedLRU, (self.capacity,)
