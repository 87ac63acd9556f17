"""Diffusion mathematics against direct computations in float64."""

import math

import numpy as np
import pytest
import torch
from conftest import normals
from torch.distributions import Normal, kl_divergence

from guided_diffusion import InputError
from guided_diffusion.diffusion.gaussian_diffusion import GaussianDiffusion, create_gaussian_diffusion, guided_denoiser

SHAPE = (4, 3, 4, 6)
STEPS = torch.tensor([0, 1, 40, 99])
NO_LABELS = torch.zeros(SHAPE[0], 1, *SHAPE[2:])
# 8-bit pictures in [-1, 1]
PICTURES = torch.randint(256, SHAPE, generator=torch.Generator().manual_seed(9)) / 127.5 - 1


def process(steps=100, schedule="linear", **options):
    return create_gaussian_diffusion(diffusion_steps=steps, noise_schedule=schedule, **options)


def linear_tables(steps=100):
    """Betas and alpha-bar (before and at each step) of the linear schedule, by plain loops."""
    betas = [(1e-4 + (2e-2 - 1e-4) * t / (steps - 1)) * 1000 / steps for t in range(steps)]
    alpha_bar = [1.0]
    for beta in betas:
        alpha_bar.append(alpha_bar[-1] * (1 - beta))
    return np.array(betas), np.array(alpha_bar[:-1]), np.array(alpha_bar[1:])


BETAS, BEFORE, AT = linear_tables()
LOWER = BETAS * (1 - BEFORE) / (1 - AT)  # the posterior's variance
LOWER[0] = LOWER[1]


class Fixed:
    """A network that gives a fixed output and remembers what it was asked."""

    def __init__(self, output):
        self.output, self.asked = output, []

    def __call__(self, x, timesteps, y):
        self.asked.append((x, timesteps, y))
        return self.output


def test_tables_are_float64_buffers_that_no_state_dict_holds():
    diffusion = process()
    assert all(table.dtype == torch.float64 and table.shape == (100,) for table in diffusion.buffers())
    assert diffusion.state_dict() == {} and not list(diffusion.parameters())
    np.testing.assert_allclose(diffusion.alphas_cumprod, AT, rtol=1e-10)
    np.testing.assert_allclose(diffusion.alphas_cumprod_prev, BEFORE, rtol=1e-10)


def test_q_sample_equals_the_formula_with_a_step_per_sample():
    noise = normals(*SHAPE)
    x = process().q_sample(PICTURES, STEPS, noise)
    for k, t in enumerate(STEPS.tolist()):
        torch.testing.assert_close(x[k], math.sqrt(AT[t]) * PICTURES[k] + math.sqrt(1 - AT[t]) * noise[k])


