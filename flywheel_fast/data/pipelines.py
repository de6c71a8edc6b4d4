"""NVIDIA DALI decodes each image once and cuts its views; index and views come out, never targets.

The only importer of nvidia.dali; where that is not installed, `plain` does its work. A graph is described once; a
pipeline made of it lives for CHUNK batches: its seed is a function of (seed, epoch, rank, chunk), its order comes from
`order.epoch_order`, so a batch has the same bytes whatever was drawn before, and wherever its epoch is entered.
"""

import io
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flywheel_fast.data import plain
from flywheel_fast.data.manifest import DROPPED, Manifest
from flywheel_fast.data.memory import Memory, needed, size_text
from flywheel_fast.data.order import balanced_order, epoch_order
from flywheel_fast.data.views import BLUR_SIGMA, ViewsConfig
from flywheel_fast.errors import BadInput

TRANSLATION = 150 / 331  # RandAugment's greatest shift, a share of the image's side (Cubuk et al. 2020)
SWEEP_BATCH = 500  # small images
DECODE_BATCH = 64  # photographs of 12 megapixels take 2 GB then
SCAN_BATCH = 16  # DALI 2.x dies of a segmentation fault where many of a larger batch are broken: of 32, eight suffice
AHEAD = 2  # batches under way in DALI
CHUNK = 256  # batches; an epoch that is entered in the middle draws the earlier ones of its chunk again
MOST_BROKEN = 100  # files looked for, once one is found


def has_dali() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


class Batch(NamedTuple):
    index: Tensor  # [B] int64
    views: tuple[Tensor, ...]  # each [B, 3, H, W] float32, channels last


