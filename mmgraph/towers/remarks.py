"""Remarks on the images of a store's shard, such as ``transparent``, as text in the metadata of the shard's file.

They are not in the tensor ``causes``: to older versions, each value there other than 0 is an incomplete image.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from mmgraph.data.images import FIRST_REMARK, IMAGE_STATUS


def take_remarks(image_status: torch.Tensor) -> str:
    """Set the remarks in (K,) uint8 image statuses to 0, in place, and return them as JSON."""
    remarks = {
        IMAGE_STATUS[status]: (image_status == status).nonzero().flatten().tolist()
        for status in range(FIRST_REMARK, len(IMAGE_STATUS))
    }
    image_status[image_status >= FIRST_REMARK] = 0
    return json.dumps(remarks)


def lacks_remarks(files: Iterable[Path]) -> bool:
    """Return whether an older version, which counted no remarks, wrote some of these image shards."""
    for file in files:
        with safe_open(file, "pt") as shard:
            if "remarks" not in (shard.metadata() or {}):
                return True
    return False


def with_remarks(image_status: torch.Tensor, remarks: str) -> torch.Tensor:
    """Return a copy of (K,) uint8 image statuses with the remarks that :func:`take_remarks` returned.

    Raises:
        ValueError: the remarks are damaged.
    """
    image_status = image_status.clone()
    try:
        for name, entries in json.loads(remarks).items():
            if name in IMAGE_STATUS:  # else a remark of a newer version
                image_status[torch.tensor(entries, dtype=torch.int64)] = IMAGE_STATUS.index(name)
    except (AttributeError, TypeError, IndexError, RuntimeError, RecursionError) as error:
        raise ValueError(f"invalid remarks on images: {error}") from None
    return image_status
