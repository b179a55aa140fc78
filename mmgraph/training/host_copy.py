"""Copies values from the device to the host without blocking the host."""

import torch


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
