"""Devices and precisions."""

import contextlib

import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.training.distributed import (
    autocast,
    grad_scaler,
    pins_memory,
    select_device,
    to_device,
    usable_precision,
)

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_cpu(no_gpu):
    assert select_device("cpu") == CPU and select_device("auto") == CPU and select_device() == CPU


def test_gpus(two_gpus):
    assert select_device("auto").type == "cuda" and select_device("cuda").type == "cuda"
    assert select_device("cuda:1") == torch.device("cuda:1")
    assert select_device("cpu") == CPU


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "mps", "meta", "cpu,cuda", "CUDA"])
def test_unknown_devices_are_named(two_gpus, name):
    with pytest.raises(InputError, match=f"--device {name}: unknown; choose auto, cpu or cuda"):
        select_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_absent_devices_are_counted(no_gpu, name):
    with pytest.raises(InputError, match=f"--device {name}: this machine shows 0 CUDA devices"):
        select_device(name)


@pytest.mark.parametrize("name", ["cuda:2", "cuda:128", "cuda:99999999999"])
def test_numbers_too_high(two_gpus, name):
    with pytest.raises(InputError, match=f"--device {name}: (this machine shows 2 CUDA devices|unknown)"):
        select_device(name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_a_cpu_has(precision):
    assert usable_precision(CPU, precision) == (precision, None)


def test_fp16_on_a_cpu_becomes_bf16_and_says_so():
    precision, why = usable_precision(CPU, "fp16")
    assert precision == "bf16" and "fp16" in why and "CPU" in why and "bf16" in why


@pytest.mark.parametrize(("supported", "used"), [(True, "bf16"), (False, "fp16")])
def test_bf16_on_a_gpu(monkeypatch, supported, used):
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


def test_fp32_is_no_autocast():
    assert isinstance(autocast(CPU, "fp32"), contextlib.nullcontext)


@pytest.mark.parametrize(("precision", "enabled"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_only_fp16_scales_its_gradients(precision, enabled):
    assert grad_scaler(CPU, precision).is_enabled() == enabled


def test_memory():
    assert not pins_memory(CPU) and pins_memory(torch.device("cuda"))
    tensor = torch.arange(3)
    assert torch.equal(to_device(tensor, CPU), tensor)
