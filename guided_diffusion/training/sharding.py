"""One network over many processes: DDP, or FSDP2 with everything sharded; whole tensors for the files in both cases."""

import sys
import warnings
from contextlib import contextmanager

import torch
from torch.nn.parallel import DistributedDataParallel


def wrap(model, group, device, fsdp=False):
    """Return what to call for the forward pass so that gradients become the mean over the group's ranks.

    :param fsdp: shard the model's own parameters, block by block, and put the shards on the device.
    """
    if group.world_size == 1:
        return model
    if not fsdp:
        own = [device.index] if device.index is not None else None
        return DistributedDataParallel(model, device_ids=own, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # It warns of in-place operations on what a block returns; this network has none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (group.world_size,))
    for block in [*model.input_blocks, *model.middle_block, *model.output_blocks]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def is_sharded(model):
    """Whether a model's parameters are sharded by `wrap`."""
    return _is_a(model, "torch.distributed.fsdp", "FSDPModule")


def _is_a(value, module, name):
    # Nothing is one before its module is there, and these two take half a second, which a process alone need not spend.
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _is_shard(value):
    return _is_a(value, "torch.distributed.tensor", "DTensor")


@contextmanager
def syncing(network, last):
    """Average the gradients over the ranks in the block's backward pass only where it is the `last` of a step."""
    if is_sharded(network):
        network.set_requires_gradient_sync(last)
        yield
    elif isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        yield


def whole(values, keep=True):
    """Return a nest of dicts and lists with every sharded tensor made whole, in host memory. All ranks must call it.

    :param keep: False for the ranks that only help: they get None for each such tensor, and need no memory.
    """
    if _is_shard(values):
        full = values.full_tensor()
        return full.cpu() if keep else None
    if isinstance(values, dict):
        return {key: whole(value, keep) for key, value in values.items()}
    if isinstance(values, list):
        return [whole(value, keep) for value in values]
    return values


def local(tensor):
    """Return this rank's shard of a tensor, or the tensor where it is not sharded."""
    return tensor.to_local() if _is_shard(tensor) else tensor


def like(tensor, reference):
    """Return a whole tensor sharded as `reference` is, on its device."""
    if not _is_shard(reference):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)


def take_over(own, weights):
    """Copy whole tensors into a state dict's, sharded or not."""
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(like(weights[key], value))
