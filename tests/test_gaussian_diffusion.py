"""Diffusion mathematics against direct computations in float64."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from guided_diffusion import InputError, create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.diffusion.gaussian_diffusion import GaussianDiffusion, create_gaussian_diffusion, guided_denoiser

SHAPE = (4, 3, 4, 6)
STEPS = torch.tensor([0, 1, 40, 99])


def process(steps=100, schedule="linear", **options):
    return create_gaussian_diffusion(diffusion_steps=steps, noise_schedule=schedule, **options)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures():
    """8-bit pictures in [-1, 1]."""
    return torch.randint(256, SHAPE, generator=torch.Generator().manual_seed(9)) / 127.5 - 1


def linear_tables(steps=100):
    """Betas and alpha-bar (before and at each step) of the linear schedule, by plain loops."""
    betas = [(1e-4 + (2e-2 - 1e-4) * t / (steps - 1)) * 1000 / steps for t in range(steps)]
    alpha_bar = [1.0]
    for beta in betas:
        alpha_bar.append(alpha_bar[-1] * (1 - beta))
    return np.array(betas), np.array(alpha_bar[:-1]), np.array(alpha_bar[1:])


class Fixed:
    """A network that gives a fixed output and remembers what it was asked."""

    def __init__(self, output):
        self.output, self.timesteps, self.labels = output, [], []

    def __call__(self, x, timesteps, y):
        self.timesteps.append(timesteps)
        self.labels.append(y)
        return self.output


def no_labels():
    return torch.zeros(SHAPE[0], 1, *SHAPE[2:])


# -- tables and forward process ---------------------------------------------------------------------------------------


def test_tables_are_float64_buffers_that_no_state_dict_holds():
    diffusion = process(50)
    tables = dict(diffusion.named_buffers())
    assert len(tables) >= 10
    assert all(table.dtype == torch.float64 and table.shape == (50,) for table in tables.values())
    assert diffusion.state_dict() == {} and not list(diffusion.parameters())


def test_alpha_bar_tables():
    diffusion, (_, before, at) = process(), linear_tables()
    np.testing.assert_allclose(diffusion.alphas_cumprod, at, rtol=1e-10)
    np.testing.assert_allclose(diffusion.alphas_cumprod_prev, before, rtol=1e-10)


def test_q_sample_equals_the_formula_with_a_step_per_sample():
    x_start, noise, (_, _, alpha_bar) = pictures(), normals(*SHAPE), linear_tables()
    x = process().q_sample(x_start, STEPS, noise)
    for k, t in enumerate(STEPS.tolist()):
        expected = math.sqrt(alpha_bar[t]) * x_start[k] + math.sqrt(1 - alpha_bar[t]) * noise[k]
        torch.testing.assert_close(x[k], expected)


def test_q_sample_moments():
    _, _, alpha_bar = linear_tables()
    x_start, noise = torch.full((4, 3, 64, 128), 0.7), normals(4, 3, 64, 128)
    x = process().q_sample(x_start, STEPS, noise)
    for k, t in enumerate(STEPS.tolist()):  # 24,576 pixels: standard error 0.006 of the mean, 0.9 % of the variance
        sigma = math.sqrt(1 - alpha_bar[t])
        assert x[k].mean().item() == pytest.approx(math.sqrt(alpha_bar[t]) * 0.7, abs=0.03 * sigma)
        assert x[k].var().item() == pytest.approx(sigma**2, rel=0.04)


def bayes_posterior(t, x_start, x):
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians in x_{t-1}."""
    betas, before, _ = linear_tables()
    alpha, prior_variance = 1 - betas[t], 1 - before[t]
    precision = alpha / betas[t] + 1 / prior_variance
    mean = (math.sqrt(alpha) / betas[t] * x + math.sqrt(before[t]) / prior_variance * x_start) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("t", [1, 2, 50, 99])
def test_posterior_equals_bayes(t):
    diffusion, x_start, x = process(), pictures().double(), normals(*SHAPE).double()
    mean, variance = bayes_posterior(t, x_start, x)
    assert diffusion.posterior_variance[t].item() == pytest.approx(variance, rel=1e-9)
    assert diffusion.posterior_log_variance[t].item() == pytest.approx(math.log(variance), rel=1e-9)
    in_float64 = diffusion.posterior_mean_x0[t] * x_start + diffusion.posterior_mean_xt[t] * x
    torch.testing.assert_close(in_float64, mean, rtol=1e-9, atol=1e-9)
    result = diffusion.q_posterior(x_start.float(), x.float(), torch.full((4,), t))
    torch.testing.assert_close(result[0], mean.float())
    torch.testing.assert_close(result[1].flatten(), torch.full((4,), variance))
    torch.testing.assert_close(result[2].flatten(), torch.full((4,), math.log(variance)))


