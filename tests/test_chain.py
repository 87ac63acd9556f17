"""The reverse chain for searches: one label map for many samples, shared label-map work, cheap looks, its ending."""

import pytest
import torch
from conftest import sampled, tiny_network

from guided_diffusion import EarlyStop, InputError
from guided_diffusion.diffusion.conditioning import Conditioning
from guided_diffusion.diffusion.gaussian_diffusion import GaussianDiffusion, create_gaussian_diffusion
from guided_diffusion.diffusion.sampling import fresh_noise
from guided_diffusion.diffusion.schedules import beta_schedule
from guided_diffusion.diffusion.solvers import ancestral_step, ddim_step

SIZE, T = (8, 16), 8
SEEDS = [3, 4, 5]


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["unet", "enconly"])
def parts(request):
    """A tiny UNet whose output layer is not zero, its process, one label map, and three starting noises."""
    model, diffusion = tiny_network(
        timestep_respacing=str(T), unet_model=request.param, noise_schedule="cosine", prediction="v"
    )
    return model, diffusion, (normals(1, 5, *SIZE, seed=7) > 0.8).float(), normals(3, 3, *SIZE, seed=8)


# -- one label map for many samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [0, 2**31])
@pytest.mark.parametrize("s", [1.0, 2.0])
def test_one_label_map_serves_all_samples(parts, s, cache_bytes):
    model, diffusion, y, noise = parts
    options = {"s": s, "seeds": SEEDS, "cache_bytes": cache_bytes}
    repeated = sampled(model, diffusion, y.repeat(3, 1, 1, 1), noise, **options).images
    shared = sampled(model, diffusion, y, noise, **options).images
    torch.testing.assert_close(shared, repeated, rtol=0, atol=1e-5)
    other = sampled(model, diffusion, torch.zeros_like(y), noise, **options).images
    assert (shared - other).abs().max() > 1e-3  # the label map matters


@pytest.mark.parametrize("cache_bytes", [0, 2**31])
def test_one_label_map_serves_those_that_early_stopping_leaves(parts, cache_bytes):
    model, diffusion, y, noise = parts
    moves = []
    sampled(model, diffusion, y, noise, "ddim", on_step=lambda t, x, out: moves.append(out["pred_xstart"]))
    middle = (moves[4] - moves[3]).square().mean(dim=(1, 2, 3)).sqrt().sort().values[:2].mean().item()
    options = {"early_stop": EarlyStop(middle, patience=1, min_steps=5), "cache_bytes": cache_bytes, "s": 1.0}
    shared = sampled(model, diffusion, y, noise, "ddim", **options)
    repeated = sampled(model, diffusion, y.repeat(3, 1, 1, 1), noise, "ddim", **options)
    assert shared.steps.tolist() == repeated.steps.tolist() and (shared.steps == 5).sum() == 1
    torch.testing.assert_close(shared.images, repeated.images, rtol=0, atol=1e-5)


def test_a_plain_function_gets_the_label_map_of_every_sample():
    def network(x, timesteps, y):
        assert y.shape == (len(x), 2, *SIZE)
        return x * y[:, :1]

    diffusion = create_gaussian_diffusion(diffusion_steps=T, noise_schedule="cosine", prediction="x0")
    y, noise = normals(1, 2, *SIZE), normals(3, 3, *SIZE)
    shared = sampled(network, diffusion, y, noise, s=1.5, seeds=SEEDS).images
    assert torch.equal(shared, sampled(network, diffusion, y.repeat(3, 1, 1, 1), noise, s=1.5, seeds=SEEDS).images)


def test_label_map_work_is_shared_between_calls(parts):
    model, diffusion, y, noise = parts
    calls = []
    handle = model.middle_block[0].in_norm.mlp_shared.register_forward_hook(
        lambda module, inputs, output: calls.append(len(output))
    )
    prepared = Conditioning(model, y, 2.0)
    images = [
        sampled(model, diffusion, prepared, noise[k : k + 1], s=2.0, seeds=SEEDS[k : k + 1]).images for k in range(3)
    ]
    handle.remove()
    assert calls == [1, 1]  # the label map and the empty one
    together = sampled(model, diffusion, y.repeat(3, 1, 1, 1), noise, s=2.0, seeds=SEEDS).images
    torch.testing.assert_close(torch.cat(images), together, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="--s 1: this conditioning was made ready for 2"):
        sampled(model, diffusion, prepared, noise)


def test_without_memory_a_shared_label_map_is_still_computed_once_per_evaluation(parts):
    model, diffusion, y, noise = parts
    sizes = []
    handle = model.middle_block[0].in_norm.mlp_shared.register_forward_hook(
        lambda module, inputs, output: sizes.append(len(output))
    )
    sampled(model, diffusion, y, noise, cache_bytes=0)
    handle.remove()
    assert sizes == [1] * T


