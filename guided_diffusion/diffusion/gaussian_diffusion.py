"""Gaussian diffusion: the forward process, what a network's output means, and the training losses.

Notation as in DDPM (arXiv 2006.11239) and improved diffusion (arXiv 2102.09672). `t` counts the steps of the respaced
chain, 0...num_timesteps-1; the network sees the original timestep.
"""

import numpy as np
import torch
from torch import nn

from ..console import InputError
from .losses import discretized_gaussian_log_likelihood, mean_flat, nats_to_bits, normal_kl
from .schedules import beta_schedule, respaced_betas, space_timesteps
from .solvers import SamplerSettings


class GaussianDiffusion(nn.Module):
    """Tables of one diffusion process; no learned parameters.

    :param betas: (T,) float64 of the original process.
    :param kept: list of the original steps that this chain uses, ascending; all of them by default.
    :param prediction: what the network predicts: "eps", "x0" or "v" (progressive distillation, arXiv 2202.00512).
    :param learn_sigma: the network gives 3 more channels that place log variance between posterior and beta
        (improved diffusion, eq. 15); otherwise the variance is beta_t, and the posterior's at t = 0.
    :param loss_type: "mse", "rescaled_mse", "kl" or "rescaled_kl".
    :param rescale_timesteps: the network sees timesteps scaled to 0...1000.
    """

    def __init__(self, betas, kept=None, prediction="eps", learn_sigma=False, loss_type="mse", rescale_timesteps=False):
        super().__init__()
        if prediction not in ("eps", "x0", "v"):
            raise InputError(f"--prediction {prediction}: unknown; choose eps, x0 or v")
        self.prediction, self.learn_sigma, self.loss_type = prediction, learn_sigma, loss_type
        self.kept = kept = list(range(len(betas))) if kept is None else kept
        self.num_timesteps = len(kept)
        self._table("timestep_map", np.asarray(kept) * (1000.0 / len(betas) if rescale_timesteps else 1))
        betas = respaced_betas(betas, kept)
        alphas_cumprod = np.cumprod(1 - betas)
        previous = np.append(1.0, alphas_cumprod[:-1])
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # The posterior variance is 0 at t = 0, where its logarithm takes the next one's value.
        clipped = np.maximum(np.append(posterior_variance[:2][-1], posterior_variance[1:]), 1e-20)
        self._table("alphas_cumprod", alphas_cumprod)
        self._table("alphas_cumprod_prev", previous)
        self._table("sqrt_alphas_cumprod", np.sqrt(alphas_cumprod))
        self._table("sqrt_one_minus_alphas_cumprod", np.sqrt(1 - alphas_cumprod))
        self._table("posterior_variance", posterior_variance)
        self._table("posterior_log_variance", np.log(clipped))
        self._table("posterior_mean_x0", betas * np.sqrt(previous) / (1 - alphas_cumprod))
        self._table("posterior_mean_xt", (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod))
        self._table("log_betas", np.log(betas))
        self._table("fixed_log_variance", np.log(np.append(clipped[0], betas[1:])))

    def _table(self, name, values):
        self.register_buffer(name, torch.as_tensor(values, dtype=torch.float64), persistent=False)

    def at(self, name, t):
        """Return table `name` at steps t (N,), as (N, 1, 1, 1) float32 on t's device."""
        if getattr(self, name).device != t.device:
            self.to(t.device)  # once: the tables then stay there
        return getattr(self, name)[t].float()[:, None, None, None]

    def model_timesteps(self, t):
        """Map chain steps t (N,) to the timesteps (N,) float32 that the network sees."""
        return self.at("timestep_map", t).flatten()

    def q_sample(self, x_start, t, noise):
        """Forward process: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM eq. 4; Diff-GOn's NR-FD, noise NB[i]).

        :param x_start, t, noise: (N, 3, H, W) in [-1, 1], (N,) steps, (N, 3, H, W) standard normal.
        """
        return self.at("sqrt_alphas_cumprod", t) * x_start + self.at("sqrt_one_minus_alphas_cumprod", t) * noise

    def q_posterior(self, x_start, x, t):
        """Mean, variance and log variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 6, 7)."""
        mean = self.at("posterior_mean_x0", t) * x_start + self.at("posterior_mean_xt", t) * x
        return mean, self.at("posterior_variance", t), self.at("posterior_log_variance", t)

    def target(self, x_start, t, noise):
        """Return what the network should predict, (N, 3, H, W)."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x_start
        return self.at("sqrt_alphas_cumprod", t) * noise - self.at("sqrt_one_minus_alphas_cumprod", t) * x_start

    def predict_xstart(self, output, x, t):
        """Turn the network's mean output (N, 3, H, W) into its x_0."""
        if self.prediction == "x0":
            return output
        signal, sigma = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        if self.prediction == "eps":
            return (x - sigma * output) / signal
        return signal * x - sigma * output

    def predict_eps(self, x_start, x, t):
        """Return the noise that leads from x_0 to x_t."""
        signal, sigma = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        return (x - signal * x_start) / sigma

    def posterior(self, output, x, t, clip_denoised=True):
        """Turn a denoiser's output into p(x_{t-1} | x_t).

        :param output: (N, 3 or 6, H, W), what a denoiser gives for (x, t).
        :return: dict of mean, variance, log_variance and pred_xstart, each (N, 3, H, W).
        """
        pred_xstart = self.predict_xstart(output[:, :3], x, t)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, _ = self.q_posterior(pred_xstart, x, t)
        if self.learn_sigma:
            fraction = (output[:, 3:] + 1) / 2  # 0: posterior variance, 1: beta
            log_variance = fraction * self.at("log_betas", t) + (1 - fraction) * self.at("posterior_log_variance", t)
        else:
            log_variance = self.at("fixed_log_variance", t).expand_as(x)
        return {"mean": mean, "variance": log_variance.exp(), "log_variance": log_variance, "pred_xstart": pred_xstart}

    def p_mean_variance(self, model, x, t, y, s=1.0, clip_denoised=True):
        """Mean and variance of one reverse step (DDPM algorithm 2), guided by scale s: see `posterior`.

        :param model: callable (x, timesteps, y).
        :param x, t, y: (N, 3, H, W), (N,) steps of this chain, (N, C, H, W) conditioning.
        """
        SamplerSettings(s=s)  # checks it
        return self.posterior(guided_denoiser(model, self, y, s)(x, t), x, t, clip_denoised)

    def training_losses(self, model, x_start, t, y, noise):
        """Losses of one batch (Diff-GOn eq. for NR-FD; the variational term as improved diffusion, section 3.1).

        :param model: callable (x, timesteps, y).
        :param x_start, t: (N, 3, H, W) in [-1, 1], (N,) steps.
        :param y, noise: (N, C, H, W) conditioning, (N, 3, H, W) bank entries or fresh noise.
        :return: dict of "loss" and, where the loss type computes them, "mse" and "vb" (bits per dimension), each (N,).
        """
        x = self.q_sample(x_start, t, noise)
        output = model(x, self.model_timesteps(t), y)
        if self.loss_type.endswith("kl"):
            vb = self._variational_term(output, x_start, x, t)
            return {"loss": vb * self.num_timesteps if self.loss_type == "rescaled_kl" else vb, "vb": vb}
        mean = output[:, :3]
        terms = {"mse": mean_flat((self.target(x_start, t, noise) - mean) ** 2)}
        terms["loss"] = terms["mse"]
        if self.learn_sigma:
            # The term trains the variance alone: the mean prediction is frozen in it.
            vb = self._variational_term(torch.cat([mean.detach(), output[:, 3:]], dim=1), x_start, x, t)
            terms["vb"] = vb * self.num_timesteps / 1000 if self.loss_type == "rescaled_mse" else vb
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms

    def _variational_term(self, output, x_start, x, t):
        """L_{t-1}, or L_0 at t = 0, in bits per dimension, (N,)."""
        true_mean, _, true_log_variance = self.q_posterior(x_start, x, t)
        model = self.posterior(output, x, t, clip_denoised=False)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, model["mean"], model["log_variance"]))
        nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, model["mean"], 0.5 * model["log_variance"]))
        return nats_to_bits(torch.where(t == 0, nll, kl))