def test_posterior_at_step_zero_is_x0_and_borrows_the_next_log_variance():
    diffusion, x_start = process(), pictures()
    mean, variance, log_variance = diffusion.q_posterior(x_start, normals(*SHAPE), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(mean, x_start)
    assert not variance.any()
    assert (log_variance == diffusion.posterior_log_variance[1].float()).all()


# -- what the network's output means ----------------------------------------------------------------------------------


def test_targets():
    x_start, noise, (_, _, alpha_bar) = pictures(), normals(*SHAPE), linear_tables()
    assert process(prediction="eps").target(x_start, STEPS, noise) is noise
    assert process(prediction="x0").target(x_start, STEPS, noise) is x_start
    v = process(prediction="v").target(x_start, STEPS, noise)
    for k, t in enumerate(STEPS.tolist()):
        torch.testing.assert_close(v[k], math.sqrt(alpha_bar[t]) * noise[k] - math.sqrt(1 - alpha_bar[t]) * x_start[k])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predict_xstart_inverts_the_target(prediction, schedule):
    diffusion, x_start, noise = process(prediction=prediction, schedule=schedule), pictures(), normals(*SHAPE)
    t = torch.tensor([0, 1, 40, 90])
    x = diffusion.q_sample(x_start, t, noise)
    recovered = diffusion.predict_xstart(diffusion.target(x_start, t, noise), x, t)
    torch.testing.assert_close(recovered, x_start, rtol=0, atol=1e-5)
    torch.testing.assert_close(diffusion.predict_eps(x_start, x, t), noise, rtol=0, atol=1e-4)


# -- reverse step -----------------------------------------------------------------------------------------------------


def test_p_mean_variance_gives_the_posterior_of_the_predicted_x0():
    diffusion, x, output = process(prediction="x0"), normals(*SHAPE), normals(*SHAPE, seed=1)
    result = diffusion.p_mean_variance(Fixed(output), x, STEPS, y=no_labels(), clip_denoised=False)
    assert result.keys() == {"mean", "variance", "log_variance", "pred_xstart"}
    assert all(value.shape == SHAPE for value in result.values())
    torch.testing.assert_close(result["pred_xstart"], output)
    torch.testing.assert_close(result["mean"], diffusion.q_posterior(output, x, STEPS)[0])
    torch.testing.assert_close(result["variance"], result["log_variance"].exp())


def test_clip_denoised_bounds_the_predicted_x0_and_moves_the_mean():
    diffusion, x, output = process(prediction="x0"), normals(*SHAPE), 3 * normals(*SHAPE, seed=1)
    result = diffusion.p_mean_variance(Fixed(output), x, STEPS, y=no_labels())
    torch.testing.assert_close(result["pred_xstart"], output.clamp(-1, 1), rtol=0, atol=0)
    torch.testing.assert_close(result["mean"], diffusion.q_posterior(output.clamp(-1, 1), x, STEPS)[0])


def test_fixed_variance_is_beta_and_the_posteriors_at_step_zero():
    result = process().p_mean_variance(Fixed(normals(*SHAPE)), normals(*SHAPE), STEPS, y=no_labels())
    betas, before, at = linear_tables()
    expected = [betas[1] * (1 - before[1]) / (1 - at[1]), *betas[[1, 40, 99]]]
    for k in range(4):
        torch.testing.assert_close(result["variance"][k], torch.full(SHAPE[1:], expected[k]), rtol=1e-5, atol=0)


def learned_log_variance(raw, t=STEPS):
    diffusion = process(learn_sigma=True)
    output = torch.cat([normals(*SHAPE), raw], dim=1)
    return diffusion.p_mean_variance(Fixed(output), normals(*SHAPE), t, y=no_labels())["log_variance"]


def test_learned_range_runs_from_the_posterior_to_beta_in_the_log_domain():
    betas, before, at = linear_tables()
    lower = betas * (1 - before) / (1 - at)
    lower[0] = lower[1]
    for raw, expected in ((-1, np.log(lower)), (1, np.log(betas)), (0, np.log(lower * betas) / 2), (0.5, None)):
        if expected is None:
            expected = 0.25 * np.log(lower) + 0.75 * np.log(betas)
        got = learned_log_variance(torch.full(SHAPE, float(raw)))
        wanted = torch.tensor(expected[STEPS], dtype=torch.float32)[:, None, None, None].expand(SHAPE)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_learned_variance_stays_between_the_bounds():
    betas, before, at = linear_tables()
    t = torch.tensor([1, 10, 40, 99])
    variance = learned_log_variance(normals(*SHAPE, seed=3).tanh(), t).exp()
    for k, step in enumerate(t.tolist()):
        assert variance[k].min() >= betas[step] * (1 - before[step]) / (1 - at[step]) * (1 - 1e-5)
        assert variance[k].max() <= betas[step] * (1 + 1e-5)
        assert variance[k].std() > 0


# -- which timestep the network sees ----------------------------------------------------------------------------------


@pytest.mark.parametrize("respacing, kept", [("", range(100)), ("ddim10", range(0, 100, 10)), ("4", [0, 33, 66, 99])])
@pytest.mark.parametrize("rescale", [False, True])
def test_the_network_sees_the_original_timestep(respacing, kept, rescale):
    diffusion = process(timestep_respacing=respacing, rescale_timesteps=rescale)
    assert diffusion.num_timesteps == len(kept) and list(diffusion.kept) == list(kept)
    t = torch.tensor([0, 1, 2, 3])
    expected = torch.tensor([kept[k] * (10.0 if rescale else 1.0) for k in range(4)])  # 1000 / 100 steps
    network = Fixed(normals(*SHAPE))
    diffusion.p_mean_variance(network, normals(*SHAPE), t, y=no_labels())
    diffusion.training_losses(network, pictures(), t, y=no_labels(), noise=normals(*SHAPE))
    guided_denoiser(network, diffusion, no_labels(), s=2.0)(normals(*SHAPE), t)
    assert len(network.timesteps) == 4
    for seen in network.timesteps:
        torch.testing.assert_close(seen, expected)


def test_a_respaced_process_keeps_the_noise_levels():
    full, short = process(), process(timestep_respacing="10,20")
    x_start, noise = pictures(), normals(*SHAPE)
    t = torch.tensor([0, 5, 12, 29])
    original = torch.tensor(short.kept)[t]
    torch.testing.assert_close(short.q_sample(x_start, t, noise), full.q_sample(x_start, original, noise))


# -- training losses --------------------------------------------------------------------------------------------------


def losses_of(output, diffusion, t=STEPS, y=None):
    return diffusion.training_losses(
        Fixed(output), pictures(), t, y=no_labels() if y is None else y, noise=normals(*SHAPE)
    )


@pytest.mark.parametrize(
    "loss_type, learn_sigma, keys",
    [
        ("mse", False, {"loss", "mse"}),
        ("mse", True, {"loss", "mse", "vb"}),
        ("rescaled_mse", True, {"loss", "mse", "vb"}),
        ("kl", False, {"loss", "vb"}),
        ("rescaled_kl", True, {"loss", "vb"}),
    ],
)
def test_loss_keys_and_shapes(loss_type, learn_sigma, keys):
    output = normals(4, 6 if learn_sigma else 3, *SHAPE[2:], seed=5)
    losses = losses_of(output, process(loss_type=loss_type, learn_sigma=learn_sigma))
    assert losses.keys() == keys
    assert all(value.shape == (4,) and value.isfinite().all() for value in losses.values())


def test_training_feeds_the_network_the_noised_picture_and_the_labels():
    diffusion, y = process(), normals(4, 5, *SHAPE[2:])
    seen = []

    def network(x, timesteps, labels):
        seen.append((x, labels))
        return torch.zeros_like(x)

    diffusion.training_losses(network, pictures(), STEPS, y=y, noise=normals(*SHAPE))
    torch.testing.assert_close(seen[0][0], diffusion.q_sample(pictures(), STEPS, normals(*SHAPE)))
    assert seen[0][1] is y


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_mse_equals_the_naive_mean(prediction, learn_sigma):
    diffusion = process(prediction=prediction, learn_sigma=learn_sigma)
    output = normals(4, 6 if learn_sigma else 3, *SHAPE[2:], seed=5)
    losses = losses_of(output, diffusion)
    _, _, alpha_bar = linear_tables()
    for k, t in enumerate(STEPS.tolist()):
        x_start, noise = pictures()[k], normals(*SHAPE)[k]
        wanted = {"eps": noise, "x0": x_start}.get(
            prediction, math.sqrt(alpha_bar[t]) * noise - math.sqrt(1 - alpha_bar[t]) * x_start
        )
        assert losses["mse"][k].item() == pytest.approx(((output[k, :3] - wanted) ** 2).mean().item(), rel=1e-5)
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses.get("vb", 0))


