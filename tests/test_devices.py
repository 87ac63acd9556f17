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
    for_sampling,
    grad_scaler,
    select_device,
    usable_precision,
)
from guided_diffusion.training.distributed import Ranks

CPU = torch.device("cpu")


def show_gpus(monkeypatch, count):
    """Let torch see a number of GPUs; return the list of those that are made the current one from now on."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_select_device_of_a_single_process(monkeypatch):
    show_gpus(monkeypatch, 0)
    assert select_device("cpu") == select_device("auto") == select_device() == CPU
    chosen = show_gpus(monkeypatch, 2)
    assert select_device("auto") == select_device("cuda") == torch.device("cuda:0") and select_device("cpu") == CPU
    assert select_device("cuda:1") == chosen[-1] == torch.device("cuda:1")  # the current one, which is asked for bf16


def test_select_device_takes_the_gpu_of_the_local_rank(monkeypatch):
    chosen = show_gpus(monkeypatch, 2)
    assert select_device("auto", Ranks(3, 4, 1)) == chosen[-1] == torch.device("cuda:1")
    with pytest.raises(InputError, match="--device cuda: GPU 2 is asked for, but 2 are shown"):
        select_device("cuda", Ranks(2, 4, 2))
    show_gpus(monkeypatch, 1)  # srun --gpus-per-task shows each its own
    assert select_device("cuda", Ranks(3, 4, 1)) == torch.device("cuda:0")


UNKNOWN, TOO_FEW = "unknown; choose auto, cpu or cuda", "GPU .* is asked for, but {} are shown"
WRONG = [(name, 2, UNKNOWN) for name in ("", "gpu", "cuda:", "cuda:x", "cuda:-1", "mps", "cpu,cuda", "CUDA")]
WRONG += [(name, shown, TOO_FEW) for name, shown in (("cuda", 0), ("cuda:0", 0), ("cuda:2", 2), ("cuda:128", 2))]


@pytest.mark.parametrize(("name", "shown", "words"), WRONG)
def test_select_device_names_what_is_not_there(monkeypatch, name, shown, words):
    show_gpus(monkeypatch, shown)
    with pytest.raises(InputError, match=f"--device {name}: {words.format(shown)}"):
        select_device(name)


@pytest.mark.parametrize("bf16", [True, False])
def test_usable_precision_is_what_the_device_can_do(monkeypatch, bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    gpu = torch.device("cuda")
    assert usable_precision(gpu, "bf16") == (("bf16", None) if bf16 else ("fp16", "this GPU has no bf16: using fp16"))
    assert usable_precision(gpu, "fp16") == ("fp16", None)
    assert usable_precision(CPU, "fp16") == ("bf16", "fp16 is of no use on a CPU: using bf16")


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_decides_autocast_and_loss_scale(precision, dtype):
    a = torch.ones(2, 2)
    with autocast(CPU, precision):
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32
    assert grad_scaler(CPU, precision).is_enabled() == (precision == "fp16")


# -- networks ---------------------------------------------------------------------------------------------------------


def inputs():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 8, 16, generator=draw), torch.tensor([3, 900]), torch.rand(2, 5, 8, 16, generator=draw)


@pytest.mark.parametrize("places", ["unet", "enconly"])
def test_for_sampling_changes_speed_alone(places):
    model = tiny_network(unet_model=places)[0]
    expected = model(*inputs())
    model = for_sampling(model, CPU, "fp32")
    assert model.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in model.parameters())
    torch.testing.assert_close(model(*inputs()), expected.detach(), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # which rounds the weights at every call
        expected = model(*inputs())
        model = for_sampling(model, CPU, "bf16")
        assert torch.equal(model(*inputs()), expected)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}  # norms keep theirs


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
    assert len(lines) == 1 and lines[0].startswith("compiling the network")


def test_check_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"--compile True: no g\+\+ was found"):
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