def bayes_posterior(t, x_start, x):
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians in x_{t-1}."""
    alpha, prior_variance = 1 - BETAS[t], 1 - BEFORE[t]
    precision = alpha / BETAS[t] + 1 / prior_variance
    mean = (math.sqrt(alpha) / BETAS[t] * x + math.sqrt(BEFORE[t]) / prior_variance * x_start) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("t", [1, 50, 99])
def test_q_posterior_equals_bayes(t):
    mean, variance = bayes_posterior(t, PICTURES.double(), normals(*SHAPE).double())
    assert process().posterior_variance[t].item() == pytest.approx(variance, rel=1e-9)
    result = process().q_posterior(PICTURES, normals(*SHAPE), torch.full((4,), t))
    torch.testing.assert_close(result[0], mean.float())
    torch.testing.assert_close(result[1].flatten(), torch.full((4,), variance))
    torch.testing.assert_close(result[2].flatten(), torch.full((4,), math.log(variance)))


def test_q_posterior_at_step_zero_is_x0_and_borrows_the_next_log_variance():
    mean, variance, log_variance = process().q_posterior(PICTURES, normals(*SHAPE), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(mean, PICTURES)
    assert not variance.any()
    torch.testing.assert_close(log_variance.flatten(), torch.full((4,), math.log(LOWER[1])))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predict_xstart_inverts_the_target(prediction, schedule):
    diffusion = process(prediction=prediction, schedule=schedule)
    noise, t = normals(*SHAPE), torch.tensor([0, 1, 40, 90])
    x, target = diffusion.q_sample(PICTURES, t, noise), diffusion.target(PICTURES, t, noise)
    level = diffusion.alphas_cumprod[t][:, None, None, None]
    signal, sigma = level.sqrt().float(), (1 - level).sqrt().float()
    expected = {"eps": noise, "x0": PICTURES, "v": signal * noise - sigma * PICTURES}[prediction]
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(diffusion.predict_xstart(target, x, t), PICTURES, rtol=0, atol=1e-5)
    torch.testing.assert_close(diffusion.predict_eps(PICTURES, x, t), noise, rtol=0, atol=1e-4)


@pytest.mark.parametrize("clip_denoised", [False, True])
def test_p_mean_variance_gives_the_posterior_of_the_predicted_x0(clip_denoised):
    diffusion, x, output = process(prediction="x0"), normals(*SHAPE), 2 * normals(*SHAPE, seed=1)
    result = diffusion.p_mean_variance(Fixed(output), x, STEPS, y=NO_LABELS, clip_denoised=clip_denoised)
    x_start = output.clamp(-1, 1) if clip_denoised else output
    assert result.keys() == {"mean", "variance", "log_variance", "pred_xstart"}
    torch.testing.assert_close(result["pred_xstart"], x_start, rtol=0, atol=0)
    torch.testing.assert_close(result["mean"], diffusion.q_posterior(x_start, x, STEPS)[0])
    fixed = [LOWER[1], *BETAS[[1, 40, 99]]]  # beta, and the posterior's at step 0
    for k in range(4):
        torch.testing.assert_close(result["variance"][k], torch.full(SHAPE[1:], fixed[k]), rtol=1e-5, atol=0)
    torch.testing.assert_close(result["variance"], result["log_variance"].exp())


def test_p_mean_variance_learned_range_runs_from_the_posterior_to_beta_in_the_log_domain():
    for raw in (-1.0, 0.0, 0.5, 1.0):
        output = torch.cat([normals(*SHAPE), torch.full(SHAPE, raw)], dim=1)
        result = process(learn_sigma=True).p_mean_variance(Fixed(output), normals(*SHAPE), STEPS, y=NO_LABELS)
        expected = (1 - raw) / 2 * np.log(LOWER) + (1 + raw) / 2 * np.log(BETAS)
        wanted = torch.tensor(expected[STEPS], dtype=torch.float32)[:, None, None, None].expand(SHAPE)
        torch.testing.assert_close(result["log_variance"], wanted, rtol=1e-5, atol=0)


def test_p_mean_variance_of_a_chain_of_one_step():
    diffusion, x = process(timestep_respacing="1", learn_sigma=True), normals(*SHAPE)
    output = torch.cat([x, torch.zeros(SHAPE)], dim=1)
    result = diffusion.p_mean_variance(Fixed(output), x, torch.zeros(4, dtype=torch.int64), y=NO_LABELS)
    assert all(value.isfinite().all() for value in result.values())


@pytest.mark.parametrize("respacing, kept", [("", range(100)), ("ddim10", range(0, 100, 10)), ("4", [0, 33, 66, 99])])
@pytest.mark.parametrize("rescale", [False, True])
def test_network_sees_the_original_timestep(respacing, kept, rescale):
    diffusion = process(timestep_respacing=respacing, rescale_timesteps=rescale)
    assert diffusion.num_timesteps == len(kept) and list(diffusion.kept) == list(kept)
    network, t = Fixed(normals(*SHAPE)), torch.tensor([0, 1, 2, 3])
    diffusion.training_losses(network, PICTURES, t, y=NO_LABELS, noise=normals(*SHAPE))
    guided_denoiser(network, diffusion, NO_LABELS, s=2.0)(normals(*SHAPE), t)
    expected = torch.tensor([kept[k] * (10.0 if rescale else 1.0) for k in range(4)])  # 1000 / 100 steps
    torch.testing.assert_close(network.asked[0][0], diffusion.q_sample(PICTURES, t, normals(*SHAPE)))
    assert len(network.asked) == 3 and all(torch.equal(timesteps, expected) for _, timesteps, _ in network.asked)


def losses_of(output, t=STEPS, **options):
    return process(**options).training_losses(Fixed(output), PICTURES, t, y=NO_LABELS, noise=normals(*SHAPE))


def random_output(learn_sigma=True):
    return normals(4, 6 if learn_sigma else 3, *SHAPE[2:], seed=5)


@pytest.mark.parametrize("loss_type", ["mse", "rescaled_mse", "kl", "rescaled_kl"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_training_losses_of_each_type(loss_type, learn_sigma):
    output = random_output(learn_sigma)
    losses = losses_of(output, loss_type=loss_type, learn_sigma=learn_sigma)
    names = {"loss", *(["mse"] if "mse" in loss_type else []), *(["vb"] if "kl" in loss_type or learn_sigma else [])}
    assert losses.keys() == names and all(value.shape == (4,) for value in losses.values())
    vb = losses_of(output, loss_type="kl", learn_sigma=learn_sigma)["loss"]
    scale = {"rescaled_mse": 0.1, "rescaled_kl": 100}.get(loss_type, 1)  # 100 steps: T / 1000, and T
    mse = losses_of(output, learn_sigma=learn_sigma)["mse"] if "mse" in names else 0
    torch.testing.assert_close(losses["loss"], mse + (scale * vb if "vb" in names else 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_mse_equals_the_naive_mean(prediction):
    output, wanted = random_output(), process(prediction=prediction).target(PICTURES, STEPS, normals(*SHAPE))
    losses = losses_of(output, prediction=prediction, learn_sigma=True)
    torch.testing.assert_close(losses["mse"], ((output[:, :3] - wanted) ** 2).mean((1, 2, 3)))


def test_variational_term_is_the_kl_to_the_posterior_in_bits():
    diffusion, output, t = process(learn_sigma=True), random_output(), torch.tensor([1, 2, 40, 99])
    x = diffusion.q_sample(PICTURES, t, normals(*SHAPE))
    predicted = diffusion.p_mean_variance(Fixed(output), x, t, y=NO_LABELS, clip_denoised=False)
    vb = losses_of(output, t, learn_sigma=True)["vb"]
    for k in range(4):
        mean, variance = bayes_posterior(t[k].item(), PICTURES[k].double(), x[k].double())
        model = Normal(predicted["mean"][k].double(), predicted["variance"][k].double().sqrt())
        expected = kl_divergence(Normal(mean, math.sqrt(variance)), model).mean() / math.log(2)
        assert vb[k].item() == pytest.approx(expected.item(), rel=1e-3)


def test_variational_term_at_step_zero_is_the_likelihood_of_the_pixels_in_bits():
    output = torch.cat([PICTURES + 0.01 * normals(*SHAPE, seed=5), normals(*SHAPE, seed=6)], dim=1)
    vb = losses_of(output, torch.zeros(4, dtype=torch.int64), learn_sigma=True, prediction="x0")["vb"]
    fraction, x = (output[:, 3:].double() + 1) / 2, PICTURES.double()
    log_variance = fraction * np.log(BETAS[0]) + (1 - fraction) * np.log(LOWER[1])
    normal = Normal(output[:, :3].double(), (0.5 * log_variance).exp())
    above = torch.where(x > 0.999, 1.0, normal.cdf(x + 1 / 255))
    below = torch.where(x < -0.999, 0.0, normal.cdf(x - 1 / 255))
    expected = -(above - below).log().mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(vb.double(), expected, rtol=5e-3, atol=0)


def test_variational_term_trains_the_variance_alone_and_the_bound_both():
    output = random_output().requires_grad_()
    (gradient,) = torch.autograd.grad(losses_of(output, learn_sigma=True)["vb"].sum(), output)
    assert not gradient[:, :3].any() and all(gradient[k, 3:].any() for k in range(4))
    (gradient,) = torch.autograd.grad(losses_of(output, learn_sigma=True, loss_type="kl")["loss"].sum(), output)
    assert gradient[:, :3].any() and gradient[:, 3:].any()


def labelled(x, timesteps, y):
    """A network whose mean and variance outputs depend on x and on the labels; 0.3 and 0.2 x where there are none."""
    return torch.cat([0.3 + 0.5 * y * x, 0.2 * x + y], dim=1)


def test_guidance_moves_away_from_the_null_conditioning_and_leaves_the_variance():
    diffusion, x, y = process(learn_sigma=True), normals(*SHAPE), normals(4, 1, *SHAPE[2:], seed=2)
    output = guided_denoiser(labelled, diffusion, y, s=2.5)(x, STEPS)
    torch.testing.assert_close(output[:, :3], 0.3 + 2.5 * (0.5 * y * x))  # eps(0) + s (eps(m) - eps(0))
    torch.testing.assert_close(output[:, 3:], 0.2 * x + y)
    guided, plain = (diffusion.p_mean_variance(labelled, x, STEPS, y=y, s=s) for s in (2.5, 1.0))
    torch.testing.assert_close(guided["variance"], plain["variance"], rtol=0, atol=0)
    assert (guided["mean"] - plain["mean"]).abs().max() > 1e-2


@pytest.mark.parametrize("s", [0.99, -1, float("nan")])
def test_p_mean_variance_refuses_a_guidance_scale_below_one(s):
    with pytest.raises(InputError, match=r"--s .*at least 1"):
        process().p_mean_variance(Fixed(None), normals(*SHAPE), STEPS, y=NO_LABELS, s=s)


def test_unknown_prediction_is_an_error():
    with pytest.raises(InputError, match="--prediction score: unknown; choose eps, x0 or v"):
        GaussianDiffusion(np.full(10, 0.1), prediction="score")
