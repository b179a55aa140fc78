"""CLIP's image preprocessing."""

from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from mmgraph.errors import UserError
from mmgraph.utils.device_copies import to_device


class Preprocessing:
    """CLIP's preprocessing with the settings of a Hugging Face CLIP image processor (or CLIP processor).

    It has two steps, so that caches can store uint8: :meth:`resize` returns (3, S, S) uint8, and :meth:`normalize`
    returns float32. The result equals that of transformers' torchvision processor, and differs by at most 0.03 from
    that of transformers' Pillow processor.

    Args:
        processor: a Hugging Face CLIP image processor, or a CLIP processor that contains one.

    Raises:
        UserError: the processor does not do a bicubic resize of the short side, followed by a square center crop that
            is at most as large as the resized short side.
    """

    def __init__(self, processor: Any):
        processor = getattr(processor, "image_processor", processor)
        try:
            self.short_side = int(processor.size["shortest_edge"])
            self.crop = int(processor.crop_size["height"])
            is_clip = processor.resample == 3 and processor.crop_size["width"] == self.crop <= self.short_side
            mean, std = processor.image_mean, processor.image_std
        except (AttributeError, KeyError, TypeError):
            is_clip = False
        if not is_clip:
            raise UserError(
                f"{type(processor).__name__} does not have CLIP's preprocessing (bicubic resize of the short side, "
                "square center crop); use CLIP towers with this preprocessing"
            )
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def fits(self, picture: torch.Tensor) -> bool:
        """Return whether the image stays within Pillow's pixel limit after the resize. A 1 x 20,000 image does not."""
        height, width = picture.shape[1:]
        resized = self.short_side**2 * max(height, width) / min(height, width)
        return Image.MAX_IMAGE_PIXELS is None or resized <= Image.MAX_IMAGE_PIXELS

    def resize(self, picture: torch.Tensor) -> torch.Tensor:
        """Resize the short side and crop the center: (3, H, W) uint8 -> (3, S, S) uint8."""
        picture = transforms.resize(picture, [self.short_side], InterpolationMode.BICUBIC, antialias=True)
        # torchvision's center_crop is not used, because it does not always round the offsets down.
        top, left = ((side - self.crop) // 2 for side in picture.shape[1:])
        return picture[:, top : top + self.crop, left : left + self.crop].contiguous()

    def normalize(self, pictures: torch.Tensor) -> torch.Tensor:
        """Convert (N, 3, S, S) uint8 to float32 with mean 0 and standard deviation 1 over CLIP's training images."""
        mean, std = (to_device(tensor.numpy(), pictures.device) for tensor in (self.mean, self.std))
        return (pictures.float() / 255 - mean) / std