def test_variational_term_is_the_kl_to_the_posterior_in_bits():
    diffusion, output = process(learn_sigma=True), normals(4, 6, *SHAPE[2:], seed=5)
    t = torch.tensor([1, 2, 40, 99])
    x = diffusion.q_sample(pictures(), t, normals(*SHAPE))
    predicted = diffusion.p_mean_variance(Fixed(output), x, t, y=no_labels(), clip_denoised=False)
    vb = losses_of(output, diffusion, t)["vb"]
    for k in range(4):
        mean, variance = bayes_posterior(t[k].item(), pictures()[k].double(), x[k].double())
        model = Normal(predicted["mean"][k].double(), predicted["variance"][k].double().sqrt())
        expected = kl_divergence(Normal(mean, math.sqrt(variance)), model).mean() / math.log(2)
        assert vb[k].item() == pytest.approx(expected.item(), rel=1e-3)


def test_variational_term_at_step_zero_is_the_likelihood_of_the_pixels_in_bits():
    diffusion, t = process(learn_sigma=True, prediction="x0"), torch.zeros(4, dtype=torch.int64)
    output = torch.cat([pictures() + 0.01 * normals(*SHAPE, seed=5), normals(*SHAPE, seed=6)], dim=1)
    vb = losses_of(output, diffusion, t)["vb"]
    betas, before, at = linear_tables()
    lower, upper = np.log(betas[1] * (1 - before[1]) / (1 - at[1])), np.log(betas[0])
    fraction = (output[:, 3:].double() + 1) / 2
    normal = Normal(output[:, :3].double(), (0.5 * (fraction * upper + (1 - fraction) * lower)).exp())
    x = pictures().double()
    above = torch.where(x > 0.999, 1.0, normal.cdf(x + 1 / 255))
    below = torch.where(x < -0.999, 0.0, normal.cdf(x - 1 / 255))
    expected = -(above - below).log().mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(vb.double(), expected, rtol=5e-3, atol=0)


