"""The reverse chain: against the exact denoiser of a Gaussian data distribution, against itself in other batches."""

import itertools
import math

import pytest
import torch
from conftest import tiny_network

from guided_diffusion import EarlyStop, InputError, sample
from guided_diffusion.diffusion.gaussian_diffusion import create_gaussian_diffusion
from guided_diffusion.diffusion.solvers import ancestral_step, ddim_step

PICTURE = (3, 4, 6)  # where nothing depends on the size


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def process(steps=1000, respacing="", schedule="cosine", **options):
    return create_gaussian_diffusion(
        diffusion_steps=steps, noise_schedule=schedule, timestep_respacing=respacing, **options
    )


# -- a Gaussian data distribution: every optimal prediction is known --------------------------------------------------

MU = torch.tensor([-0.4, 0.1, 0.6], dtype=torch.float64)[:, None, None]  # per channel
STD = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)[:, None, None]
# Four pictures of 32x64 pixels, so per channel standard errors of 0.011 STD of a mean, 0.8 % of a standard deviation.
SAMPLES = (4, 3, 32, 64)


def optimal_x0(x, alpha_bar):
    """E[x_0 | x_t] and Var[x_0 | x_t] for x_0 ~ N(MU, STD^2), pixel by pixel."""
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    mean = MU + alpha_bar.sqrt() * STD**2 / variance * (x - alpha_bar.sqrt() * MU)
    return mean, STD**2 * (1 - alpha_bar) / variance


