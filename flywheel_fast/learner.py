"""A network being trained: its optimiser, its schedule, and the moving average that E-steps and inference use."""

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flywheel_fast.distributed import ALONE, Group
from flywheel_fast.errors import BadInput


@dataclass(frozen=True)
class OptimConfig:
    epochs: int = 40
    """Passes over the training set (see balanced_batches), warm-up included; after it one epoch is one cycle."""
    batch_size: int = 64
    """Samples a step, of all processes together."""
    balanced_batches: int | None = None
    """Batches of an epoch that has as many samples of each given label as of any other; null: an epoch is every sample
    once. E-steps look at every sample all the same."""
    lr: float = 0.05
    """Peak learning rate of SGD."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty, on every parameter."""
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    """Learning rate over the run: cosine to zero; onecycle: up for a tenth, then cosine; constant."""
    ema_decay: float = 0.98
    """Decay of the weights' moving average, a step; 0: E-steps and inference use the raw weights."""
    layer_decay: float = 1.0
    """Learning rate of a layer as a share of the next one's; the heads' and the last layer's is lr. Below 1, the layers
    that know of edges and textures change least; 0.65 to 0.9 are usual. Layers as timm groups those of its networks."""
    freeze: int = 0
    """Epochs at the start in which the heads learn alone and the backbones stay as they are; -1: all epochs."""
    freeze_norm: bool = False
    """Keep the statistics of the backbones' batch normalisation as the weights file has them."""
    sync_batchnorm: bool = False
    """Of several processes: batch normalisation over the batches of all. On GPUs only."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks; auto: bf16 where the processor has it."""
    compile: bool = False
    """The networks' passes in training by torch.compile, which takes a while at the start; needs a C++ compiler."""

    def __post_init__(self):
        if min(self.epochs, self.batch_size) < 1:
            raise ValueError(
                f"optim.epochs and optim.batch_size must be at least 1, not {self.epochs}, {self.batch_size}"
            )
        if self.balanced_batches is not None and self.balanced_batches < 1:
            raise ValueError(f"optim.balanced_batches must be at least 1, or null, not {self.balanced_batches}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay must be in [0, 1), not {self.ema_decay}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay must be in (0, 1], not {self.layer_decay}")
        if self.freeze < -1:
            raise ValueError(f"optim.freeze must be a number of epochs, or -1 for all, not {self.freeze}")
        if self.lr < 0 or self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise ValueError("optim.lr and optim.weight_decay must not be negative, optim.momentum must be in [0, 1)")

    def lr_at(self, done: float) -> float:
        """Learning rate when a share `done` in [0, 1] of the run is over; pure, so that a resume needs no state."""
        if self.schedule == "constant":
            return self.lr
        rise = 0.1 if self.schedule == "onecycle" else 0.0
        if done < rise:
            return self.lr * (0.04 + 0.96 * done / rise)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))