def test_a_perfect_prediction_costs_nothing():
    output = torch.cat([normals(*SHAPE), torch.full(SHAPE, -1.0)], dim=1)  # the noise itself, the posterior's variance
    losses = losses_of(output, process(learn_sigma=True), torch.tensor([1, 5, 40, 99]))
    assert losses["mse"].abs().max() == 0
    assert losses["vb"].abs().max() < 1e-4


def test_the_variational_term_trains_the_variance_alone():
    output = normals(4, 6, *SHAPE[2:], seed=5).requires_grad_()
    losses = losses_of(output, process(learn_sigma=True))
    (gradient,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    assert not gradient[:, :3].any()
    assert all(gradient[k, 3:].any() for k in range(4))
    (gradient,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert gradient[:, :3].any() and not gradient[:, 3:].any()


@pytest.mark.parametrize("loss_type", ["kl", "rescaled_kl"])
def test_the_variational_bound_alone_trains_both(loss_type):
    output = normals(4, 6, *SHAPE[2:], seed=5).requires_grad_()
    losses_of(output, process(learn_sigma=True, loss_type=loss_type))["loss"].sum().backward()
    assert output.grad[:, :3].any() and output.grad[:, 3:].any()


def test_rescaled_mse_weights_the_variational_term_by_steps_over_1000():
    output = normals(4, 6, *SHAPE[2:], seed=5)
    plain = losses_of(output, process(learn_sigma=True))
    rescaled = losses_of(output, process(learn_sigma=True, loss_type="rescaled_mse"))
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * 0.1)  # 100 / 1000
    torch.testing.assert_close(rescaled["mse"], plain["mse"])
    torch.testing.assert_close(rescaled["loss"], plain["mse"] + 0.1 * plain["vb"])


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_kl_is_the_variational_term_and_rescaled_kl_the_bound_over_all_steps(learn_sigma):
    output = normals(4, 6 if learn_sigma else 3, *SHAPE[2:], seed=5)
    plain = losses_of(output, process(learn_sigma=learn_sigma, loss_type="kl"))
    rescaled = losses_of(output, process(learn_sigma=learn_sigma, loss_type="rescaled_kl"))
    torch.testing.assert_close(plain["loss"], plain["vb"])
    torch.testing.assert_close(rescaled["vb"], plain["vb"])
    torch.testing.assert_close(rescaled["loss"], plain["vb"] * 100)
    if learn_sigma:
        torch.testing.assert_close(plain["vb"], losses_of(output, process(learn_sigma=True))["vb"])


# -- guidance ---------------------------------------------------------------------------------------------------------


def labelled(x, timesteps, y):
    """A network whose mean and variance outputs depend on x and on the labels; 0.3 and 0.2 x where there are none."""
    return torch.cat([0.3 + 0.5 * y * x, 0.2 * x + y], dim=1)


def test_guidance_moves_away_from_the_empty_labels_and_leaves_the_variance():
    diffusion, x, y = process(learn_sigma=True), normals(*SHAPE), normals(4, 1, *SHAPE[2:], seed=2)
    output = guided_denoiser(labelled, diffusion, y, s=2.5)(x, STEPS)
    torch.testing.assert_close(output[:, :3], 0.3 + 2.5 * (0.5 * y * x))  # eps(0) + s (eps(m) - eps(0))
    torch.testing.assert_close(output[:, 3:], 0.2 * x + y)
    guided = diffusion.p_mean_variance(labelled, x, STEPS, y=y, s=2.5)
    plain = diffusion.p_mean_variance(labelled, x, STEPS, y=y)
    torch.testing.assert_close(guided["variance"], plain["variance"], rtol=0, atol=0)
    assert (guided["mean"] - plain["mean"]).abs().max() > 1e-2


def test_no_guidance_evaluates_the_network_once():
    network, y = Fixed(normals(*SHAPE)), normals(4, 1, *SHAPE[2:])
    output = guided_denoiser(network, process(), y, s=1)(normals(*SHAPE), STEPS)
    assert output is network.output and len(network.labels) == 1 and network.labels[0] is y


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_guiding_other_predictions_is_guiding_eps(prediction):
    x, t, (_, _, alpha_bar) = normals(*SHAPE), torch.tensor([5, 20, 40, 60]), linear_tables()
    signal = torch.tensor(alpha_bar[t]).sqrt().float()[:, None, None, None]
    sigma = torch.tensor(1 - alpha_bar[t]).sqrt().float()[:, None, None, None]

    def eps_network(x, timesteps, y):
        return 0.3 + 0.5 * y * x

    def same_in_other_words(x, timesteps, y):
        eps = eps_network(x, timesteps, y)
        x_start = (x - sigma * eps) / signal
        return x_start if prediction == "x0" else signal * eps - sigma * x_start

    y, options = normals(4, 1, *SHAPE[2:], seed=2), {"s": 3.0, "clip_denoised": False}
    expected = process().p_mean_variance(eps_network, x, t, y=y, **options)
    result = process(prediction=prediction).p_mean_variance(same_in_other_words, x, t, y=y, **options)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("s", [0.99, 0, -1, float("nan")])
def test_a_guidance_scale_below_one_is_an_error(s):
    with pytest.raises(InputError, match=r"--s .*at least 1"):
        process().p_mean_variance(Fixed(None), normals(*SHAPE), STEPS, y=no_labels(), s=s)


# -- construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, loss_type, prediction",
    [
        ({}, "mse", "eps"),
        ({"prediction": "v"}, "mse", "v"),
        ({"predict_xstart": True}, "mse", "x0"),
        ({"rescale_learned_sigmas": True, "learn_sigma": True}, "rescaled_mse", "eps"),
        ({"use_kl": True}, "rescaled_kl", "eps"),
    ],
)
def test_flags_choose_the_process(flags, loss_type, prediction):
    tiny = {"image_size": 32, "num_channels": 32, "channel_mult": "1", "num_res_blocks": 1, "diffusion_steps": 40}
    _, diffusion = create_model_and_diffusion(
        **{
            **model_and_diffusion_defaults(),
            **tiny,
            "timestep_respacing": "ddim10",
            "noise_schedule": "cosine",
            **flags,
        }
    )
    assert (diffusion.loss_type, diffusion.prediction, diffusion.num_timesteps) == (loss_type, prediction, 10)
    assert diffusion.learn_sigma is flags.get("learn_sigma", False)
    expected = process(40, "cosine", timestep_respacing="ddim10").alphas_cumprod
    torch.testing.assert_close(diffusion.alphas_cumprod, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options, words", [({"prediction": "score"}, "--prediction score"), ({"loss_type": "l1"}, "l1")]
)
def test_unknown_names_are_errors(options, words):
    with pytest.raises(InputError, match=f"{words}.*choose one of"):
        GaussianDiffusion(np.full(10, 0.1), **options)


def test_a_chain_of_one_step():
    diffusion, x = process(timestep_respacing="1", learn_sigma=True), normals(*SHAPE)
    output = torch.cat([x, torch.zeros(SHAPE)], dim=1)
    result = diffusion.p_mean_variance(Fixed(output), x, torch.zeros(4, dtype=torch.int64), y=no_labels())
    assert all(value.isfinite().all() for value in result.values())
