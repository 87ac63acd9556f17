"""DPM-Solver++(2M): against a plain loop, against the exact solution of a linear equation, and as one of the samplers."""

import math

import pytest
import torch
from conftest import sampled

from guided_diffusion import EarlyStop, InputError
from guided_diffusion.diffusion.gaussian_diffusion import GaussianDiffusion, create_gaussian_diffusion
from guided_diffusion.diffusion.schedules import beta_schedule

PICTURE = (3, 4, 6)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def process(steps=1000, respacing="", schedule="cosine", **options):
    return create_gaussian_diffusion(
        diffusion_steps=steps, noise_schedule=schedule, timestep_respacing=respacing, **options
    )


def network_of(diffusion, predict):
    """A network whose x_0 is predict(x, abar), in the parameterisation of `diffusion`."""
    original = torch.ones(int(diffusion.timestep_map[-1]) + 1, dtype=torch.float64)
    original[diffusion.timestep_map.long()] = diffusion.alphas_cumprod

    def network(x, timesteps, y):
        abar = original[timesteps.long()][:, None, None, None]
        x_start = predict(x.double(), abar)
        eps = (x - abar.sqrt() * x_start) / (1 - abar).sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x_start
        output = {"eps": eps, "x0": x_start, "v": v}[diffusion.prediction]
        return torch.cat([output, 0.3 * output], dim=1).float() if diffusion.learn_sigma else output.float()

    return network


def run(diffusion, predict, method="dpm++", n=2, **options):
    noise, y = normals(n, *PICTURE), torch.zeros(n, 1, *PICTURE[1:])
    return sampled(network_of(diffusion, predict), diffusion, y, noise, method, **options)


def wavy(x, abar):
    """A prediction that is not linear, outside of -1...1 in places, and another one at every step."""
    return 1.3 * torch.sin(x + 3 * abar) - 0.2 * x


# -- the steps --------------------------------------------------------------------------------------------------------


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
        direction = x_start
        if previous is not None:
            r = h_last / h
            direction = (1 + 1 / (2 * r)) * x_start - 1 / (2 * r) * previous
        x = sigma / math.sqrt(1 - abar) * x - alpha * (math.exp(-h) - 1) * direction
        h_last, previous = h, x_start


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    "respacing, options",
    [
        ("20", {"prediction": "v"}),
        ("20", {"prediction": "eps", "learn_sigma": True, "schedule": "linear"}),
        ("ddim10", {"prediction": "x0"}),
        ("3,5,2", {"prediction": "v", "learn_sigma": True}),
        ("", {"prediction": "x0", "steps": 30}),
        ("2", {"prediction": "v"}),
        ("1", {"prediction": "x0"}),
    ],
)
def test_the_chain_equals_the_plain_loop(respacing, options, clip):
    diffusion = process(respacing=respacing, **options)
    images = run(diffusion, wavy, clip_denoised=clip).images
    abars = diffusion.alphas_cumprod.tolist()
    expected = torch.tensor([plain_loop(x, abars, clip) for x in normals(2, *PICTURE).double().flatten().tolist()])
    torch.testing.assert_close(images.flatten(), expected.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("respacing, equal", [("1", 2), ("2", 3), ("5", 2)])
def test_the_first_and_the_last_step_are_those_of_ddim(prediction, respacing, equal):
    states = {}
    for method in ("ddim", "dpm++"):
        states[method] = []
        result = run(
            process(respacing=respacing, prediction=prediction, schedule="linear"),
            wavy,
            method,
            on_step=lambda t, x, out, seen=states[method]: seen.append(x),
        )
        states[method].append(result.images)
    for k, (first, second) in enumerate(zip(*states.values(), strict=True)):
        same = torch.allclose(first, second, rtol=0, atol=1e-4)
        assert same is (k < equal)  # x_T, what the first step makes of it, and with two steps the picture


def test_the_picture_is_the_last_prediction():
    seen = []
    images = run(
        process(respacing="6", prediction="v"), wavy, on_step=lambda t, x, out: seen.append(out["pred_xstart"])
    ).images
    assert torch.equal(images, seen[-1])


# -- order ------------------------------------------------------------------------------------------------------------

MU, STD = 0.3, 0.5


def exact_x0(x, abar):
    """E[x_0 | x_t] for x_0 ~ N(MU, STD^2)."""
    return MU + abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar) * (x - abar.sqrt() * MU)


