"""Copies between host and device that do not make the host wait for the device."""

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device. The host does not wait for work that is queued on the device.

    On CUDA, the copy goes through pinned memory. A copy from other memory would wait for the current stream. On the
    CPU, the tensor shares the array's memory.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """Copies a tensor to the host. The host waits for the device only when the values are read.

    On CUDA, the copy goes to pinned memory, and an event on the current stream marks the end of the copy.
    :meth:`tolist` waits only for this event. A plain ``values.tolist()`` would wait for all work queued on the stream,
    including later steps.

    Args:
        values: tensor on any device.
    """

    def __init__(self, values: torch.Tensor):
        self._values, self._copied = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tolist(self) -> list[float]:
        """Wait until the values are on the host, and return them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
