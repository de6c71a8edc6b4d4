"""Pillow decodes and torchvision cuts the views, for platforms without DALI: the same views of the same images in the
same order, drawn by other random numbers, and more slowly.
"""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flywheel_fast.data.views import BLUR_SIGMA, ViewsConfig

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "JPEG2000")  # DALI's


def outputs(
    config: ViewsConfig,
    pieces: list[np.ndarray],
    read: Callable,
    views: tuple[str, ...],
    seed: int,
    encoded: bool,
    threads: int,
) -> Iterator[list[Tensor]]:
    """The views of each piece, each [B, 3, H, W] float32, channels last; without views images, each [H, W, 3] uint8.

    `read(piece)` gives files' bytes, each [bytes] uint8, if `encoded`, else images, each [H, W, 3] uint8. Raises
    RuntimeError or OSError where a file cannot be read.
    """
    whole, cut = _transforms(config)

    def ready(content: np.ndarray) -> Tensor:  # [3, H, W] uint8
        image = decode(content) if encoded else torch.from_numpy(content)
        image = image.permute(2, 0, 1)
        return whole(image) if encoded else image

    with ThreadPoolExecutor(threads) as pool:
        under_way = pool.map(ready, read(pieces[0]))
        for number in range(len(pieces)):
            images = list(under_way)
            if number + 1 < len(pieces):  # decoded meanwhile
                under_way = pool.map(ready, read(pieces[number + 1]))
            if not views:
                yield [image.permute(1, 2, 0) for image in images]
                continue
            with torch.random.fork_rng(devices=[]):  # the training's own numbers stay as they are
                torch.manual_seed(seed + number)
                drawn = [torch.stack([cut[view](image) for image in images]) for view in views]
            yield [_normalised(view, config) for view in drawn]


def decode(content: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 of a file's bytes [bytes] uint8: RGB, turned as its EXIF says, the first frame of several.

    Raises RuntimeError.
    """
    try:
        with Image.open(io.BytesIO(content.tobytes()), formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB")))
    except Exception as error:  # every format has its own
        raise RuntimeError(str(error)) from error


def _transforms(config: ViewsConfig) -> tuple[Callable, dict[str, Callable]]:
    """What is done to an image [3, H, W] uint8 once, and then for each view [3, S, S] uint8."""
    from torchvision.transforms import v2

    size, whole = config.image_size, []
    if config.crop == "pad":  # as DALI's: pipelines._padded
        whole = [v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.Pad(config.pad, padding_mode="reflect")]
    if config.crop == "resized":
        clean = [v2.Resize(config.resized, antialias=True), v2.CenterCrop(size)]
        crop = v2.RandomResizedCrop(size, scale=(config.area, 1.0), antialias=True)
    else:
        clean, crop = [v2.CenterCrop(size)], v2.RandomCrop(size)
    weak = [crop, v2.RandomHorizontalFlip(0.5 if config.flip else 0.0)]
    change = v2.ColorJitter(*[config.jitter] * 3)
    if config.strong == "randaugment":
        change = v2.RandAugment(num_ops=2, magnitude=9, fill=0)
    grey = v2.RandomGrayscale(config.grey)
    blur = v2.RandomApply([v2.GaussianBlur(config.blur_window, BLUR_SIGMA)], config.blur)
    strong = v2.Compose([*weak, change, grey, blur, lambda image: _cut_out(image, config)])
    cut = {"clean": v2.Compose(clean), "weak": v2.Compose(weak), "strong": strong, "strong2": strong}
    return v2.Compose([*whole, v2.Identity()]), cut


def _cut_out(image: Tensor, config: ViewsConfig) -> Tensor:  # [3, S, S] uint8
    """Without a square, which may hang over the edge: torchvision's RandomErasing keeps inside."""
    side = config.cutout * config.image_size
    start = torch.rand(2) * config.image_size - side / 2
    (top, left), (bottom, right) = start.round().int().clamp(min=0), (start + side).round().int()
    image = image.clone()
    image[:, top:bottom, left:right] = torch.tensor(config.mean).round().to(torch.uint8)[:, None, None]
    return image


def _normalised(images: Tensor, config: ViewsConfig) -> Tensor:  # [B, 3, H, W] uint8 -> float32
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
