"""Values on their way from the device to the host."""

import torch


class HostCopy:
    """A copy of some values on the host, started without waiting for the device.

    On CUDA the values go to pinned memory, and an event on the same stream marks the end of the copy; reading waits for
    that event alone. A plain ``.tolist()`` would wait for everything queued on the stream, later steps included.

    Args:
        values: a tensor on any device.
    """

    def __init__(self, values: torch.Tensor):
        self._values, self._copied = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tolist(self) -> list[float]:
        """The values, once they are on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
