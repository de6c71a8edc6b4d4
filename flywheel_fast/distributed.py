"""The processes of one training, started by torchrun, and what they tell each other.

Every process holds the state of all samples, but finds it anew for its own share only: what they found is united by a
sum in which each sample has one addend, so that it is exact. One process alone tells nobody anything.
"""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed.nn  # imported after joining, as DDP would, it keeps the processes' group for ever
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    rank: int = 0
    world: int = 1
    gpu: int = 0  # of this machine's
    launcher: str | None = None  # torchrun's name, the same when it starts all processes anew
    beside: int = 1  # processes of this machine, this one too: they share its memory

    @classmethod
    def join(cls) -> "Group":
        """The processes that torchrun has started, on a GPU each where there are any; alone without it."""
        if not distributed.is_torchelastic_launched():
            return cls()
        here, launcher = int(os.environ["LOCAL_RANK"]), f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()}"
        if torch.cuda.is_available():
            torch.cuda.set_device(here)
        if os.environ["WORLD_SIZE"] == "1":
            return cls(gpu=here, launcher=launcher)
        store, rank, world = next(rendezvous("env://"))
        if os.environ["GROUP_WORLD_SIZE"] == "1":  # torchrun's store still has the addresses of those that died
            store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
        return cls(rank, world, here, launcher, int(os.environ["LOCAL_WORLD_SIZE"]))

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.gpu) if torch.cuda.is_available() else torch.device("cpu")

    def leave(self) -> None:
        """Ends gloo's threads: one that lets a tensor go while Python shuts down aborts the process."""
        if self.world > 1:
            gc.collect()  # DistributedDataParallel, which has the group too, is in cycles
            distributed.destroy_process_group()

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them; what it raises is raised in all."""
        if self.world == 1:
            return make()
        made: list = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        distributed.broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def most(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.world == 1:
            return value
        found = torch.tensor(value)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Each becomes the sum of all processes' ones."""
        if self.world > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Each, of one float type, becomes the mean of all processes' ones."""
        if self.world > 1 and tensors:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            distributed.all_reduce(flat)
            flat /= self.world
            for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(values.view_as(tensor))

    def union(self, own: Tensor, tensors: Sequence[Tensor]) -> None:
        """Each [N, ...] has, from now on in all processes, what each process found of its own samples, own [N] bool;
        samples that are nobody's stay as they are."""
        if self.world == 1:
            return
        owners = own.to(torch.uint8)
        distributed.all_reduce(owners)
        left_out = own.logical_not() if self.rank else own.logical_not() & (owners > 0)  # the first keeps nobody's
        for tensor in tensors:
            tensor[left_out] = 0
            distributed.all_reduce(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor)

    def share(self, count: int) -> Tensor | float:
        """By what a mean over `count` samples of this process is multiplied, so that the mean of these products over
        the processes is the mean over all samples."""
        if self.world == 1:
            return 1.0
        total = torch.full((), float(count), device=self.device)
        distributed.all_reduce(total)
        return count * self.world / total

    def parallel(self, network: nn.Module, all_used: bool) -> nn.Module:
        """The same network, whose gradients are the mean of all processes' ones after a backward pass. `all_used`: each
        forward pass uses every weight."""
        if self.world == 1:
            return network
        return DistributedDataParallel(
            network,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=not all_used,
            gradient_as_bucket_view=True,
        )


ALONE = Group()
