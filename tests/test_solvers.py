"""Step rules: DDPM's and DDIM's formulas; DPM-Solver++(2M) against a plain loop; settings."""

import math

import pytest
import torch
from conftest import normals, sampled

from guided_diffusion import InputError
from guided_diffusion.diffusion.gaussian_diffusion import GaussianDiffusion, create_gaussian_diffusion
from guided_diffusion.diffusion.schedules import beta_schedule
from guided_diffusion.diffusion.solvers import SamplerSettings, StepRule, ancestral_step, ddim_step

PICTURE = (3, 4, 6)


def process(steps=1000, respacing="", schedule="cosine", **options):
    names = {"diffusion_steps": steps, "noise_schedule": schedule, "timestep_respacing": respacing}
    return create_gaussian_diffusion(**names, **options)


def test_ancestral_and_ddim_steps_equal_the_formulas():
    diffusion, x, z = process(20), normals(4, *PICTURE), normals(4, *PICTURE, seed=1)
    t = torch.tensor([1, 2, 10, 19])
    out = diffusion.posterior(normals(4, *PICTURE, seed=2), x, t)
    ancestral, free = ancestral_step(out, z), ddim_step(diffusion, out, x, t)
    noisy = ddim_step(diffusion, out, x, t, z, eta=0.5)
    torch.testing.assert_close(ancestral, out["mean"] + out["variance"].sqrt() * z)
    for k, step in enumerate(t.tolist()):
        at, before = diffusion.alphas_cumprod[step].item(), diffusion.alphas_cumprod_prev[step].item()
        x_start = out["pred_xstart"][k]
        eps = (x[k] - math.sqrt(at) * x_start) / math.sqrt(1 - at)
        for sigma, found in ((0, free), (0.5 * math.sqrt((1 - before) / (1 - at)) * math.sqrt(1 - at / before), noisy)):
            expected = math.sqrt(before) * x_start + math.sqrt(1 - before - sigma**2) * eps + sigma * z[k]
            torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=1e-5)


def run(diffusion, predict, method="dpm++", **options):
    """Run two chains of a network whose x_0 is predict(x, abar), in the parameterisation of `diffusion`."""
    original = torch.ones(int(diffusion.timestep_map[-1]) + 1, dtype=torch.float64)
    original[diffusion.timestep_map.long()] = diffusion.alphas_cumprod

    def network(x, timesteps, y):
        abar = original[timesteps.long()][:, None, None, None]
        x_start = predict(x.double(), abar)
        eps = (x - abar.sqrt() * x_start) / (1 - abar).sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x_start
        output = {"eps": eps, "x0": x_start, "v": v}[diffusion.prediction]
        return torch.cat([output, 0.3 * output], dim=1).float() if diffusion.learn_sigma else output.float()

    return sampled(network, diffusion, torch.zeros(1, 1, *PICTURE[1:]), normals(2, *PICTURE), method, **options).images


def wavy(x, abar):
    """A prediction that is not linear, outside of -1...1 in places, and another one at every step."""
    return 1.3 * torch.sin(x + 3 * abar) - 0.2 * x


def plain_loop(x, abars, clip):
    """Algorithm 2 of the paper for one number x in float64; `abars` ascend in noise, the first is the last step's."""
    start, h_last, previous = list(reversed(abars)), None, None
    for k, abar in enumerate(start):
        x_start = wavy(torch.tensor(x, dtype=torch.float64), torch.tensor(abar, dtype=torch.float64)).item()
        x_start = min(1.0, max(-1.0, x_start)) if clip else x_start
        if k == len(start) - 1:
            return x_start
        alpha, sigma = math.sqrt(start[k + 1]), math.sqrt(1 - start[k + 1])
        h = math.log(alpha / sigma) - math.log(math.sqrt(abar) / math.sqrt(1 - abar))
        weight = 0 if previous is None else h / h_last / 2  # 1 / (2 r)
        direction = x_start if previous is None else (1 + weight) * x_start - weight * previous
        x = sigma / math.sqrt(1 - abar) * x - alpha * (math.exp(-h) - 1) * direction
        h_last, previous = h, x_start


@pytest.mark.parametrize(
    "respacing, clip, options",
    [
        ("20", True, {"prediction": "eps", "learn_sigma": True, "schedule": "linear"}),
        ("3,5,2", False, {"prediction": "v", "learn_sigma": True}),
        ("", False, {"prediction": "x0", "steps": 30}),
        ("1", True, {"prediction": "x0"}),
    ],
)
def test_dpm_solver_equals_the_plain_loop(respacing, clip, options):
    diffusion = process(respacing=respacing, **options)
    abars = diffusion.alphas_cumprod.tolist()
    expected = torch.tensor([plain_loop(x, abars, clip) for x in normals(2, *PICTURE).double().flatten().tolist()])
    found = run(diffusion, wavy, clip_denoised=clip).flatten()
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_dpm_solver_with_few_network_steps_is_the_chain_of_these(count):
    betas, kept = beta_schedule("cosine", 40), sorted(39 - k * 40 // count for k in range(count))
    fine, coarse = GaussianDiffusion(betas, prediction="v"), GaussianDiffusion(betas, kept, prediction="v")
    assert StepRule(fine, SamplerSettings(), count).evaluated == {*kept}
    torch.testing.assert_close(run(fine, wavy, network_steps=count), run(coarse, wavy), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "plms"}, "'plms'.*ddpm, ddim or dpm"),
        ({"eta": 0.5, "method": "dpm++"}, r"--eta 0.5 with dpm\+\+: expected 0 to 1 with ddim"),
        ({"eta": float("nan"), "method": "ddim"}, "--eta nan with ddim: expected 0"),
        ({"s": 0.9}, "--s 0.9.*at least 1"),
        ({"tail_steps": 10}, "--tail_steps 10: expected 0 to 9"),
    ],
)
def test_settings_name_a_bad_flag(settings, words):
    with pytest.raises(InputError, match=words):
        StepRule(process(respacing="9"), SamplerSettings(**settings))
