"""Reverse steps and whole pictures: the plain path against the fast one."""

import torch

from ..diffusion.sampling import EarlyStop, sample
from .setup import (
    conditioning,
    fast_denoiser,
    fast_network,
    inputs,
    plain_denoiser,
    plain_network,
    precision_context,
    reverse_step,
)
from .timing import Contender, MatmulRate, alternate, flops, seconds, summary

PLAIN = "plain fp32"


def fast_step(setup, model, diffusion, given, precision):
    """Return a contender: one reverse step of the fast path. The label-map work is done here, once."""
    context = precision_context(setup, precision)
    with context(), torch.no_grad():
        denoiser = fast_denoiser(setup, model, diffusion, given)
    return Contender(torch.no_grad()(lambda: reverse_step(denoiser, diffusion, given)), context)


def plain_step(setup, model, diffusion, given, precision="fp32"):
    """Return a contender: one reverse step of the plain path."""
    denoiser = plain_denoiser(setup, model, diffusion, given)
    run = torch.no_grad()(lambda: reverse_step(denoiser, diffusion, given))
    return Contender(run, precision_context(setup, precision))


def step(setup):
    """One reverse step with guidance: time, share of the machine's rate, and how far the outputs are apart."""
    plain, diffusion, given, notes = plain_network(setup), setup.diffusion(), inputs(setup), []
    contenders = {PLAIN: plain_step(setup, plain, diffusion, given)}
    uncompiled = fast_step(setup, fast_network(setup, plain, "fp32", compiles=False), diffusion, given, "fp32")
    counts = {path: flops(contender.run) for path, contender in (("plain", contenders[PLAIN]), ("fast", uncompiled))}
    del uncompiled
    networks = {precision: fast_network(setup, plain, precision, log=notes.append) for precision in setup.precisions}
    for precision, network in networks.items():
        contenders[f"fast {precision}"] = fast_step(setup, network, diffusion, given, precision)
    rates = MatmulRate(setup)
    times = alternate(contenders, setup.rounds, setup.device, setup.tell)
    rates.measure()
    apart = _apart(setup, plain, networks)
    rows = []
    for name in contenders:
        path, precision = name.split()
        row = {"path": path, "precision": precision, **summary(times, name, PLAIN), "gflop": counts[path] / 1e9}
        share = rates.share(counts[path], row["ms"], precision)
        rows.append({**row, "share_of_matmul_rate_%": share, **(apart[precision] if path == "fast" else {})})
    modulations = (2 if setup.s > 1 else 1) * flops(lambda: plain.cached_modulation(given.y))
    notes += [
        f"SPADE's maps are {modulations / 1e9:.4g} GFLOP of a plain step, {100 * modulations / counts['plain']:.0f} %",
        f"medians of {setup.rounds} alternations; guidance scale {setup.s:g}; differences from the plain path: of one"
        f" guided output, and of x_0 after a chain of {setup.chain} steps from the same noises",
    ]
    return {"rows": rows, "notes": notes + rates.notes()}


@torch.no_grad()
def _apart(setup, plain, networks):
    """Return how far the fast path's outputs are from the plain one's, for each precision."""
    setup.tell("outputs of the plain path")
    diffusion, found = setup.diffusion(setup.chain), {}
    given = inputs(setup, step=diffusion.num_timesteps // 2)
    reference = plain_denoiser(setup, plain, diffusion, given)
    expected, expected_end = reference(given.x, given.t), _chain(reference, diffusion, given)
    for precision, network in networks.items():
        setup.tell(f"outputs of the fast path, {precision}")
        with precision_context(setup, precision)():
            denoiser = fast_denoiser(setup, network, diffusion, given)
            output, end = denoiser(given.x, given.t), _chain(denoiser, diffusion, given)
        rms = ((output - expected).square().mean() / expected.square().mean()).sqrt()
        found[precision] = {
            "largest_difference": float((output - expected).abs().max()),
            "relative_rms": float(rms),
            "largest_difference_of_chain": float((end - expected_end).abs().max()),
        }
    return found


def _chain(denoiser, diffusion, given):
    """Run the ancestral chain with noises that follow from the step."""
    x = given.x
    for number in reversed(range(diffusion.num_timesteps)):
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(number)).to(x)
        x = reverse_step(denoiser, diffusion, type(given)(x, z, torch.full_like(given.t, number), given.y))
    return x