def optimal_network(diffusion):
    """The network that knows the data distribution, in the parameterisation of `diffusion`."""
    original = process().alphas_cumprod

    def network(x, timesteps, y):
        alpha_bar = original[timesteps.long()][:, None, None, None]
        x_start, spread = optimal_x0(x.double(), alpha_bar)
        eps = (x - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_start
        output = {"eps": eps, "x0": x_start, "v": v}[diffusion.prediction]
        if diffusion.learn_sigma:  # the exact variance of q(x_{t-1} | x_t)
            t = diffusion.kept.index(int(timesteps[0]))
            lower, upper = diffusion.posterior_log_variance[t], diffusion.log_betas[t]
            variance = diffusion.posterior_variance[t] + diffusion.posterior_mean_x0[t] ** 2 * spread
            raw = 2 * (variance.log() - lower) / (upper - lower) - 1 if t else torch.zeros_like(variance)
            output = torch.cat([output, raw.expand_as(output)], dim=1)
        return output.float()

    return network


def run_optimal(diffusion, **options):
    noise, y = normals(*SAMPLES), torch.zeros(4, 1, 32, 64)
    return sample(
        optimal_network(diffusion), diffusion, y, noise, seeds=range(4), clip_denoised=False, **options
    ).images


def moments(images):
    flat = images.double().transpose(0, 1).flatten(1)  # (3, 8192)
    return flat.mean(1), flat.std(1)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("method, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 1)])
def test_samples_have_the_mean_and_spread_of_the_data(prediction, method, eta):
    mean, std = moments(run_optimal(process(respacing="250", prediction=prediction), method=method, eta=eta))
    # 250 steps leave a discretisation error of up to 4 % of the spread (see below); 3 standard errors are 0.033 and 2.4 %.
    torch.testing.assert_close(mean / STD.flatten(), (MU / STD).flatten(), rtol=0, atol=0.04)
    torch.testing.assert_close(std / STD.flatten(), torch.ones(3).double(), rtol=0, atol=0.065)


def chain_moments(diffusion, method, eta):
    """Mean and standard deviation of the chain's end: each step is linear in x, so both follow from a float64 recurrence."""
    mean, variance = torch.zeros_like(MU), torch.ones_like(MU)
    for t in reversed(range(diffusion.num_timesteps)):
        at, before = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
        beta = 1 - at / before
        posterior = beta * (1 - before) / (1 - at)

        def step(x, at=at, before=before, beta=beta, posterior=posterior):
            x_start, _ = optimal_x0(x, at)
            if method == "ddpm":
                return before.sqrt() * beta / (1 - at) * x_start + (1 - beta).sqrt() * (1 - before) / (1 - at) * x
            eps = (x - at.sqrt() * x_start) / (1 - at).sqrt()
            return before.sqrt() * x_start + (1 - before - eta**2 * posterior).sqrt() * eps

        fresh = beta if method == "ddpm" else eta**2 * posterior
        slope = step(torch.ones_like(MU)) - step(torch.zeros_like(MU))
        mean, variance = step(mean), slope**2 * variance + (fresh if t else 0)
    return mean.flatten(), variance.sqrt().flatten()


@pytest.mark.parametrize("respacing", ["20", "ddim50"])
@pytest.mark.parametrize("method, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 0.5), ("ddim", 1)])
def test_few_steps_give_exactly_the_moments_of_the_recurrence(method, eta, respacing):
    diffusion = process(respacing=respacing)
    expected_mean, expected_std = chain_moments(diffusion, method, eta)
    mean, std = moments(run_optimal(diffusion, method=method, eta=eta))
    torch.testing.assert_close(
        mean / STD.flatten(), expected_mean / STD.flatten(), rtol=0, atol=0.044
    )  # 4 standard errors
    torch.testing.assert_close(std / expected_std, torch.ones(3).double(), rtol=0, atol=0.032)


@pytest.mark.parametrize("method, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 1)])
def test_the_recurrence_tends_to_the_data_distribution(method, eta):
    errors = []
    for respacing in ("50", "250"):
        mean, std = chain_moments(process(respacing=respacing), method, eta)
        torch.testing.assert_close(mean, MU.flatten(), rtol=0, atol=1e-3)
        errors.append((std / STD.flatten() - 1).abs().max().item())
    assert errors[0] > 3 * errors[1] and errors[1] < 0.04


def test_the_exact_learned_variance_needs_ten_steps_only():
    diffusion = process(respacing="10", learn_sigma=True)
    mean, std = moments(run_optimal(diffusion, method="ddpm"))
    torch.testing.assert_close(mean / STD.flatten(), (MU / STD).flatten(), rtol=0, atol=0.044)
    torch.testing.assert_close(std / STD.flatten(), torch.ones(3).double(), rtol=0, atol=0.032)


def test_deterministic_ddim_equals_the_naive_loop():
    diffusion = process(respacing="20", prediction="v")
    x = normals(*SAMPLES).double()
    for t in reversed(range(20)):
        at, before = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
        x_start, _ = optimal_x0(x, at)
        x = before.sqrt() * x_start + (1 - before).sqrt() / (1 - at).sqrt() * (x - at.sqrt() * x_start)
    torch.testing.assert_close(run_optimal(diffusion, method="ddim").double(), x, rtol=0, atol=1e-5)


def test_single_steps_equal_the_formulas():
    diffusion, x, z = process(20), normals(4, *PICTURE), normals(4, *PICTURE, seed=1)
    t = torch.tensor([0, 1, 10, 19])
    out = diffusion.posterior(normals(4, *PICTURE, seed=2), x, t)
    ancestral, free = ancestral_step(diffusion, out, x, t, z), ddim_step(diffusion, out, x, t, None)
    noisy = ddim_step(diffusion, out, x, t, z, eta=0.5)
    for k, step in enumerate(t.tolist()):
        noise = out["variance"][k].sqrt() * z[k] if step else 0
        torch.testing.assert_close(ancestral[k], out["mean"][k] + noise)
        at, before = diffusion.alphas_cumprod[step].item(), diffusion.alphas_cumprod_prev[step].item()
        x_start = out["pred_xstart"][k]
        eps = (x[k] - math.sqrt(at) * x_start) / math.sqrt(1 - at)
        torch.testing.assert_close(
            free[k], math.sqrt(before) * x_start + math.sqrt(1 - before) * eps, rtol=1e-4, atol=1e-5
        )
        sigma = 0.5 * math.sqrt((1 - before) / (1 - at)) * math.sqrt(1 - at / before)
        expected = math.sqrt(before) * x_start + math.sqrt(1 - before - sigma**2) * eps + sigma * z[k]
        torch.testing.assert_close(noisy[k], expected, rtol=1e-4, atol=1e-5)


# -- a real network ---------------------------------------------------------------------------------------------------

SIZE = (8, 16)


@pytest.fixture(scope="module")
def unet():
    """A tiny UNet whose output layer is not zero, and its 20-step process."""
    return tiny_network(timestep_respacing="20")


def conditions(n=4):
    """Labels (n, 5, H, W) and starting noises (n, 3, H, W)."""
    return (normals(n, 5, *SIZE, seed=7) > 0.8).float(), normals(n, 3, *SIZE, seed=8)


@pytest.mark.parametrize(
    "options", [{"method": "ddpm", "s": 1.5}, {"method": "ddim", "eta": 0.5}, {"method": "dpm++", "s": 1.5}]
)
def test_a_batch_of_four_equals_four_batches_of_one(unet, options):
    (y, noise), seeds = conditions(), torch.tensor([5, 2**40, 7, 5])
    together = sample(*unet, y, noise, seeds=seeds, **options).images
    for k in range(4):
        one = slice(k, k + 1)
        alone = sample(*unet, y[one], noise[one], seeds=seeds[one], **options).images
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("s", [1.0, 3.0])
def test_reusing_the_label_maps_changes_nothing(unet, s):
    arguments = (unet[0], process(respacing="6", learn_sigma=True), *conditions(2))
    reused = sample(*arguments, seeds=[1, 2], s=s).images
    recomputed = sample(*arguments, seeds=[1, 2], s=s, cache_bytes=0).images
    torch.testing.assert_close(reused, recomputed, rtol=0, atol=1e-5)
    assert (reused - sample(*arguments, seeds=[1, 2], s=s + 1).images).abs().max() > 1e-3  # guidance does something


def test_label_maps_are_computed_once_or_never(unet):
    model, diffusion = unet[0], process(respacing="6", learn_sigma=True)
    (y, noise), calls = conditions(1), []
    handle = model.middle_block[0].in_norm.mlp_shared.register_forward_hook(lambda *_: calls.append(1))
    sample(model, diffusion, y, noise, s=2.0)
    counts = [len(calls)]
    needed = model.modulation_bytes(2, *SIZE)  # one picture and the empty labels
    for cache_bytes in (needed, needed - 1, needed // 2 - 1):
        calls.clear()
        sample(model, diffusion, y, noise, s=2.0, cache_bytes=cache_bytes)
        counts.append(len(calls))
    handle.remove()
    assert counts == [2, 2, 1 + 6, 2 * 6]  # the empty labels' maps are the first to go


@pytest.mark.parametrize("method, s, cache_bytes", [("ddim", 1.0, 0), ("ddim", 2.0, 2**31), ("dpm++", 1.0, 2**31)])
def test_early_stop_with_a_network_leaves_the_other_samples_alone(unet, method, s, cache_bytes):
    (y, noise), predictions = conditions(), []
    options = {"method": method, "s": s, "cache_bytes": cache_bytes}
    full = sample(*unet, y, noise, on_step=lambda t, x, out: predictions.append(out["pred_xstart"]), **options)
    moves = (predictions[7] - predictions[6]).square().mean(dim=(1, 2, 3)).sqrt()
    between = moves.sort().values[1:3].mean().item()  # two samples move less at the eighth step, two more
    rule = EarlyStop(tol=between, patience=1, min_steps=8)
    stopped = sample(*unet, y, noise, early_stop=rule, **options)
    first = stopped.steps == 8
    assert first.tolist() == (moves < between).tolist() and first.sum() == 2
    torch.testing.assert_close(stopped.images[first], predictions[7][first], rtol=0, atol=1e-5)
    for k in range(4):  # whoever stops later does so with the prediction of the full run at that step
        expected = predictions[stopped.steps[k] - 1][k] if stopped.steps[k] < 20 else full.images[k]
        torch.testing.assert_close(stopped.images[k], expected, rtol=0, atol=1e-4)


def test_the_training_mode_comes_back(unet):
    model, diffusion = unet[0], process(respacing="3", learn_sigma=True)
    (y, noise), seen = conditions(1), []
    for mode in (True, False):
        model.train(mode)
        sample(model, diffusion, y, noise, on_step=lambda *_: seen.append(model.training))
        assert model.training is mode
    model.train()
    with pytest.raises(InputError):
        sample(model, diffusion, y, noise, s=0.5)
    assert model.training
    model.eval()
    assert len(seen) == 6 and not any(seen)


# -- early stopping, by a network whose predictions are known ---------------------------------------------------------

T = 20


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


SETTLES = [-1, 15, 4, -1, 19, 17, 9]  # two never settle; some leave while others are counting
LEVELS = [0.1 * k - 0.4 for k in range(7)]


def run_drifting(method="ddpm", **options):
    y = torch.tensor([SETTLES, LEVELS]).T[:, :, None, None].expand(-1, 2, *PICTURE[1:])
    noise = normals(len(SETTLES), *PICTURE)
    return sample(drifting, process(T, prediction="x0"), y, noise, method, seeds=range(len(SETTLES)), **options)


@pytest.mark.parametrize("method, eta", [("ddpm", 0), ("ddim", 1), ("dpm++", 0)])
@pytest.mark.parametrize(
    "rule",
    [EarlyStop(0.01, patience=3, min_steps=1), EarlyStop(0.01, patience=1, min_steps=12), EarlyStop(0.01, patience=2)],
)
def test_settled_samples_leave_and_the_others_do_not_notice(rule, method, eta):
    running = []
    result = run_drifting(
        method, eta=eta, early_stop=rule, on_step=lambda t, x, out: running.append(out["rows"].tolist())
    )
    full = run_drifting(method, eta=eta)
    ends = [expected_end(*labels, rule) for labels in zip(SETTLES, LEVELS, strict=True)]
    assert result.steps.tolist() == [taken for taken, _ in ends]
    assert full.steps.tolist() == [T] * len(SETTLES)
    assert len({taken for taken, _ in ends}) >= 3  # they differ
    for k, (_, x_start) in enumerate(ends):
        expected = full.images[k] if x_start is None else torch.full(PICTURE, x_start)
        torch.testing.assert_close(result.images[k], expected, rtol=0, atol=1e-6)
    for taken, rows in enumerate(running, 1):
        assert rows == [k for k, (steps, _) in enumerate(ends) if steps >= taken]


def test_the_chain_ends_when_all_samples_are_done():
    steps = []
    result = run_drifting(early_stop=EarlyStop(tol=1.0, patience=2), on_step=lambda t, x, out: steps.append(t))
    assert result.steps.tolist() == [3] * 7 and steps == [19, 18, 17]


def test_a_sample_that_moves_again_starts_counting_anew():
    values = [0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.9]  # two calm steps, a move, three calm steps

    def network(x, timesteps, y):
        return torch.full_like(x, values[7 - int(timesteps[0])])

    result = sample(
        network,
        process(8, prediction="x0"),
        torch.zeros(1, 1, 4, 6),
        normals(1, *PICTURE),
        early_stop=EarlyStop(tol=0.01, patience=3),
    )
    assert result.steps.tolist() == [7]
    torch.testing.assert_close(result.images, torch.full((1, *PICTURE), 0.1))


@pytest.mark.parametrize("bad", [{"tol": 0}, {"tol": -1}, {"tol": float("nan")}, {"patience": 0}, {"min_steps": 0}])
def test_early_stop_rules_are_checked(bad):
    with pytest.raises(InputError, match="tol must be above 0"):
        EarlyStop(**bad)


# -- the noise of the steps -------------------------------------------------------------------------------------------


def zero(x, timesteps, y):
    return torch.zeros_like(x)


def chain(diffusion, n=3, **options):
    """Run with a network that always predicts the same, and return the result and (t, x, out) of every step."""
    trace = []
    result = sample(
        zero,
        diffusion,
        torch.zeros(n, 1, 4, 6),
        normals(n, *PICTURE),
        on_step=lambda t, x, out: trace.append((t, x, out)),
        **options,
    )
    return result, trace


def fresh_noises(diffusion, **options):
    """The z of every step of an ancestral chain, by original timestep: (x_{t-1} - mean) / sigma."""
    _, trace = chain(diffusion, **options)
    return {
        diffusion.kept[t]: (after[1] - out["mean"]) / (0.5 * out["log_variance"]).exp()
        for (t, _, out), after in itertools.pairwise(trace)
    }


def test_noise_follows_from_seed_and_original_timestep():
    seeds = [11, 12, 11]
    full = fresh_noises(process(40, prediction="x0"), seeds=seeds)
    short = fresh_noises(process(40, "ddim10", prediction="x0"), seeds=seeds)
    assert list(short) == list(range(36, 0, -4)) and list(full) == list(range(39, 0, -1))
    for timestep, z in short.items():
        torch.testing.assert_close(z, full[timestep], rtol=0, atol=1e-3)
        torch.testing.assert_close(z[0], z[2], rtol=0, atol=1e-3)  # same seed
        assert (z[0] - z[1]).abs().max() > 0.1  # other seed
        assert (z[0] - full[timestep - 1][0]).abs().max() > 0.1  # other timestep
    values = torch.stack(list(full.values()))[:, :2].flatten()  # 39 steps, 2 seeds, 72 pixels
    assert abs(values.mean().item()) < 0.06 and values.std().item() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("options", [{"method": "ddpm"}, {"method": "ddim", "eta": 0.7}])
def test_seeds_make_a_chain_reproducible_whatever_the_batch_and_the_global_generator(options):
    diffusion = process(10)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    result, _ = chain(diffusion, seeds=torch.tensor([4, 5, 6]), **options)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from it
    torch.manual_seed(2)
    again, _ = chain(diffusion, seeds=[4, 5, 6], **options)
    fewer, _ = chain(diffusion, n=2, seeds=[4, 5], **options)
    torch.testing.assert_close(again.images, result.images, rtol=0, atol=0)
    torch.testing.assert_close(fewer.images, result.images[:2], rtol=0, atol=1e-6)
    other, _ = chain(diffusion, seeds=[4, 5, 7], **options)
    assert torch.equal(other.images[:2], result.images[:2]) and not torch.equal(other.images[2], result.images[2])


def test_without_seeds_the_global_generator_is_used():
    images = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        images.append(chain(process(10))[0].images)
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


@pytest.mark.parametrize("method", ["ddim", "dpm++"])
def test_deterministic_samplers_draw_nothing(method):
    state = torch.get_rng_state()
    first, _ = chain(process(10), method=method)
    assert torch.equal(torch.get_rng_state(), state)
    seeded, _ = chain(process(10), method=method, seeds=[1, 2, 3], step_noise=lambda t, x, out: pytest.fail("called"))
    assert torch.equal(first.images, seeded.images)


def test_step_noise_replaces_the_noise_of_a_step():
    asked = []

    def step_noise(t, x, out):
        asked.append((t, out["rows"].tolist()))
        assert x.shape == out["pred_xstart"].shape == (3, *PICTURE)
        return None if t == 5 else torch.full_like(x, float(t))

    diffusion = process(10, prediction="x0")
    noises = fresh_noises(diffusion, seeds=[1, 2, 3], step_noise=step_noise)
    usual = fresh_noises(diffusion, seeds=[1, 2, 3])
    assert asked == [(t, [0, 1, 2]) for t in range(9, 0, -1)]  # the last step has no noise
    for t, z in noises.items():
        expected = usual[5] if t == 5 else torch.full_like(z, float(t))
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-3)


def test_step_noise_is_asked_for_the_samples_still_running():
    rule, asked = EarlyStop(0.01, patience=2), []

    def step_noise(t, x, out):
        asked.append(out["rows"].tolist())
        assert len(x) == len(out["rows"]) == len(out["mean"])
        return torch.zeros_like(x) if t % 2 else None

    run_drifting(early_stop=rule, step_noise=step_noise)
    ends = [expected_end(*labels, rule)[0] for labels in zip(SETTLES, LEVELS, strict=True)]
    # A sample that is done after so many steps needs no noise for that step any more.
    assert asked == [[k for k, steps in enumerate(ends) if steps > taken or steps == T] for taken in range(1, T)]


def test_on_step_sees_every_step_and_the_last_one_has_no_noise():
    diffusion = process(10, prediction="x0")
    result, trace = chain(diffusion, seeds=[1, 2, 3])
    assert [t for t, _, _ in trace] == list(range(9, -1, -1))
    assert torch.equal(trace[0][1], normals(3, *PICTURE))
    for t, x, out in trace:
        expected = diffusion.p_mean_variance(zero, x, torch.full((3,), t), y=torch.zeros(3, 1, 4, 6))
        for name, value in expected.items():
            torch.testing.assert_close(out[name], value)
    assert torch.equal(result.images, trace[-1][2]["mean"])


def test_sampling_leaves_its_arguments_alone_and_keeps_no_graph(unet):
    y, noise = conditions(2)
    before = (y.clone(), noise.clone())
    result = sample(*unet, y, noise)
    assert torch.equal(y, before[0]) and torch.equal(noise, before[1])
    assert not result.images.requires_grad
    assert (
        result.images.shape == (2, 3, *SIZE) and result.steps.tolist() == [20, 20] and result.steps.dtype == torch.int64
    )


def test_clipping_keeps_pictures_in_range():
    def bright(x, timesteps, y):
        return torch.full_like(x, 1.5)

    arguments = (bright, process(10, prediction="x0"), torch.zeros(1, 1, 4, 6), normals(1, *PICTURE))
    for method in ("ddpm", "ddim", "dpm++"):
        clipped = sample(*arguments, method, seeds=[0]).images
        torch.testing.assert_close(clipped, torch.ones_like(clipped))
        free = sample(*arguments, method, seeds=[0], clip_denoised=False).images
        torch.testing.assert_close(free, torch.full_like(free, 1.5))


def test_ddim_recomputes_eps_from_the_clipped_x0():
    diffusion, x = process(10), normals(1, *PICTURE)  # eps = 0, so the predicted x_0 is x / sqrt(abar)
    _, trace = chain(diffusion, n=1, method="ddim")
    (_, _, out), (_, after, _) = trace[:2]
    at, before = diffusion.alphas_cumprod[9].item(), diffusion.alphas_cumprod_prev[9].item()
    x_start = (x / math.sqrt(at)).clamp(-1, 1)
    assert torch.equal(out["pred_xstart"].abs() == 1, x_start.abs() == 1)
    eps = (x - math.sqrt(at) * x_start) / math.sqrt(1 - at)
    torch.testing.assert_close(after, math.sqrt(before) * x_start + math.sqrt(1 - before) * eps)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "plms"}, "'plms'.*ddpm, ddim, dpm"),
        ({"eta": -0.1}, "--eta -0.1"),
        ({"eta": 1.1}, "--eta 1.1"),
        ({"eta": float("nan")}, "--eta nan"),
        ({"s": 0.9}, "--s 0.9.*at least 1"),
        ({"seeds": [1]}, "1 for 2 samples"),
        ({"noise": torch.zeros(3, *PICTURE)}, "differ in N, H or W"),
        ({"noise": torch.zeros(2, 3, 4, 8)}, "differ in N, H or W"),
    ],
)
def test_bad_arguments(options, words):
    arguments = {"y": torch.zeros(2, 1, 4, 6), "noise": torch.zeros(2, *PICTURE), "method": "ddim", **options}
    with pytest.raises(InputError, match=words):
        sample(zero, process(4), **arguments)
