"""What the views of an image are: settings that every reader goes by."""

from dataclasses import dataclass
from typing import Literal

WHOLE_CROP = 0.875  # with random resized crops, the clean view is this share of the shorter side, as is usual


@dataclass(frozen=True)
class ViewsConfig:
    image_size: int = 32
    """Height and width that the networks see, pixels."""
    crop: Literal["pad", "resized"] = "pad"
    """Random crop of the weak view: a shift of the whole image, mirrored at its borders; or a random part resized."""
    pad: int = 4
    """Greatest shift of crop=pad, pixels; 0: none."""
    area: float = 0.3
    """Smallest part of crop=resized, a share of the image's area."""
    flip: bool = True
    """Mirror half of the images."""
    strong: Literal["jitter", "randaugment"] = "jitter"
    """What strong views add to the weak one, before the cut-out: brightness, contrast, saturation; or RandAugment."""
    jitter: float = 0.4
    """Greatest relative change of brightness, contrast and saturation."""
    cutout: float = 0.4
    """Side of the square that strong views lose, a share of the image's; 0: none."""
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Subtracted from the channels (0 to 255)."""
    std: tuple[float, float, float] = (64.0, 64.0, 64.0)
    """The channels are divided by this."""

    def __post_init__(self):
        if self.image_size < 8:
            raise ValueError(f"views.image_size must be at least 8 pixels, not {self.image_size}")
        if not 0 <= self.pad < self.image_size or not 0 < self.area <= 1:
            raise ValueError(
                f"views.pad must be in [0, image_size) and views.area in (0, 1], not {self.pad}, {self.area}"
            )
        if not 0 <= self.cutout <= 1 or not 0 <= self.jitter <= 1:
            raise ValueError(f"views.cutout and views.jitter must be in [0, 1], not {self.cutout}, {self.jitter}")
        if min(self.std) <= 0:
            raise ValueError(f"views.std must be positive, not {list(self.std)}")