class Learner:
    """One network with everything that training it needs; images go in channels-last."""

    def __init__(
        self,
        network: nn.Module,
        config: OptimConfig,
        steps_per_epoch: int,
        device: torch.device,
        group: Group = ALONE,
    ):
        self.config, self.device, self.group = config, device, group
        if config.sync_batchnorm and group.world > 1:
            if device.type == "cpu":
                raise BadInput("optim.sync_batchnorm=true: torch has it for GPUs only; leave it out")
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = network.to(device, memory_format=torch.channels_last)
        all_used = getattr(network, "projection", None) is None and not config.freeze
        self.parallel = group.parallel(self.network, all_used)
        if config.compile:
            self.parallel = torch.compile(self.parallel)
        self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
        self.ema.eval()
        self.looked: nn.Module | None = None  # the averages as they were at the last look at all samples
        nesterov = config.momentum > 0
        self.optimizer = torch.optim.SGD(
            _by_layer(self.network, config.layer_decay) if config.layer_decay < 1 else self.network.parameters(),
            config.lr,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=nesterov,
            fused=True,
        )
        if config.momentum:  # as a first step finds it; the fused kind wants that of all weights or of none
            for weights in self.network.parameters():
                self.optimizer.state[weights]["momentum_buffer"] = torch.zeros_like(weights)
        # steps that were skipped [] int64: of the last ones, and since `skipped` was called; on the device, so that
        # nothing waits for them
        self.skipped_last, self.skipped_all = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.sound = [buffer.clone() for buffer in self._statistics()]
        self.steps, self.total_steps = 0, config.epochs * steps_per_epoch
        self.frozen_steps = math.inf if config.freeze < 0 else config.freeze * steps_per_epoch
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and has_bf16(device))

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def forward(self, images: Tensor, index: Tensor, project: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Training mode, with gradients: images [B, 3, H, W] of the samples `index` -> logits [B, C] (and embeddings).
        From features [B, D], heads give a block of logits each."""
        self._train_mode()
        with self.autocast():
            return self._on(self.parallel, images, index, *([project] if project else []))

    def _train_mode(self) -> None:
        """All learns but what is frozen: a pure function of the steps, so that a resume needs no state."""
        self.network.train()
        if self.config.freeze:  # DDP must have known the weights as ones that learn
            learns = self.steps >= self.frozen_steps
            self.network.backbone.train(learns).requires_grad_(learns)
        if self.config.freeze_norm:
            for module in self.network.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    @torch.no_grad()
    def predict(self, images: Tensor, network: nn.Module | None = None, index: Tensor | None = None) -> Tensor:
        """The averaged network (or the one given) in evaluation mode: images [B, 3, H, W], or features [B, D], ->
        logits [B, C]. `index` [B]: whose they are, if they are of the training set."""
        with self.autocast():
            return self._on(network or self.ema, images, index)

    def _on(self, network: nn.Module, images: Tensor, index: Tensor | None, *more) -> Tensor | tuple[Tensor, Tensor]:
        if getattr(self.network, "knows_samples", False):
            return network(images, index)
        return network(images.contiguous(memory_format=torch.channels_last), *more)

    def look(self) -> None:
        """Keeps the averages as they are, so that what they say of the samples can be found again while they go on."""
        if self.looked is None:
            self.looked = copy.deepcopy(self.ema)
        self.looked.load_state_dict(self.ema.state_dict())

    def step(self, loss: Tensor) -> None:
        """A step down the loss []; the network stays as it is where a gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.steps / self.total_steps) * group.get("lr_scale", 1)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [weights.grad for weights in self.network.parameters() if weights.grad is not None]
        unsound = nn.utils.get_total_norm(gradients).isfinite().logical_not()
        self.optimizer.found_inf = unsound.float()
        self.optimizer.step()
        statistics = self._statistics()
        self.group.mean(statistics)
        for found, sound in zip(statistics, self.sound, strict=True):
            found.copy_(torch.where(unsound, sound, found))
            sound.copy_(found)
        self.skipped_last = (self.skipped_last + 1) * unsound
        self.skipped_all += unsound
        self.ema.update_parameters(self.network)
        self.steps += 1

    def skipped(self) -> int:
        """Steps that were skipped since this was last asked."""
        count = int(self.skipped_all)
        self.skipped_all.zero_()
        return count

    def _statistics(self) -> list[Tensor]:
        """Running ones of batch normalisation, which a forward pass changes."""
        return [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]

    def state_dict(self) -> dict:
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "looked": self.looked.state_dict() if self.looked else None,
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        if state["looked"]:
            self.look()
            self.looked.load_state_dict(state["looked"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sound = [buffer.clone() for buffer in self._statistics()]
        self.steps = state["steps"]


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is native to the device, rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))


def _by_layer(network: nn.Module, layer_decay: float) -> list[dict]:
    """Groups of parameters with their share `lr_scale` of the learning rate, the heads' first. Raises BadInput."""
    from timm.optim import param_groups_layer_decay

    if not hasattr(network.backbone, "group_matcher"):
        raise BadInput("optim.layer_decay: the layers of timm's networks are known; set model.*.name=timm/NAME, or 1")
    groups = param_groups_layer_decay(network.backbone, weight_decay_exclude_1d=False, layer_decay=layer_decay)
    deep = {id(weights) for weights in network.backbone.parameters()}
    heads = [weights for weights in network.parameters() if id(weights) not in deep]
    layers = [{"params": group["params"], "lr_scale": group["lr_scale"]} for group in groups]
    return [{"params": heads, "lr_scale": 1.0}, *layers]