# -- the network at a few steps only ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"method": "ddpm"}, {"method": "ddim", "eta": 0.5}, {"method": "ddpm", "tail_steps": 3}]
)
@pytest.mark.parametrize("count", [1, 3, T])
def test_holding_the_prediction_equals_the_naive_loop(parts, options, count):
    model, diffusion, y, noise = parts
    x, calls = noise, []
    for taken, step in enumerate(reversed(range(T))):
        t = torch.full((3,), step)
        if taken in [k * T // count for k in range(count)]:
            output = model(x, diffusion.model_timesteps(t), y.repeat(3, 1, 1, 1))
            x_start = diffusion.posterior(output, x, t)["pred_xstart"]
        mean, _, _ = diffusion.q_posterior(x_start, x, t)
        log_variance = diffusion.posterior(output, x, t)["log_variance"]  # of the network's last word
        out = {"pred_xstart": x_start, "mean": mean, "log_variance": log_variance}
        z = fresh_noise(x, torch.arange(3), SEEDS, diffusion.kept[step])
        if step < options.get("tail_steps", 0):
            x = ddim_step(diffusion, out, x, t, None)
        elif options["method"] == "ddim":
            x = ddim_step(diffusion, out, x, t, z if step else None, options["eta"])
        else:
            x = ancestral_step(diffusion, out, x, t, z)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    result = sampled(model, diffusion, y, noise, seeds=SEEDS, network_steps=count, **options)
    handle.remove()
    assert len(calls) == count and result.steps.tolist() == [T] * 3
    torch.testing.assert_close(result.images, x, rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", ["ddim", "dpm++"])
def test_holding_in_a_deterministic_chain_is_the_respaced_chain(parts, method):
    model, _, y, noise = parts
    betas = beta_schedule("cosine", 40)
    fine = GaussianDiffusion(betas, prediction="v", learn_sigma=True)
    coarse = GaussianDiffusion(betas, [7, 15, 23, 31, 39], prediction="v", learn_sigma=True)
    held = sampled(model, fine, y, noise, method, network_steps=5).images
    torch.testing.assert_close(held, sampled(model, coarse, y, noise, method).images, rtol=0, atol=1e-4)


# -- noise and variance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, eta, variance", [("ddpm", 0.0, "model"), ("ddpm", 0.0, "posterior"), ("ddim", 1.0, "model")]
)
@pytest.mark.parametrize("tail", [0, 1, 3, T])
def test_variance_and_tail_equal_the_naive_loop(parts, method, eta, variance, tail):
    model, diffusion, y, noise = parts
    x = noise
    for step in reversed(range(T)):
        t = torch.full((3,), step)
        out = diffusion.p_mean_variance(model, x, t, y.repeat(3, 1, 1, 1))
        z = fresh_noise(x, torch.arange(3), SEEDS, diffusion.kept[step])
        if step < tail:
            x = ddim_step(diffusion, out, x, t, None)
        elif method == "ddim":
            x = ddim_step(diffusion, out, x, t, z if step else None, eta)
        elif variance == "posterior":
            x = out["mean"] + diffusion.posterior_variance[step].sqrt().float() * z  # zero at t = 0
        else:
            x = ancestral_step(diffusion, out, x, t, z)
    options = {"method": method, "eta": eta, "variance": variance, "tail_steps": tail, "seeds": SEEDS}
    torch.testing.assert_close(sampled(model, diffusion, y, noise, **options).images, x, rtol=0, atol=2e-5)


def test_ancestral_steps_with_the_posterior_variance_are_ddim_with_eta_1(parts):
    model, diffusion, y, noise = parts
    ancestral = sampled(model, diffusion, y, noise, seeds=SEEDS, variance="posterior").images
    ddim = sampled(model, diffusion, y, noise, "ddim", eta=1.0, seeds=SEEDS).images
    torch.testing.assert_close(ancestral, ddim, rtol=0, atol=2e-4)
    assert (ancestral - sampled(model, diffusion, y, noise, seeds=SEEDS).images).abs().max() > 1e-2


def test_the_tail_asks_for_no_noise(parts):
    model, diffusion, y, noise = parts
    asked = []
    sampled(model, diffusion, y, noise, seeds=SEEDS, tail_steps=3, step_noise=lambda t, x, out: asked.append(t))
    assert asked == [7, 6, 5, 4, 3]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"variance": "beta"}, "variance 'beta': unknown; choose one of model, posterior"),
        ({"variance": "posterior", "method": "ddim"}, "ancestral sampling"),
        ({"tail_steps": -1}, "--tail_steps -1: expected 0 to 8"),
        ({"tail_steps": T + 1}, "--tail_steps 9: expected 0 to 8"),
        ({"network_steps": 0}, "network_steps 0: expected 1 to 8"),
        ({"network_steps": T + 1}, "network_steps 9: expected 1 to 8"),
        ({"network_steps": 3, "early_stop": EarlyStop()}, "early stopping needs the network at every step"),
        ({"y": torch.zeros(2, 5, *SIZE)}, "differ in N, H or W"),
    ],
)
def test_bad_arguments(parts, options, words):
    model, diffusion, y, noise = parts
    with pytest.raises(InputError, match=words):
        sampled(model, diffusion, **{"y": y, "noise": noise, **options})
