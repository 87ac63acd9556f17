"""Networks made ready for a device: memory layout, rounded weights, torch.compile."""

import copy
import functools
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import tiny_network

from guided_diffusion import InputError, sample
from guided_diffusion.training.devices import check_compiler, compiled, for_sampling, placed, rounded

SIZE = (8, 16)
CPU = torch.device("cpu")


def inputs():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *SIZE, generator=draw), torch.tensor([3, 900]), torch.rand(2, 5, *SIZE, generator=draw)


def test_the_memory_layout_changes_speed_alone():
    model = tiny_network()[0].requires_grad_(False)
    expected = model(*inputs())
    model = placed(model, CPU)
    assert model.output_blocks[0][0].in_layers[1].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(*inputs()), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc")
def test_freed_memory_is_kept():
    code = (
        "import resource, sys, torch\nfrom guided_diffusion.training.devices import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def work(): a = torch.ones(2**23); b = torch.ones(2**23); return float(a[0] + b[0])\n"
        "for _ in range(10): work()\nbefore = faults()\nfor _ in range(10): work()\nprint(faults() - before)"
    )
    keeps, gives_back = (
        int(subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=True).stdout)
        for word in ("keep", "no")
    )
    assert keeps < 100 < 10_000 < gives_back  # 64 MiB are 16,384 pages


@pytest.mark.parametrize("places", ["unet", "enconly"])
def test_rounded_weights_give_what_autocast_gives(places):
    model = tiny_network(unet_model=places)[0].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs())
        ready = rounded(copy.deepcopy(model), "bf16")
        assert torch.equal(ready(*inputs()), expected)
    assert {p.dtype for p in ready.parameters()} == {torch.bfloat16, torch.float32}  # norms keep theirs
    assert rounded(model, "fp32") is model and {p.dtype for p in model.parameters()} == {torch.float32}


def test_for_sampling():
    model = for_sampling(tiny_network()[0].train(), CPU, "bf16")
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_gives_the_same_pictures():
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


def test_compiling_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"--compile True: torch\.compile needs a compiler"):
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