class Loader:
    """Batches of one manifest, without what a review dropped: of each batch, the part of process `rank` of `world`.
    Images stay decoded on the device if `memory` has room there, else decoded in host memory, else as files in it;
    `kept` says what became of it."""

    def __init__(
        self,
        manifest: Manifest,
        views: ViewsConfig,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        threads: int = 2,
        memory: Memory | None = None,
        rank: int = 0,
        world: int = 1,
        balanced_batches: int | None = None,
    ):
        self.manifest, self.views, self.batch_size, self.seed = manifest, views, batch_size, seed
        self.reader = "DALI" if has_dali() else "torchvision"
        self.device, self.threads, self.rank, self.world = torch.device(device), threads, rank, world
        everything = np.arange(len(manifest))
        self.used = everything if manifest.reviewed is None else everything[manifest.reviewed != DROPPED]
        self.balanced_batches = balanced_batches
        self.sweep_batch = SWEEP_BATCH if views.image_size <= 64 else DECODE_BATCH
        self.graphs: dict[tuple[str, ...], bytes] = {}  # by their views, none for those that only decode
        # Decoded: with crop=pad [N, H + 2 pad, W + 2 pad, 3], else each [H, W, 3] of its own size; uint8
        self.images: Tensor | list[Tensor] | None = None
        self.files: dict[int, np.ndarray] = {}  # by row, each [bytes] uint8
        self.room_for_files = 0.0  # bytes
        self.kept = self._keep(memory) if memory else "read from files"

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.balanced_batches or -(-self.drawn // self.batch_size)

    @property
    def drawn(self) -> int:
        """Samples of an epoch, of all processes."""
        return self.balanced_batches * self.batch_size if self.balanced_batches else len(self.used)

    def epoch(self, epoch: int, views: tuple[str, ...] = ("weak", "strong"), start: int = 0) -> Iterator[Batch]:
        """Every sample once, shuffled, the last batch may be short; or the class-balanced batches. The first `start`
        batches are left out. A batch that would leave a process less than two samples is given to all of them whole."""
        if self.balanced_batches:
            order = balanced_order(self.manifest.labels[self.used], self.drawn, self.seed, epoch)
        else:
            order = epoch_order(self.drawn, self.seed, epoch)
        pieces = _pieces(self.used[order], self.batch_size)
        parts = [piece[self.rank :: self.world] if len(piece) >= 2 * self.world else piece for piece in pieces]
        return self._batches(parts, views, epoch, start)

    def sweep(self) -> Iterator[Batch]:
        """The clean view of every sample once, in order, in larger batches; those of other processes are left out."""
        return self._batches(_pieces(self.used[self.rank :: self.world], self.sweep_batch), ("clean",))

    def of(self, rows: np.ndarray, views: tuple[str, ...], draw: int = 0) -> Iterator[Batch]:
        """Those views of these samples [n], in order; drawn anew for another `draw`."""
        return self._batches(_pieces(rows, self.batch_size), views, draw)

    def _batches(
        self, pieces: list[np.ndarray], views: tuple[str, ...], epoch: int = 0, start: int = 0
    ) -> Iterator[Batch]:
        at_hand = isinstance(self.images, Tensor)  # the clean view is in there
        drawn = tuple(view for view in views if view != "clean" or not at_hand)  # by DALI
        for chunk in range(start // CHUNK, -(-len(pieces) // CHUNK)):
            seeds = np.random.SeedSequence((self.seed, epoch, self.rank), spawn_key=(chunk,) if chunk else ())
            seed = int(seeds.generate_state(1)[0]) & 0x7FFFFFFF
            first = chunk * CHUNK
            together = pieces[first : first + CHUNK]
            outputs = self._run(together, drawn, seed) if drawn else ([] for _ in together)
            for number, (piece, images) in enumerate(zip(together, outputs, strict=True), first):
                if number < start:
                    continue
                by_name = dict(zip(drawn, images, strict=True))
                if "clean" in views and at_hand:
                    inner = slice(self.views.pad, self.views.pad + self.views.image_size)
                    by_name["clean"] = self._normalise(self._gathered(piece)[:, inner, inner])
                yield Batch(torch.from_numpy(piece).to(self.device), tuple(by_name[view] for view in views))

    def _normalise(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 -> [B, 3, H, W] float32 on the device."""
        mean, std = (torch.tensor(values, device=self.device) for values in (self.views.mean, self.views.std))
        return ((images.to(self.device) - mean) / std).permute(0, 3, 1, 2)

    def _run(self, pieces: list[np.ndarray], views: tuple[str, ...], seed: int) -> Iterator[list[Tensor]]:
        """The views of each piece, each [B, 3, H, W]; a file that cannot be read is named."""
        done = 0
        try:
            for outputs in self._outputs(pieces, views, seed):
                done += 1
                yield outputs
        except (RuntimeError, OSError) as error:
            if self.images is None:
                self._name_broken(pieces[done : done + 1 + AHEAD], error)
            raise

    def _outputs(self, pieces: list[np.ndarray], views: tuple[str, ...] = (), seed: int = 0) -> Iterator[list[Tensor]]:
        """What the reader makes of each piece: views [B, 3, H, W]; without views the images, each [H, W, 3] uint8."""
        if not pieces:
            return
        if self.reader == "torchvision":
            encoded = self.images is None
            for images in plain.outputs(self.views, pieces, self._read, views, seed, encoded, self.threads):
                yield [image.to(self.device) for image in images]
            return
        from nvidia.dali import Pipeline

        if views not in self.graphs:
            self.graphs[views] = _graph(self, views)
        ahead = min(AHEAD, len(pieces))
        kind = {"exec_pipelined": True, "exec_async": True, "exec_dynamic": True}
        pipeline = Pipeline.deserialize(
            self.graphs[views], seed=seed, batch_size=max(map(len, pieces)), prefetch_queue_depth=ahead, **kind
        )
        for piece in pieces[:ahead]:
            pipeline.feed_input("images", self._read(piece))
        pipeline.schedule_run()  # all that was fed
        for number in range(len(pieces)):
            outputs = pipeline.share_outputs()
            pipeline.release_outputs()  # `outputs` stay valid
            if number + ahead < len(pieces):
                pipeline.feed_input("images", self._read(pieces[number + ahead]))
                pipeline.schedule_run()
            if not views:
                yield [torch.from_dlpack(outputs[0][at]) for at in range(len(outputs[0]))]
                continue
            images = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            yield [self._normalise(view) if view.dtype == torch.uint8 else view.permute(0, 3, 1, 2) for view in images]

    def _read(self, piece: np.ndarray) -> list | np.ndarray | Tensor:
        """What the reader starts from: images that are kept, else files. DALI takes host memory from NumPy only."""
        if self.images is None:
            return [self._file(row) for row in piece.tolist()]
        if isinstance(self.images, list):
            images = [self.images[row] for row in piece.tolist()]
            return images if images[0].is_cuda else [image.numpy() for image in images]
        images = self._gathered(piece)
        return images if images.is_cuda else images.numpy()

    def _gathered(self, piece: np.ndarray) -> Tensor:  # [B, H + 2 pad, W + 2 pad, 3] uint8
        return self.images.index_select(0, torch.from_numpy(piece).to(self.images.device))

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _keep(self, memory: Memory) -> str:
        """Climbs the ladder as far as there is room; says how far. Raises BadInput for files that cannot be read."""
        decoded, encoded = needed(self.manifest, self.views)
        for where in ("device", "host")[self.reader != "DALI" :]:  # torchvision cuts on the CPU
            if decoded <= memory.room[where] and (taken := self._decode_all(where, memory.room[where])):
                memory.room[where] -= taken
                return f"decoded in {where} memory, {size_text(taken)}"
        if encoded <= memory.room["host"]:
            self.room_for_files = encoded
            memory.room["host"] -= encoded
            return f"files in host memory, {size_text(encoded)}, {size_text(decoded)} if decoded"
        return f"read from files, {size_text(encoded)}, {size_text(decoded)} if decoded"

    def _decode_all(self, where: str, room: float) -> float:
        """Keeps all images; returns their bytes, or 0 if they are too many after all."""
        from rich.progress import track

        place = self.device if where == "device" else torch.device("cpu")
        count, side = len(self.manifest), self.views.image_size + 2 * self.views.pad
        padded = self.views.crop == "pad"
        images = torch.empty((count, side, side, 3), dtype=torch.uint8, device=place) if padded else []
        pieces = np.split(np.arange(count), range(DECODE_BATCH, count, DECODE_BATCH))
        shown = track(pieces, "decoding", transient=True, disable=count < 5000)
        taken = 0
        try:
            for piece, decoded in zip(shown, self._outputs(pieces), strict=True):
                taken += sum(image.nbytes for image in decoded)
                if taken > room:
                    return 0
                if padded:
                    images[piece[0] : piece[-1] + 1] = torch.stack(decoded)
                else:
                    images += [image.to(place, copy=True) for image in decoded]
                if place.type == "cuda":  # before DALI has the memory of `decoded` back
                    torch.cuda.current_stream(place).synchronize()
        except (RuntimeError, OSError) as error:
            self._name_broken(pieces, error)
            raise
        self.images = images
        return taken

    # -- files ---------------------------------------------------------------------------------------------------------

    def looked_at(self, rows: np.ndarray) -> Iterator[tuple[int, str]]:
        """Decodes the files of these rows [n]: each row, and why DALI refuses it, or nothing."""
        pieces = [rows[at : at + SCAN_BATCH] for at in range(0, len(rows), SCAN_BATCH)]
        while pieces:
            done = 0
            try:
                for _ in self._outputs(pieces):
                    yield from ((row, "") for row in pieces[done].tolist())
                    done += 1
                return
            except (RuntimeError, OSError):
                for piece in pieces[done : done + 1 + AHEAD]:  # it was one of those under way
                    problems = dict(self._broken(piece))
                    yield from ((row, problems.get(row, "")) for row in piece.tolist())
                pieces = pieces[done + 1 + AHEAD :]

    def _file(self, row: int) -> np.ndarray:  # [bytes] uint8
        content = self.files.get(row)
        if content is None:
            content = np.fromfile(self.manifest.root / self.manifest.files[row], dtype=np.uint8)
            if content.nbytes <= self.room_for_files:
                self.files[row] = content
                self.room_for_files -= content.nbytes
        return content

    def _name_broken(self, pieces: list[np.ndarray], error: Exception) -> None:
        """Raises BadInput that names the unreadable files of the pieces; returns if all of them can be read."""
        refused = (broken for piece in pieces for broken in self._broken(piece))
        found = [
            f"{self.manifest.root / self.manifest.files[row]}: {problem}"
            for row, problem in islice(refused, MOST_BROKEN)
        ]
        if len(found) == 1:
            raise BadInput(f"{found[0]}; replace it, or take it out of the data set") from error
        if found:
            count = f"{len(found)} files" + (" or more" if len(found) == MOST_BROKEN else "")
            first = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise BadInput(f"{count} are broken: {first}; replace them, or take them out of the data set") from error

    def _broken(self, piece: np.ndarray) -> Iterator[tuple[int, str]]:
        """Rows and why. DALI says that it failed, not of which file: halve until it is one."""
        try:
            list(self._outputs([piece]))
        except (RuntimeError, OSError) as error:
            if len(piece) > 1:
                yield from self._broken(piece[: len(piece) // 2])
                yield from self._broken(piece[len(piece) // 2 :])
                return
            path = self.manifest.root / self.manifest.files[piece[0]]
            reason = error.strerror if isinstance(error, OSError) else _why_refused(path.read_bytes())
            yield int(piece[0]), f"cannot be read as an image ({reason})"


def _pieces(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[at : at + size] for at in range(0, len(order), size)]


def _why_refused(content: bytes) -> str:
    """DALI's own words are a page long; another decoder's are short."""
    from PIL import Image

    if not content:
        return "the file is empty"
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return f"not taken as {image.format}, save it anew as JPEG or PNG"
    except Exception as error:  # every format has its own
        return str(error).split(" <_io.BytesIO")[0]


# -- DALI graphs -------------------------------------------------------------------------------------------------------


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


def _graph(loader: Loader, views: tuple[str, ...]) -> bytes:
    """From batches of `images`, decoded or not, to views; without views, to what is kept of them. It is as DALI
    serialises it: a pipeline is made of that in a millisecond, where building RandAugment's graph takes half a second.
    """
    from nvidia.dali import fn, pipeline_def, types

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
            images = fn.resize(images, resize_shorter=config.resized)
            return normalise(images)
        return fn.crop(images, crop=[size, size])  # uint8: `_normalise` does the rest, as for images that are kept

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

            furthest = round(TRANSLATION * size)  # else 100 pixels, which are meant for 224
            images = rand_augment.rand_augment(images, n=2, m=9, fill_value=0, max_translate_abs=furthest)
        elif config.jitter:
            low, high = 1 - config.jitter, 1 + config.jitter
            change = {name: fn.random.uniform(range=[low, high]) for name in ("brightness", "contrast", "saturation")}
            images = fn.color_twist(images, **change)
        if config.grey:
            images = fn.saturation(images, saturation=fn.random.choice([1.0, 0.0], p=[1 - config.grey, config.grey]))
        if config.blur:
            if fn.random.coin_flip(probability=config.blur, dtype=types.BOOL):
                sigma = fn.random.uniform(range=BLUR_SIGMA)
                images = fn.gaussian_blur(images, sigma=sigma, window_size=config.blur_window)
        if config.cutout:
            anchor = fn.random.uniform(range=[-config.cutout / 2, 1 - config.cutout / 2], shape=[2])
            fill = list(config.mean)
            images = fn.erase(
                images, anchor=anchor, shape=[config.cutout] * 2, normalized=True, axis_names="HW", fill_value=fill
            )
        return normalise(images, flip())

    cut = {"clean": clean, "weak": weak, "strong": strong, "strong2": strong}

    on_gpu = loader.device.type == "cuda"

    @pipeline_def(
        batch_size=loader.batch_size,
        num_threads=loader.threads,
        device_id=loader.device.index or 0 if on_gpu else None,
        exec_dynamic=True,
        enable_conditionals=True,  # RandAugment chooses by sample, and the blur
    )
    def pipeline():
        if loader.images is not None:
            there = "gpu" if loader.images[0].is_cuda else "cpu"
            images = fn.external_source(name="images", layout="HWC", device=there)
            images = images.gpu() if on_gpu else images
        else:
            images = _decode(loader, fn.external_source(name="images"))
            images = _padded(images, config) if config.crop == "pad" else images
        return tuple(cut[view](images) for view in views) or images

    with warnings.catch_warnings(record=True) as said:  # RandAugment calls operators by names that DALI deprecates
        graph = pipeline().serialize()
    for warning in said:
        if not issubclass(warning.category, DeprecationWarning):
            warnings.warn(warning.message, stacklevel=2)
    return graph
