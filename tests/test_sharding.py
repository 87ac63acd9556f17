"""Whole and sharded tensors, and when gradients are averaged. Real processes are in test_processes."""

import pytest
import torch
from conftest import tiny_network
from torch import nn

from guided_diffusion.training.group import Group
from guided_diffusion.training.sharding import like, local, syncing, take_over, whole, wrap


@pytest.fixture(scope="module")
def mesh():
    """A device mesh of this process alone, so that sharded tensors can be made."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(tensor, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, mesh, [Shard(0)])


def test_one_process_calls_the_model_itself():
    model, _ = tiny_network()
    cpu = torch.device("cpu")
    assert wrap(model, Group(), cpu) is model and wrap(model, Group(), cpu, fsdp=True) is model
    with syncing(model, last=False), syncing(model, last=True):
        pass


def test_whole_leaves_plain_values_alone():
    tensor = torch.arange(3.0)
    values = {"a": [1, {"b": tensor}], "c": None, "d": (1, 2)}
    assert whole(values)["a"][1]["b"] is tensor and whole(values) == values
    assert local(tensor) is tensor and like(tensor, tensor) is tensor


def test_sharded_tensors_become_whole_and_back(mesh):
    tensor = torch.arange(12.0).reshape(4, 3)
    there = sharded(tensor, mesh)
    back = whole({"a": [there]})["a"][0]
    assert type(back) is torch.Tensor and torch.equal(back, tensor)
    assert type(local(there)) is torch.Tensor and whole([there], keep=False) == [None]
    again = like(tensor + 1, there)
    assert type(again) is type(there) and again.placements == there.placements
    assert torch.equal(whole(again), tensor + 1)


def test_taking_over_writes_in_place(mesh):
    own = {"plain": torch.zeros(2), "sharded": sharded(torch.zeros(4, 3), mesh)}
    places = own["plain"].data_ptr(), local(own["sharded"]).data_ptr()
    take_over(own, {"plain": torch.ones(2), "sharded": torch.full((4, 3), 2.0)})
    assert own["plain"].tolist() == [1, 1] and (whole(own["sharded"]) == 2).all()
    assert places == (own["plain"].data_ptr(), local(own["sharded"]).data_ptr())


def test_a_parameter_that_requires_gradients_may_be_taken_over():
    layer = nn.Linear(2, 1)
    take_over(layer.state_dict(), {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    assert layer.weight.tolist() == [[1, 1]] and layer.weight.requires_grad