def guided_denoiser(model, diffusion, y, s=1.0):
    """Close over conditioning and guidance (classifier-free guidance, arXiv 2207.12598, towards the null conditioning).

    Prediction "x0" and "v" are affine in eps, so guiding them is guiding eps.

    :param y: (N, C, H, W) conditioning m, or whatever else the model takes for it where s is 1.
    :param s: guidance scale; 1 is plain conditional denoising and costs one evaluation instead of two.
    :return: denoiser(x, t) -> (N, 3 or 6, H, W).
    """

    def denoiser(x, t):
        timesteps = diffusion.model_timesteps(t)
        output = model(x, timesteps, y)
        return guide(output, model(x, timesteps, null_conditioning(model, y)), s) if s > 1 else output

    return denoiser


def null_conditioning(model, y):
    """Return y (N, C, H, W) with all-zero semantics; a colour layer stays."""
    null = y.clone()
    null[:, : getattr(model, "label_channels", None)] = 0
    return null


def guide(output, null_output, s):
    """Return out(0) + s (out(m) - out(0)) for the mean channels, and out(m)'s variance channels; (N, 3 or 6, H, W)."""
    mean = torch.lerp(null_output[:, :3], output[:, :3], s)
    return torch.cat([mean, output[:, 3:]], dim=1)


def create_gaussian_diffusion(*, diffusion_steps, noise_schedule, timestep_respacing="", start_time=0, **options):
    """Build a process from a named schedule and a respacing (see `schedules`); options: as `GaussianDiffusion`.

    :param start_time: with N, the respacing is of the original steps below N alone; 0: of all.
    """
    betas = beta_schedule(noise_schedule, diffusion_steps)
    return GaussianDiffusion(betas, space_timesteps(betas[: start_time or None], timestep_respacing), **options)
