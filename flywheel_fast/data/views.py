"""What the views of an image are: settings that every reader goes by."""

import math
from dataclasses import dataclass, replace
from typing import Literal

BLUR_SIGMA = (0.1, 2.0)  # pixels


@dataclass(frozen=True)
class ViewsConfig:
    image_size: int | None = 32
    """Height and width that the networks see, pixels. This, crop_pct, mean and std may be null: as the main network saw
    pictures when its weights were trained; what was taken stands in the run's config.yaml."""
    crop: Literal["pad", "resized"] = "pad"
    """Random crop of the weak view: a shift of the whole image, mirrored at its borders; or a random part resized."""
    pad: int = 4
    """Greatest shift of crop=pad, pixels; 0: none."""
    area: float = 0.3
    """Smallest part of crop=resized, a share of the image's area."""
    crop_pct: float | None = 0.875
    """Of crop=resized: side of the clean view, cut from the middle, as a share of the picture's shorter side."""
    flip: bool = True
    """Mirror half of the images."""
    strong: Literal["jitter", "randaugment"] = "jitter"
    """What strong views add to the weak one first: a change of brightness, contrast, saturation; or RandAugment."""
    jitter: float = 0.4
    """Greatest relative change of brightness, contrast and saturation."""
    grey: float = 0.0
    """Share of the strong views that lose their colours."""
    blur: float = 0.0
    """Share of the strong views that are blurred, by a Gaussian of 0.1 to 2 pixels in a window of a tenth of the side
    (Chen et al. 2020: SimCLR takes 0.2 grey, 0.5 blurred)."""
    cutout: float = 0.4
    """Side of the square that strong views lose, a share of the image's; 0: none."""
    mean: tuple[float, float, float] | None = (127.5, 127.5, 127.5)
    """Subtracted from the channels (0 to 255)."""
    std: tuple[float, float, float] | None = (64.0, 64.0, 64.0)
    """The channels are divided by this."""

    def __post_init__(self):
        if self.image_size is not None and self.image_size < 8:
            raise ValueError(f"views.image_size must be at least 8 pixels, not {self.image_size}")
        if not 0 <= self.pad < (self.image_size or math.inf) or not 0 < self.area <= 1:
            raise ValueError(
                f"views.pad must be in [0, image_size) and views.area in (0, 1], not {self.pad}, {self.area}"
            )
        for name in ("jitter", "grey", "blur", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"views.{name} must be in [0, 1], not {getattr(self, name)}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"views.crop_pct must be in (0, 1], not {self.crop_pct}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"views.std must be positive, not {list(self.std)}")

    def filled(self, known: dict) -> "ViewsConfig":
        """With `known` in place of what is null."""
        return replace(self, **{name: value for name, value in known.items() if getattr(self, name) is None})

    @property
    def blur_window(self) -> int:  # pixels, odd
        return max(3, self.image_size // 10 | 1)

    @property
    def resized(self) -> int:  # pixels
        """The shorter side, before the clean view is cut from the middle."""
        return self.image_size if self.crop == "pad" else round(self.image_size / self.crop_pct)
