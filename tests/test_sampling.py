"""The reverse chain: against the exact denoiser of a Gaussian data distribution, naive loops, and itself in batches."""

import itertools

import pytest
import torch
from conftest import normals, sampled, tiny_network

from guided_diffusion import EarlyStop, InputError, sample
from guided_diffusion.diffusion.conditioning import Conditioning
from guided_diffusion.diffusion.gaussian_diffusion import create_gaussian_diffusion
from guided_diffusion.diffusion.sampling import fresh_noise
from guided_diffusion.diffusion.solvers import ancestral_step, ddim_step

PICTURE = (3, 4, 6)  # where nothing depends on the size


def process(steps=1000, respacing="", **options):
    options |= {"diffusion_steps": steps, "noise_schedule": "cosine", "timestep_respacing": respacing}
    return create_gaussian_diffusion(**options)


MU = torch.tensor([-0.4, 0.1, 0.6], dtype=torch.float64)[:, None, None]  # per channel
STD = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)[:, None, None]


def optimal_x0(x, alpha_bar):
    """E[x_0 | x_t] for x_0 ~ N(MU, STD^2), pixel by pixel."""
    return MU + alpha_bar.sqrt() * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar) * (x - alpha_bar.sqrt() * MU)


def optimal_moments(diffusion, **options):
    """Mean and spread of samples, in units of the data's: of the network that knows the data distribution."""
    original = process().alphas_cumprod

    def network(x, timesteps, y):
        alpha_bar = original[timesteps.long()][:, None, None, None]
        x_start = optimal_x0(x.double(), alpha_bar)
        eps = (x - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_start
        return {"eps": eps, "x0": x_start, "v": v}[diffusion.prediction].float()

    # Four pictures of 32x64 pixels, so per channel standard errors of 0.011 of a mean, 0.8 % of a spread.
    options |= {"seeds": range(4), "clip_denoised": False}
    images = sample(network, diffusion, torch.zeros(1, 1, 32, 64), normals(4, 3, 32, 64), **options).images
    flat = images.double().transpose(0, 1).flatten(1)  # (3, 8192)
    return (flat.mean(1) - MU.flatten()) / STD.flatten(), flat.std(1) / STD.flatten()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("method, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 1)])
def test_samples_have_the_mean_and_spread_of_the_data(prediction, method, eta):
    mean, std = optimal_moments(process(respacing="250", prediction=prediction), method=method, eta=eta)
    # 250 steps leave a discretisation error of up to 4 % of the spread; 3 standard errors are 0.033 and 2.4 %.
    assert mean.abs().max() < 0.04 and (std - 1).abs().max() < 0.065


CHAINS = [("ddpm", 0, "model"), ("ddpm", 0, "posterior"), ("ddim", 0.5, "model")]
SIZE, STEPS, SEEDS = (8, 16), 8, [5, 2**40, 7]


@pytest.fixture(scope="module", params=["unet", "enconly"])
def parts(request):
    """A tiny UNet whose output layer is not zero, its process, three label maps, and three starting noises."""
    options = {"timestep_respacing": str(STEPS), "noise_schedule": "cosine", "prediction": "v"}
    model, diffusion = tiny_network(unet_model=request.param, **options)
    return model, diffusion, (normals(3, 5, *SIZE, seed=7) > 0.8).float(), normals(3, 3, *SIZE, seed=8)


@pytest.mark.parametrize("method, eta", [("ddpm", 0), ("ddim", 0.5), ("dpm++", 0)])
@pytest.mark.parametrize("s", [1.0, 1.5])
def test_batch_equals_its_samples_one_by_one(parts, method, eta, s):
    (model, diffusion, y, noise), options = parts, {"method": method, "eta": eta, "s": s}
    together = sample(model, diffusion, y, noise, seeds=torch.tensor(SEEDS), **options).images
    uncached = sample(model, diffusion, Conditioning(model, y, s, 0), noise, seeds=SEEDS, **options).images
    torch.testing.assert_close(uncached, together, rtol=0, atol=1e-5)
    for k in range(3):
        one = slice(k, k + 1)
        alone = sample(model, diffusion, y[one], noise[one], seeds=SEEDS[one], **options).images
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache_bytes", [0, 2**31])
@pytest.mark.parametrize("s", [1.0, 2.0])
def test_one_label_map_serves_all_samples(parts, s, cache_bytes):
    model, diffusion, y, noise = parts
    options = {"s": s, "seeds": SEEDS, "early_stop": EarlyStop(0.3, patience=1)}
    maps = (y[:1], y[:1].repeat(3, 1, 1, 1), torch.zeros_like(y))
    conditions = (Conditioning(model, y, s, cache_bytes) for y in maps)
    shared, repeated, other = (sample(model, diffusion, y, noise, **options) for y in conditions)
    assert shared.steps.tolist() == repeated.steps.tolist()
    torch.testing.assert_close(shared.images, repeated.images, rtol=0, atol=1e-5)
    assert (shared.images - other.images).abs().max() > 1e-3  # the label map matters


@pytest.mark.parametrize("count", [1, 3, STEPS])
@pytest.mark.parametrize("tail", [0, 1, 3, STEPS])
@pytest.mark.parametrize("method, eta, variance", CHAINS)
def test_chain_equals_the_naive_loop(parts, method, eta, variance, tail, count):
    model, diffusion, y, noise = parts
    x, calls = noise, []
    for taken, step in enumerate(reversed(range(STEPS))):
        t = torch.full((3,), step)
        if taken in [k * STEPS // count for k in range(count)]:  # else the prediction is held
            output = model(x, diffusion.model_timesteps(t), y)
            x_start = diffusion.posterior(output, x, t)["pred_xstart"]
        out = diffusion.posterior(output, x, t) | {"pred_xstart": x_start}
        out["mean"] = diffusion.q_posterior(x_start, x, t)[0]
        z = fresh_noise(x, torch.arange(3), SEEDS, diffusion.kept[step]) if step else None
        if step < tail:
            x = ddim_step(diffusion, out, x, t)
        elif method == "ddim":
            x = ddim_step(diffusion, out, x, t, z, eta)
        elif variance == "posterior" and step:
            x = out["mean"] + diffusion.posterior_variance[step].sqrt().float() * z
        else:
            x = ancestral_step(out, z)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    options = {"eta": eta, "variance": variance, "tail_steps": tail, "network_steps": count}
    result = sampled(model, diffusion, y, noise, method, seeds=SEEDS, **options)
    handle.remove()
    assert len(calls) == count and result.steps.tolist() == [STEPS] * 3 and not result.images.requires_grad
    torch.testing.assert_close(result.images, x, rtol=0, atol=5e-5)


def test_training_mode_comes_back(parts):
    (model, diffusion, y, noise), seen = parts, []
    model.train()
    sample(model, diffusion, y, noise, on_step=lambda *_: seen.append(model.training))
    assert model.training and seen == [False] * STEPS
    with pytest.raises(InputError):
        sample(model, diffusion, y[:, 1:], noise)
    assert model.training
    model.eval()


T = 20
SETTLES = [-1, 15, 4, -1, 19, 17, 9]  # two never settle; some leave while others are counting
LEVELS = [0.1 * k - 0.4 for k in range(7)]


def drift(t, settles, level):
    """Predicted x_0 at step t: falls fast until step `settles`, then slowly. Moves 0.031, then 0.001 a step."""
    return level + 0.03 * max(t - settles, 0) + 0.001 * t


def drifting(x, timesteps, y):
    """A network ("x0") that reads from the labels at which step, and near which level, its prediction settles."""
    values = [drift(t, *labels) for t, labels in zip(timesteps.tolist(), y[:, :, 0, 0].tolist(), strict=True)]
    return torch.tensor(values)[:, None, None, None].expand_as(x)


def expected_end(settles, level, rule):
    """(steps taken, x_0) by a plain loop over the predictions; x_0 is None where the chain runs to its end."""
    calm = 0
    for taken, t in enumerate(reversed(range(T)), 1):
        if taken > 1:
            calm = calm + 1 if abs(drift(t, settles, level) - drift(t + 1, settles, level)) < rule.tol else 0
        if calm >= rule.patience and taken >= rule.min_steps:
            return taken, drift(t, settles, level)
    return T, None


def run_drifting(method="ddpm", **options):
    y = torch.tensor([SETTLES, LEVELS]).T[:, :, None, None].expand(-1, 2, *PICTURE[1:])
    noise = normals(len(SETTLES), *PICTURE)
    return sample(drifting, process(T, prediction="x0"), y, noise, method, seeds=range(len(SETTLES)), **options)


@pytest.mark.parametrize("method, eta", [("ddpm", 0), ("ddim", 1), ("dpm++", 0)])
@pytest.mark.parametrize("rule", [EarlyStop(0.01, patience=3), EarlyStop(0.01, patience=1, min_steps=12)])
def test_early_stop_lets_settled_samples_leave_and_the_others_do_not_notice(rule, method, eta):
    running, asked = [], []
    options = {"on_step": lambda t, x, out: running.append(out["rows"].tolist())}
    options["step_noise"] = lambda t, x, out: asked.append((len(x), len(out["mean"]), out["rows"].tolist()))
    result, full = run_drifting(method, eta=eta, early_stop=rule, **options), run_drifting(method, eta=eta)
    ends = [expected_end(*labels, rule) for labels in zip(SETTLES, LEVELS, strict=True)]
    assert result.steps.tolist() == [taken for taken, _ in ends] and len({taken for taken, _ in ends}) >= 3
    assert full.steps.tolist() == [T] * len(SETTLES)
    for k, (_, x_start) in enumerate(ends):
        expected = full.images[k] if x_start is None else torch.full(PICTURE, x_start)
        torch.testing.assert_close(result.images[k], expected, rtol=0, atol=1e-6)
    left = [[k for k, (steps, _) in enumerate(ends) if steps > taken or steps == T] for taken in range(T)]
    assert running == left
    assert asked == ([(len(rows), len(rows), rows) for rows in left[1:]] if method != "dpm++" else [])


def test_early_stop_counts_consecutive_steps_and_ends_when_all_are_done():
    values = [0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.9]  # two calm steps, a move, three calm steps

    def network(x, timesteps, y):
        return torch.full_like(x, values[7 - int(timesteps[0])])

    options, seen = {"early_stop": EarlyStop(tol=0.01, patience=3), "on_step": lambda t, x, out: seen.append(t)}, []
    result = sample(network, process(8, prediction="x0"), torch.zeros(2, 1, 4, 6), normals(2, *PICTURE), **options)
    assert result.steps.tolist() == [7, 7] and seen == [7, 6, 5, 4, 3, 2, 1]
    torch.testing.assert_close(result.images, torch.full((2, *PICTURE), 0.1))


@pytest.mark.parametrize("bad", [{"tol": 0}, {"tol": float("nan")}, {"patience": 0}, {"min_steps": 0}])
def test_early_stop_refuses_bad_rules(bad):
    with pytest.raises(InputError, match="tol must be above 0"):
        EarlyStop(**bad)


def chain(diffusion, n=3, **options):
    """Run with a network that always predicts zeros, and return the result and (t, x, out) of every step."""
    trace = []
    options["on_step"] = lambda t, x, out: trace.append((t, x, out))
    y, noise = torch.zeros(n, 1, *PICTURE[1:]), normals(n, *PICTURE)
    return sample(lambda x, timesteps, y: torch.zeros_like(x), diffusion, y, noise, **options), trace


def fresh_noises(diffusion, **options):
    """The z of every step of an ancestral chain, by original timestep: (x_{t-1} - mean) / sigma."""
    _, trace = chain(diffusion, **options)
    return {
        diffusion.kept[t]: (after[1] - out["mean"]) / (0.5 * out["log_variance"]).exp()
        for (t, _, out), after in itertools.pairwise(trace)
    }


def test_noise_without_seeds_is_that_of_the_global_generator():
    images = []
    for seed, seeds in ((1, None), (1, None), (2, None), (1, [4, 5, 6]), (2, [4, 5, 6])):
        torch.manual_seed(seed)
        images.append(chain(process(10), seeds=seeds)[0].images)
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert torch.equal(images[3], images[4])


def test_step_noise_replaces_the_noise_of_a_step():
    asked = []

    def step_noise(t, x, out):
        asked.append(t)
        return None if t == 5 else torch.full_like(x, float(t))

    diffusion = process(10, prediction="x0")
    usual, noises = (fresh_noises(diffusion, seeds=[1, 2, 3], **more) for more in ({}, {"step_noise": step_noise}))
    assert asked == list(range(9, 0, -1))  # the last step has no noise
    for t, z in noises.items():
        torch.testing.assert_close(z, usual[5] if t == 5 else torch.full_like(z, float(t)), rtol=0, atol=1e-3)


def test_sample_names_what_does_not_fit():
    fits = {"y": torch.zeros(2, 1, 4, 6), "noise": torch.zeros(2, *PICTURE)}
    for change in ({"seeds": [1]}, {"noise": torch.zeros(3, *PICTURE)}, {"noise": torch.zeros(2, 3, 4, 8)}):
        with pytest.raises(InputError, match="1 for 2 samples" if "seeds" in change else "differ in N, H or W"):
            sample(lambda x, timesteps, y: x, process(4), **{**fits, **change})
