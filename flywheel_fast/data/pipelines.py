"""NVIDIA DALI decodes each image once and cuts its views; index and views come out, never targets.

The only importer of nvidia.dali. A pipeline lives for one epoch: its seed is a function of (seed, epoch, rank), its
order comes from `order.epoch_order`, so the same epoch gives the same bytes whatever was drawn before.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flywheel_fast.data.manifest import Manifest
from flywheel_fast.data.order import epoch_order
from flywheel_fast.errors import BadInput

VIEWS = ("clean", "weak", "strong", "strong2")
WHOLE_CROP = 0.875  # with random resized crops, the clean view is this share of the shorter side, as is usual
SWEEP_BATCH = 500


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


class Batch(NamedTuple):
    index: Tensor  # [B] int64
    views: tuple[Tensor, ...]  # each [B, 3, H, W] float32, channels last


class Loader:
    """Batches of one manifest. Images that fit into `cache_gb` are decoded once and stay in memory as uint8."""

    def __init__(
        self,
        manifest: Manifest,
        views: ViewsConfig,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        threads: int = 2,
        cache_gb: float = 2.0,
        rank: int = 0,
        world: int = 1,
    ):
        self.manifest, self.views, self.batch_size, self.seed = manifest, views, batch_size, seed
        self.device, self.threads, self.rank, self.world = torch.device(device), threads, rank, world
        self.cache: np.ndarray | None = None  # [N, H + 2 pad, W + 2 pad, 3] uint8
        if views.crop == "pad" and 3 * (views.image_size + 2 * views.pad) ** 2 * len(manifest) <= cache_gb * 1e9:
            self.cache = self._decode_all()

    def __len__(self) -> int:
        """Batches of an epoch, on this rank."""
        own = len(range(self.rank, len(self.manifest), self.world))
        return -(-own // self.batch_size)

    def epoch(self, epoch: int, views: tuple[str, ...] = ("weak", "strong")) -> Iterator[Batch]:
        """Every sample of this rank once, shuffled; the last batch may be short."""
        order = epoch_order(len(self.manifest), self.seed, epoch, self.rank, self.world)
        seed = int(np.random.SeedSequence((self.seed, epoch, self.rank)).generate_state(1)[0]) & 0x7FFFFFFF
        return self._batches(order, self.batch_size, views, seed)

    def sweep(self) -> Iterator[Batch]:
        """The clean view of every sample of this rank once, in order, in larger batches."""
        return self._batches(np.arange(self.rank, len(self.manifest), self.world), SWEEP_BATCH, ("clean",), seed=0)

    def _batches(self, order: np.ndarray, batch_size: int, views: tuple[str, ...], seed: int) -> Iterator[Batch]:
        pieces = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        drawn = [view for view in views if view != "clean" or self.cache is None]  # by DALI
        outputs = self._run(pieces, drawn, seed) if drawn else ([] for _ in pieces)
        for piece, images in zip(pieces, outputs, strict=True):
            by_name = dict(zip(drawn, images, strict=True))
            if "clean" in views and self.cache is not None:
                by_name["clean"] = self._normalise(self.cache[piece])
            yield Batch(torch.from_numpy(piece).to(self.device), tuple(by_name[view] for view in views))

    def _normalise(self, images: np.ndarray) -> Tensor:
        """[B, H + 2 pad, W + 2 pad, 3] uint8 -> the clean view [B, 3, H, W] float32 on the device."""
        inner = slice(self.views.pad, self.views.pad + self.views.image_size)
        mean, std = (torch.tensor(values, device=self.device) for values in (self.views.mean, self.views.std))
        return ((torch.from_numpy(images[:, inner, inner]).to(self.device) - mean) / std).permute(0, 3, 1, 2)

    def _run(self, pieces: list[np.ndarray], views: list[str], seed: int) -> Iterator[list[Tensor]]:
        """The views of each piece, each [B, 3, H, W]."""

        def read() -> Iterator:
            for piece in pieces:
                yield self.cache[piece] if self.cache is not None else [self._bytes(i) for i in piece]

        pipeline = _views_pipeline(self, max(map(len, pieces)), read, views, seed)
        for piece in pieces:
            try:
                outputs = pipeline.run()
            except RuntimeError as error:
                self._name_broken(piece, error)
                raise
            yield [torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]

    # -- files ---------------------------------------------------------------------------------------------------------

    def _bytes(self, i: int) -> np.ndarray:
        """The encoded image [L] uint8; a file that is gone or cut short is named."""
        path = self.manifest.root / self.manifest.files[i]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(
                f"{path}: cannot be read ({error.strerror}); restore it, or take it out of the data set"
            ) from error
        if not _ends_whole(content) and (reason := _why_broken(content)):
            raise BadInput(_broken(path, reason))
        return np.frombuffer(content, dtype=np.uint8)

    def _name_broken(self, piece: np.ndarray, error: Exception) -> None:
        """DALI says that decoding failed, not which file: ask another decoder."""
        for i in piece:
            path = self.manifest.root / self.manifest.files[i]
            if reason := _why_broken(path.read_bytes()):
                raise BadInput(_broken(path, reason)) from error

    def _decode_all(self) -> np.ndarray:
        """All images [N, H + 2 pad, W + 2 pad, 3] uint8, as `_padded` has them."""
        from rich.progress import track

        size = self.views.image_size + 2 * self.views.pad
        cache = np.empty((len(self.manifest), size, size, 3), np.uint8)
        pieces = np.split(np.arange(len(cache)), range(SWEEP_BATCH, len(cache), SWEEP_BATCH))

        def read() -> Iterator:
            for piece in pieces:
                yield [self._bytes(i) for i in piece]

        pipeline = _decode_pipeline(self, SWEEP_BATCH, read)
        for piece in track(pieces, "decoding", transient=True, disable=len(cache) < 5000):
            try:
                (images,) = pipeline.run()
            except RuntimeError as error:
                self._name_broken(piece, error)
                raise
            cache[piece] = (
                images.as_tensor() if isinstance(images, np.ndarray) else torch.from_dlpack(images.as_tensor()).cpu()
            )
        return cache


def _ends_whole(content: bytes) -> bool:
    """Whether a JPEG or PNG file ends as such a file does: a quick look at each, a long one at the others."""
    return content[:2] == b"\xff\xd8" and b"\xff\xd9" in content[-64:] or content[-8:-4] == b"IEND"


def _why_broken(content: bytes) -> str:
    from PIL import Image

    if not content:
        return "the file is empty"
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except Exception as error:  # every format has its own
        return str(error).replace("<_io.BytesIO object at", "file (").split(" 0x")[0]
    return ""


def _broken(path: Path, reason: str) -> str:
    return f"{path}: is not a whole image ({reason}); replace it, or take it out of the data set"


# -- DALI graphs -------------------------------------------------------------------------------------------------------


def _make(loader: Loader, batch_size: int, read, graph, seed: int):
    """Runs `graph(source)` over the batches of the generator `read`; the batches end with it."""
    from nvidia.dali import fn, pipeline_def

    batches = read()
    on_gpu = loader.device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=loader.threads,
        device_id=loader.device.index or 0 if on_gpu else None,
        seed=seed,
        prefetch_queue_depth=2,
        enable_conditionals=True,  # RandAugment chooses an operation by sample
        exec_dynamic=True,
    )
    def pipeline():
        decoded = loader.cache is not None
        source = fn.external_source(source=batches, batch=True, layout="HWC" if decoded else None)
        return graph(source)

    built = pipeline()
    built.build()
    return built


def _decode(loader: Loader, encoded):
    from nvidia.dali import fn

    return fn.decoders.image(encoded, device="mixed" if loader.device.type == "cuda" else "cpu", hw_decoder_load=0.0)


def _padded(images, config: ViewsConfig):
    """Shorter side resized to image_size, centre cropped, and mirrored at the borders by `pad` pixels.

    Mirrored, not black: E-steps see the clean view, and networks that learnt from black borders misjudge it
    (docs/method.md has the figures).
    """
    from nvidia.dali import fn

    size, pad = config.image_size, config.pad
    images = fn.crop(fn.resize(images, resize_shorter=size), crop=[size, size])
    for axis, flip in ((0, {"horizontal": 0, "vertical": 1}), (1, {"horizontal": 1, "vertical": 0})):
        if pad:
            before = fn.flip(fn.slice(images, start=[1], shape=[pad], axes=[axis]), **flip)
            after = fn.flip(fn.slice(images, start=[size - pad - 1], shape=[pad], axes=[axis]), **flip)
            images = fn.cat(before, images, after, axis=axis)
    return images


def _decode_pipeline(loader: Loader, batch_size: int, read):
    return _make(loader, batch_size, read, lambda encoded: _padded(_decode(loader, encoded), loader.views), seed=0)


def _views_pipeline(loader: Loader, batch_size: int, read, views: list[str], seed: int):
    from nvidia.dali import fn, types

    config, size = loader.views, loader.views.image_size

    def normalise(images, mirror=0):
        return fn.crop_mirror_normalize(
            images,
            crop=[size, size],
            mirror=mirror,
            mean=list(config.mean),
            std=list(config.std),
            output_layout="HWC",  # seen as [B, 3, H, W] this is channels last
            dtype=types.FLOAT,
        )

    def clean(images):
        if config.crop == "resized":
            images = fn.resize(images, resize_shorter=round(size / WHOLE_CROP))
        return normalise(images)

    def cropped(images):
        if config.crop == "resized":
            return fn.random_resized_crop(images, size=[size, size], random_area=[config.area, 1.0])
        if not config.pad:
            return images
        shift = fn.cast(fn.random.uniform(range=[-0.5, 2 * config.pad + 0.5], shape=[2]), dtype=types.INT32)  # rounds
        return fn.slice(images, start=shift, shape=[size, size], axes=[0, 1])

    def flip():
        return fn.random.coin_flip() if config.flip else 0

    def weak(images):
        return normalise(cropped(images), flip())

    def strong(images):
        images = cropped(images)
        if config.strong == "randaugment":
            from nvidia.dali.auto_aug import rand_augment

            images = rand_augment.rand_augment(images, n=2, m=9, fill_value=0)
        elif config.jitter:
            low, high = 1 - config.jitter, 1 + config.jitter
            change = {name: fn.random.uniform(range=[low, high]) for name in ("brightness", "contrast", "saturation")}
            images = fn.color_twist(images, **change)
        if config.cutout:
            anchor = fn.random.uniform(range=[-config.cutout / 2, 1 - config.cutout / 2], shape=[2])
            fill = list(config.mean)
            images = fn.erase(
                images, anchor=anchor, shape=[config.cutout] * 2, normalized=True, axis_names="HW", fill_value=fill
            )
        return normalise(images, flip())

    cut = {"clean": clean, "weak": weak, "strong": strong, "strong2": strong}

    def graph(source):
        if loader.cache is not None:
            images = source.gpu() if loader.device.type == "cuda" else source
        else:
            images = _decode(loader, source)
            images = _padded(images, config) if config.crop == "pad" else images
        return tuple(cut[view](images) for view in views)

    return _make(loader, batch_size, read, graph, seed)
