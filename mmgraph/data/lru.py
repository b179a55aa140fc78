"""A least-recently-used (LRU) cache for several threads."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import count
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

SHARDS = 16
# Each shard number has a lock, which all caches share. No lock is held while a value is read. A fork first acquires all
# locks. Otherwise the child could inherit a lock that another thread holds and that nothing would release, or an entry
# that another thread has moved only in part.
_locks = [threading.Lock() for _ in range(SHARDS)]


def _acquire_all() -> None:
    for lock in _locks:
        lock.acquire()


def _release_all() -> None:
    for lock in _locks:
        lock.release()


os.register_at_fork(before=_acquire_all, after_in_parent=_release_all, after_in_child=_release_all)


class ShardedLRU(Generic[Value]):
    """Stores the ``capacity`` most recently used entries of all shards together. A pickled cache is empty.

    The hash of a key selects its shard, so threads rarely wait for each other. A use of an entry gives it the next
    number of a counter. A full cache drops the entry with the lowest number in all shards, so the order is that of a
    single LRU list. cachetools is not used, because its caches have no locks and pickle all of their entries.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._clock = count()
        self._shards: list[OrderedDict[Hashable, tuple[int, Value]]] = [OrderedDict() for _ in range(SHARDS)]

    def get(self, key: Hashable, read: Callable[[], Value]) -> Value:
        """Return the value of ``key``. On a miss, call ``read()`` without holding a lock, and store its result."""
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
            if self._shards[number] and len(self) > self.capacity:  # another thread may have dropped an entry since
                self._shards[number].popitem(last=False)

    def _oldest_use(self, number: int) -> float:
        with _locks[number]:
            return next(iter(self._shards[number].values()))[0] if self._shards[number] else float("inf")

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def __reduce__(self) -> tuple[type["ShardedLRU[Any]"], tuple[int]]:
        return ShardedLRU, (self.capacity,)
