"""A device without a GPU: torch's meta device under FakeTensorMode, and a mode that refuses what would block the host.

A tensor on this device has a shape and a dtype, but no values. FakeTensorMode raises if an operator mixes devices. The
mode :class:`Unblocked` also raises at each operator that would make the host wait for a GPU: reading a value, an output
whose shape depends on values, and copies between host and device.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
READS_VALUES = {"_local_scalar_dense", "equal", "is_nonzero", "item"}
SHAPE_DEPENDS_ON_VALUES = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
TAKES_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class BlockedError(AssertionError):
    """An operator would make the host wait for the device, or works on the host."""


class Unblocked(TorchDispatchMode):
    """Refuses operators that would make the host wait for the device.

    One copy is allowed: from the host to the device with ``non_blocking=True``. Whether its memory is pinned cannot be
    seen without a GPU.
    """

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        name = operator.overloadpacket.__name__
        inputs = _tensors((arguments, keywords))
        if name in READS_VALUES:
            raise BlockedError(f"{operator} reads a value from the device")
        if name in SHAPE_DEPENDS_ON_VALUES or (name == "repeat_interleave" and "output_size" not in keywords):
            raise BlockedError(f"the shape of the output of {operator} depends on values")
        indices = _tensors(arguments[1]) if name in TAKES_INDICES else []
        if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in indices):
            raise BlockedError(f"{operator} counts the true values of a boolean index")
        output = operator(*arguments, **keywords)
        if name == "lift_fresh" or operator.namespace == "prim":
            return output  # an array becomes a tensor on the host, or a property is read; the tensor's use is checked
        uploads = name == "_to_copy" and keywords.get("non_blocking") and keywords.get("device") == DEVICE
        tensors = [*([] if uploads else inputs), *_tensors(output)]
        # torch.utils.checkpoint makes an empty tensor on the host.
        on_host = [tensor for tensor in tensors if tensor.device != DEVICE and tensor.numel()]
        if on_host:
            raise BlockedError(f"{operator} has a tensor on {on_host[0].device}, of shape {tuple(on_host[0].shape)}")
        return output


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Unblocked]]:
    """Make tensors on :data:`DEVICE` usable, and yield a function that returns the mode for the code under test.

    Build inputs and modules outside of :class:`Unblocked`, and run the code under test inside it.
    """
    # Autocast does not know the meta device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with FakeTensorMode():
        yield Unblocked