# -- pictures ---------------------------------------------------------------------------------------------------------


def picture(setup):
    """Seconds for one picture by several samplers; chains of up to 50 steps run for real, longer ones are scaled."""
    plain, given = plain_network(setup), inputs(setup)
    contender = plain_step(setup, plain, setup.diffusion(), given)
    setup.tell("plain steps")
    seconds(contender, setup.device)
    per_step = sum(seconds(contender, setup.device) for _ in range(setup.chain)) / setup.chain
    full = setup.diffusion().num_timesteps
    rows = [_row("plain", "ancestral", "fp32", full, full * per_step, full * per_step, f"{setup.chain} steps, scaled")]
    samplers = [
        ("ancestral", "ddpm", full),
        ("ancestral", "ddpm", 250),
        ("DDIM", "ddim", 50),
        ("DPM-Solver++ logsnr20", "dpm++", 20),
        ("DPM-Solver++ logsnr12", "dpm++", 12),
    ]
    samplers = [found for found in (samplers[::3] if setup.quick else dict.fromkeys(samplers)) if found[2] <= full]
    for precision in setup.precisions:
        fast = fast_network(setup, plain, precision)
        _sampled(setup, fast, given, precision, "ddim", 1)
        once = _made_ready(setup, fast, given, precision)
        rows.append(
            {
                "path": "fast",
                "sampler": "label-map work, once for each picture",
                "precision": precision,
                "seconds": once,
                "how": "timed; in all figures of the fast path",
            }
        )
        for name, method, steps in samplers:
            setup.tell(f"{name}, {steps} steps, {precision}")
            run = min(steps, setup.chain) if setup.quick or steps > 50 else steps
            taken, _ = _sampled(setup, fast, given, precision, method, run)
            how = "timed" if run == steps else f"{run} steps, scaled"
            rows.append(_row("fast", name, precision, steps, once + (taken - once) * steps / run, full * per_step, how))
        rows.append(_stopped(setup, fast, given, precision, full * per_step, once))
    untrained = (
        "how many steps an early-stopped chain takes needs trained weights (--model_path); here is the cost of one"
    )
    return {"rows": rows, "notes": [] if setup.weights else [untrained]}


def _row(path, sampler, precision, steps, taken, reference, how):
    return {
        "path": path,
        "sampler": sampler,
        "precision": precision,
        "steps": steps,
        "seconds": taken,
        "ms_per_step": 1e3 * taken / steps,
        "times_faster": reference / taken,
        "how": how,
    }


def _made_ready(setup, model, given, precision):
    """Return the seconds that the label-map work of one picture takes."""
    contender = Contender(lambda: conditioning(setup, model, given), precision_context(setup, precision))
    return seconds(contender, setup.device)


def _sampled(setup, model, given, precision, method, steps, early_stop=None):
    """Make one picture; return its seconds, label-map work included, and how many steps it took."""
    # Even steps for the early stop: steps even in log SNR begin with many that change nothing, and it would stop there.
    uneven = method == "dpm++" and early_stop is None
    diffusion, found = setup.diffusion(f"logsnr{steps}" if uneven else steps), []

    def run():
        found[:] = [
            sample(
                model,
                diffusion,
                given.y,
                given.x,
                method,
                s=setup.s,
                seeds=[0],
                early_stop=early_stop,
                cache_bytes=setup.cache_bytes,
            )
        ]

    taken = seconds(Contender(run, precision_context(setup, precision)), setup.device)
    return taken, int(found[0].steps)


def _stopped(setup, model, given, precision, reference, once):
    """The early-stopped chain; without trained weights its number of steps means nothing, but its steps' cost does."""
    setup.tell(f"early stop, {precision}")
    steps = min(50, setup.flags.diffusion_steps)
    name = f"DPM-Solver++ {steps}, stopped at {setup.stop_tol:g}"
    if setup.weights:
        taken, steps = _sampled(setup, model, given, precision, "dpm++", steps, EarlyStop(setup.stop_tol, patience=2))
        return _row("fast", name, precision, steps, taken, reference, "timed")
    never = EarlyStop(setup.stop_tol, patience=steps)
    taken, ran = _sampled(setup, model, given, precision, "dpm++", min(5, steps), never)
    row = _row(
        "fast", name, precision, steps, once + (taken - once) * steps / ran, reference, f"{ran} steps, cost of a step"
    )
    return row | {"steps": None, "seconds": None, "times_faster": None}
