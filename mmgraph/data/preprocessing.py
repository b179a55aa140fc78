"""CLIP's image preprocessing."""

from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from mmgraph.errors import UserError


class Preprocessing:
    """CLIP's preprocessing with the settings of a Hugging Face CLIP image processor (or CLIP processor).

    Split in two so that caches can hold bytes: :meth:`resize` gives (3, S, S) uint8, :meth:`normalize` float32. Equal
    to transformers' torchvision processor; within 0.03 of its Pillow one.

    Raises:
        UserError: the processor does something else than resize the short side, crop the centre and normalise.
    """

    def __init__(self, processor: Any):
        processor = getattr(processor, "image_processor", processor)
        try:
            self.short_side = int(processor.size["shortest_edge"])
            self.crop = int(processor.crop_size["height"])
            usual = processor.resample == 3 and processor.crop_size["width"] == self.crop <= self.short_side
            mean, std = processor.image_mean, processor.image_std
        except (AttributeError, KeyError, TypeError):
            usual = False
        if not usual:
            raise UserError(
                f"{type(processor).__name__} is not CLIP's preprocessing (bicubic resize of the short side, square "
                "centre crop); use towers that have it"
            )
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def fits(self, picture: torch.Tensor) -> bool:
        """Whether a picture's resize stays below Pillow's limit of pixels; of one that is 1 x 20,000 it would not."""
        height, width = picture.shape[1:]
        resized = self.short_side**2 * max(height, width) / min(height, width)
        return Image.MAX_IMAGE_PIXELS is None or resized <= Image.MAX_IMAGE_PIXELS

    def resize(self, picture: torch.Tensor) -> torch.Tensor:
        """(3, H, W) uint8 -> (3, S, S) uint8."""
        picture = transforms.resize(picture, [self.short_side], InterpolationMode.BICUBIC, antialias=True)
        top, left = ((side - self.crop) // 2 for side in picture.shape[1:])  # torchvision's own crop rounds up
        return picture[:, top : top + self.crop, left : left + self.crop].contiguous()

    def normalize(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) uint8 -> float32, mean 0 and deviation 1 over CLIP's training images."""
        device = pictures.device
        return (pictures.float() / 255 - self.mean.to(device)) / self.std.to(device)