def flow(x, abar, target):
    """The probability-flow equation's exact solution for x_0 ~ N(MU, STD^2), from noise level abar to another."""

    def spread(level):
        return math.sqrt(level * STD**2 + 1 - level)

    return math.sqrt(target) * MU + spread(target) / spread(abar) * (x - math.sqrt(abar) * MU)


def errors(method, counts):
    """Largest error of the state before the last step, over steps of equal size in lambda from -3 to 3."""
    found = []
    for count in counts:
        abar = torch.sigmoid(2 * torch.linspace(3, -3, count + 1, dtype=torch.float64))
        betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        diffusion, states = GaussianDiffusion(betas.numpy(), prediction="x0"), []
        run(diffusion, exact_x0, method, clip_denoised=False, on_step=lambda t, x, out, seen=states: seen.append(x))
        exact = flow(states[0].double(), abar[-1].item(), abar[0].item())
        found.append((states[-1] - exact).abs().max().item())
    return found


@pytest.mark.parametrize("method, order", [("ddim", 1), ("dpm++", 2)])
def test_the_error_falls_as_the_order_says(method, order):
    coarse, middle, fine = errors(method, (16, 32, 64))
    assert coarse / middle == pytest.approx(2**order, rel=0.2)
    assert middle / fine == pytest.approx(2**order, rel=0.12)


def test_second_order_needs_fewer_steps():
    assert errors("dpm++", [16])[0] < errors("ddim", [64])[0]


# -- as one of the samplers -------------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_its_batch():
    diffusion = process(respacing="8", prediction="v")
    together = run(diffusion, wavy, n=4).images
    assert torch.equal(run(diffusion, wavy, n=2).images, together[:2])
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_history_follows_the_samples_that_early_stopping_leaves():
    def settling(x, abar):
        calm = torch.arange(4)[:, None, None, None] if len(x) == 4 else torch.tensor(left)[:, None, None, None]
        return torch.where(calm % 2 == 0, torch.full_like(x, 0.25), wavy(x, abar))  # 0 and 2 settle at once

    left, diffusion = [1, 3], process(respacing="9", prediction="x0")
    stopped = run(diffusion, settling, n=4, early_stop=EarlyStop(1e-3, patience=3))
    full = run(diffusion, settling, n=4)
    assert stopped.steps.tolist() == [4, 9, 4, 9]
    assert torch.equal(stopped.images[0], torch.full(PICTURE, 0.25))
    assert torch.equal(stopped.images[[1, 3]], full.images[[1, 3]])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_cheap_look_is_the_chain_of_its_network_steps(count):
    betas, kept = beta_schedule("cosine", 40), sorted(39 - k * 40 // count for k in range(count))
    fine, coarse = GaussianDiffusion(betas, prediction="v"), GaussianDiffusion(betas, kept, prediction="v")
    look, chain = run(fine, wavy, network_steps=count), run(coarse, wavy)
    torch.testing.assert_close(look.images, chain.images, rtol=0, atol=1e-4)


def test_the_tail_is_as_the_rest():
    diffusion = process(respacing="9", prediction="v")
    assert torch.equal(run(diffusion, wavy, tail_steps=4).images, run(diffusion, wavy).images)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"eta": 0.5}, r"eta 0.5: it belongs to DDIM; DPM-Solver\+\+ takes no noise"),
        ({"variance": "posterior"}, r"ancestral sampling, not to dpm\+\+"),
        ({"tail_steps": 10}, "--tail_steps 10: expected 0 to 9"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(InputError, match=words):
        run(process(respacing="9"), wavy, **options)
