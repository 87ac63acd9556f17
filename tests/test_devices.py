"""Devices, precisions, and networks made ready for them."""

import copy
import functools
import shutil

import pytest
import torch
from conftest import tiny_network

from guided_diffusion import sample
from guided_diffusion.console import InputError
from guided_diffusion.training.devices import (
    autocast,
    check_compiler,
    compiled,
    grad_scaler,
    placed,
    rounded,
    select_device,
    usable_precision,
)
from guided_diffusion.training.distributed import Ranks

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_select_device_cpu(no_gpu):
    assert select_device("cpu") == CPU and select_device("auto") == CPU and select_device() == CPU


def test_select_device_gpus(two_gpus):
    assert select_device("auto").type == "cuda" and select_device("cuda").type == "cuda"
    assert select_device("cuda:1") == torch.device("cuda:1")
    assert select_device("cpu") == CPU
    assert two_gpus[-1] == torch.device("cuda:1")  # the current one, of which bf16 is asked, also in a single process


def test_select_device_takes_the_gpu_of_the_local_rank(two_gpus, monkeypatch):
    assert select_device("auto", Ranks(3, 4, 1)) == two_gpus[-1] == torch.device("cuda:1")
    with pytest.raises(InputError, match="4 processes cannot share one GPU"):
        select_device("cuda:0", Ranks(3, 4, 1))
    with pytest.raises(InputError, match="process 3 of this node has no GPU left: 2 are shown"):
        select_device("cuda", Ranks(2, 4, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun --gpus-per-task shows each its own
    assert select_device("cuda", Ranks(3, 4, 1)) == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "mps", "meta", "cpu,cuda", "CUDA"])
def test_select_device_names_unknown_ones(two_gpus, name):
    with pytest.raises(InputError, match=f"--device {name}: unknown; choose auto, cpu or cuda"):
        select_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_select_device_counts_those_that_are_there(no_gpu, name):
    with pytest.raises(InputError, match=f"--device {name}: this machine shows 0 CUDA devices"):
        select_device(name)


@pytest.mark.parametrize("name", ["cuda:2", "cuda:128", "cuda:99999999999"])
def test_select_device_refuses_numbers_too_high(two_gpus, name):
    with pytest.raises(InputError, match=f"--device {name}: (this machine shows 2 CUDA devices|unknown)"):
        select_device(name)


def test_usable_precision_of_a_cpu_is_bf16_for_fp16():
    precision, why = usable_precision(CPU, "fp16")
    assert precision == "bf16" and "fp16" in why and "CPU" in why and "bf16" in why


@pytest.mark.parametrize(("supported", "used"), [(True, "bf16"), (False, "fp16")])
def test_usable_precision_of_a_gpu_without_bf16_is_fp16(monkeypatch, supported, used):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    precision, why = usable_precision(torch.device("cuda"), "bf16")
    assert precision == used and (why is None) == supported
    assert usable_precision(torch.device("cuda"), "fp16") == ("fp16", None)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_dtype(precision, dtype):
    a = torch.ones(2, 2)
    with autocast(CPU, precision):
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(("precision", "enabled"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_grad_scaler_is_for_fp16(precision, enabled):
    assert grad_scaler(CPU, precision).is_enabled() == enabled


# -- networks ---------------------------------------------------------------------------------------------------------

SIZE = (8, 16)


def inputs():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *SIZE, generator=draw), torch.tensor([3, 900]), torch.rand(2, 5, *SIZE, generator=draw)


def test_placed_changes_speed_alone():
    model = tiny_network()[0].requires_grad_(False)
    expected = model(*inputs())
    model = placed(model, CPU)
    assert model.output_blocks[0][0].in_layers[1].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(*inputs()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("places", ["unet", "enconly"])
def test_rounded_weights_give_what_autocast_gives(places):
    model = tiny_network(unet_model=places)[0].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs())
        ready = rounded(copy.deepcopy(model), "bf16")
        assert torch.equal(ready(*inputs()), expected)
    assert {p.dtype for p in ready.parameters()} == {torch.bfloat16, torch.float32}  # norms keep theirs
    assert rounded(model, "fp32") is model and {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_network_gives_the_same_pictures():
    model, diffusion = tiny_network(timestep_respacing="3", prediction="x0")
    x, _, y = inputs()
    expected = sample(model, diffusion, y, x, "ddim", s=1.5).images
    names, lines = list(model.state_dict()), []
    model = compiled(copy.deepcopy(model), lines.append)
    torch.testing.assert_close(sample(model, diffusion, y, x, "ddim", s=1.5).images, expected, rtol=0, atol=1e-4)
    assert list(model.state_dict()) == names
    assert (
        len(lines) == 2
        and lines[0].startswith("compiling the network")
        and lines[1].startswith("compiled the forward pass in ")
    )


def test_check_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"--compile True: g\+\+ was not found"):
        check_compiler(CPU)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_steps_equal_plain_ones(make_loop, monkeypatch):
    # Capturing both passes is what could go wrong here; making machine code of them takes more than a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses = []
    for compile_it in ("False", "True"):
        loop = make_loop(f"compile {compile_it}", compile=compile_it)
        batches = loop.loader(0)
        losses.append([float(loop.train_step(next(batches))["loss"]) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len({*losses[0]}) == 3
