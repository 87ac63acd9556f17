"""Noise selection: against the definition in a plain loop, and against exhaustive search."""

import math

import pytest
import torch
from conftest import normals, tiny_network

from guided_diffusion import EarlyStop, InputError, NoiseBank
from guided_diffusion.diffusion.gaussian_diffusion import create_gaussian_diffusion
from guided_diffusion.diffusion.sampling import run_chain
from guided_diffusion.diffusion.solvers import SamplerSettings
from guided_diffusion.link import selection
from guided_diffusion.link.color_layer import residual
from guided_diffusion.link.selection import (
    Chain,
    StepCodebook,
    mse,
    rare_weights,
    select_both,
    select_initial,
    select_per_step,
    step_mask,
)
from guided_diffusion.random_streams import generator

SIZE, T = (8, 16), 10
BANK = NoiseBank((3, *SIZE), 20, seed=150)
POSTERIOR = {"variance": "posterior"}


@pytest.fixture(scope="module")
def unet():
    """A tiny UNet and its process of ten steps."""
    model, diffusion = tiny_network(timestep_respacing=str(T), noise_schedule="cosine", prediction="v")
    return model.requires_grad_(False), diffusion


@pytest.fixture
def make_chain(unet):
    """Function (options of Chain, settings of its sampler) -> Chain."""
    return lambda options=None, **settings: Chain(*unet, BANK, SamplerSettings(**settings), **options or {})


@pytest.fixture
def evaluations(unet):
    """List that gets the number of samples of every network evaluation."""
    calls = []
    handle = unet[0].register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    yield calls
    handle.remove()


Y = (normals(1, 5, *SIZE, seed=7) > 0.8).float()
IMAGE = normals(1, 3, *SIZE, seed=9).clamp(-1, 1)


@pytest.mark.parametrize("settings", [{"method": "ddpm"}, {"method": "ddim", "s": 1.5}])
def test_select_initial_finds_the_best_of_single_chains(unet, make_chain, settings):
    candidates, sampler = [17, 3, 4, 9, 12], SamplerSettings(**settings)
    alone = {i: run_chain(*unet, Y, BANK[i][None], sampler, seeds=[BANK.chain_seed(i)]).images for i in candidates}
    scores = {i: mse(picture, IMAGE).item() for i, picture in alone.items()}
    best = min(scores, key=scores.get)
    choice = select_initial(make_chain(**settings), Y, IMAGE, candidates, batch_size=2)
    assert choice.index == best and choice.codewords == () and choice.steps == T
    assert torch.equal(choice.picture[None], alone[best]) and choice.score == scores[best]
    tied = select_initial(make_chain(**settings), Y, IMAGE, candidates, lambda x, image: 0 * mse(x, image))
    assert tied.index == 3  # the smallest


@pytest.mark.parametrize("s", [1.0, 2.0])
@pytest.mark.parametrize("feedback_steps", [0, 2])
def test_select_initial_counts_the_evaluations_really_made(unet, make_chain, evaluations, s, feedback_steps):
    maps = []
    hook = unet[0].middle_block[0].in_norm.mlp_shared.register_forward_hook(lambda *_: maps.append(1))
    chain = make_chain({"early_stop": EarlyStop(0.3, patience=1)}, s=s)
    choice = select_initial(chain, Y, IMAGE, range(7), batch_size=3, feedback_steps=feedback_steps)
    hook.remove()
    assert choice.evaluations == sum(evaluations) < 8 * T * s and len(maps) == s  # label-map work once per search
    assert select_initial(make_chain(), Y, IMAGE, [7]).evaluations == T  # one candidate needs no search


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpm++"])
def test_select_initial_by_halving_equals_the_plain_rule(make_chain, method):
    chain, alive = make_chain(method=method), list(range(20))
    assert selection.halving_rungs(20, T, 2) == [(2, 5), (4, 4), (None, 1)]
    for network_steps, keep in ((2, 5), (4, 4), (None, 1)):
        pictures = [chain.run(Y, [i], network_steps=network_steps).images for i in alive]
        scores = dict(zip(alive, (mse(picture, IMAGE).item() for picture in pictures), strict=True))
        alive = sorted(alive, key=scores.get)[:keep]
    choice = select_initial(chain, Y, IMAGE, range(20), batch_size=6, feedback_steps=2)
    assert [choice.index] == alive and choice.score == scores[choice.index]
    assert choice.evaluations == 20 * 2 + 5 * 4 + 4 * T + T


def test_halving_rungs_quarter_the_candidates():
    plans = {1: [], 4: [(None, 1)], 64: [(5, 16), (10, 4), (None, 1)]}
    plans[1000] = [(5, 250), (10, 63), (20, 16), (None, 1)]  # 40 network steps would be no cheap look
    assert {count: selection.halving_rungs(count, 50, 5) for count in plans} == plans


def by_definition(unet, s, candidates, atoms, selected_steps, tail_steps):
    """Per-step selection as a plain loop: (codewords, picture)."""
    model, diffusion = unet
    x, codewords, d = BANK[0][None], [], math.prod(BANK.shape)
    noisy = [t for t in reversed(range(T)) if t >= max(1, tail_steps)]
    selected = noisy[-selected_steps:]
    for t in reversed(range(T)):
        x_start = diffusion.p_mean_variance(model, x, torch.tensor([t]), Y, s)["pred_xstart"]
        at, before = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t]
        if t < tail_steps:
            eps = (x - at.sqrt() * x_start) / (1 - at).sqrt()
            x = (before.sqrt() * x_start + (1 - before).sqrt() * eps).float()
            continue
        timestep = diffusion.kept[t]
        if t in selected:
            codebook = [selection.step_mask(BANK, timestep) * BANK[k] for k in range(candidates)]
            products = [float((z.double() * (IMAGE - x_start)[0]).sum()) for z in codebook]
            best = sorted(sorted(range(candidates), key=lambda k: (-abs(products[k]), k))[:atoms])
            signs = [1 if products[k] >= 0 else -1 for k in best]
            z = sum(sign * codebook[k] for k, sign in zip(best, signs, strict=True))
            z = z / z.norm() * math.sqrt(d)
            codewords.append((tuple(best), tuple(signs)))
        else:
            z = torch.randn(BANK.shape, generator=generator(BANK.chain_seed(0), "chain", timestep))
        beta = 1 - at / before
        mean = before.sqrt() * beta / (1 - at) * x_start + (1 - beta).sqrt() * (1 - before) / (1 - at) * x
        x = (mean + (beta * (1 - before) / (1 - at)).sqrt() * z).float()
    return tuple(codewords), x[0]


@pytest.mark.parametrize("settings", [POSTERIOR, {**POSTERIOR, "s": 1.5}, {"method": "ddim", "eta": 1.0}])
@pytest.mark.parametrize("atoms, selected_steps, tail_steps", [(1, 9, 0), (3, 4, 2), (12, 2, 0)])
def test_select_per_step_is_the_definition(unet, make_chain, evaluations, settings, atoms, selected_steps, tail_steps):
    chain = make_chain({"selected_steps": selected_steps}, **settings, tail_steps=tail_steps)
    choice = select_per_step(chain, Y, IMAGE, 0, StepCodebook(12, atoms), mse)
    assert choice.evaluations == sum(evaluations)
    codewords, picture = by_definition(unet, settings.get("s", 1.0), 12, atoms, selected_steps, tail_steps)
    assert choice.codewords == codewords and choice.index == 0 and choice.steps == T
    torch.testing.assert_close(choice.picture, picture, rtol=0, atol=1e-3)
    assert choice.score == mse(choice.picture[None], IMAGE).item()


def test_step_codebook_in_blocks_picks_what_a_kept_one_does(monkeypatch):
    bank, kept = NoiseBank((3, 4, 6), 70, 3), StepCodebook(70, 3)
    given = [(bank.sized(3, *size), normals(3, *size, seed=k), k) for k, size in enumerate(((4, 6), (4, 6), (4, 8)))]
    picked = [kept.pick(*each) for each in given]
    monkeypatch.setattr(selection, "CODEBOOK_BYTES", 0)
    assert picked == [StepCodebook(70, 3).pick(*each) for each in given]


def test_step_codebook_finds_a_residual_made_of_atoms_and_breaks_ties():
    residual = selection.step_mask(BANK, 5) * (BANK[11] - BANK[4])
    assert StepCodebook(20, 2).pick(BANK, residual, 5) == ((4, 11), (-1, 1))
    assert StepCodebook(20, 3).pick(BANK, torch.zeros(BANK.shape), 5) == ((0, 1, 2), (1, 1, 1))


def test_chain_run_uses_the_codewords_that_are_left_and_seeded_noise_behind(make_chain):
    chain = make_chain({"selected_steps": 4}, **POSTERIOR)
    codewords = select_per_step(chain, Y, IMAGE, 6, StepCodebook(16, 4)).codewords
    noises, pieces = {}, [codewords, codewords[:2], (), codewords[:1]]
    together = chain.run(Y, [6] * 4, pieces, on_step=lambda t, x, out: noises.update({t: x})).images
    alone = [chain.run(Y, [6], [piece]).images for piece in pieces]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    assert torch.equal(alone[2], chain.run(Y, [6]).images)
    # Selected are t = 4, 3, 2, 1: x_4 is common to all, x_3 to those with a codeword for t = 4, and so on.
    same = [[bool((noises[t][k] - noises[t][0]).abs().max() < 1e-4) for k in range(4)] for t in (4, 3, 2, 1)]
    assert same == [[True] * 4, [True, True, False, True], [True, True, False, False], [True, False, False, False]]


def test_select_both_joins_the_two(make_chain):
    chain, codebook = make_chain({"selected_steps": 3}, **POSTERIOR), StepCodebook(16, 4)
    both = select_both(chain, Y, IMAGE, range(5), codebook, feedback_steps=2)
    first = select_initial(chain, Y, IMAGE, range(5), feedback_steps=2)
    second = select_per_step(chain, Y, IMAGE, first.index, codebook, mse)
    assert (both.index, both.codewords, both.score) == (first.index, second.codewords, second.score)
    assert torch.equal(both.picture, second.picture) and both.evaluations == first.evaluations + second.evaluations


REFUSED = {
    "--selected_steps 2: 0 steps take a noise": ({"method": "ddim"}, 2),
    "--selected_steps 10: 9 steps take a noise": (POSTERIOR, T),
    "--selected_steps 1: 0 steps take a noise": ({**POSTERIOR, "tail_steps": T}, 1),
    "--tail_steps 11: expected 0 to 10": ({"tail_steps": T + 1}, 0),
}


def test_chain_and_search_refuse_more_steps_than_there_are(make_chain):
    for words, (settings, selected_steps) in REFUSED.items():
        with pytest.raises(InputError, match=words):
            make_chain({"selected_steps": selected_steps}, **settings)
    with pytest.raises(InputError, match="--feedback_steps 10: expected 0"):
        select_initial(make_chain(), Y, IMAGE, [1, 2], feedback_steps=T)


def test_rare_weights_are_inverse_shares_of_the_classes():
    label = torch.tensor([[3, 3, 3, 7], [3, 3, 3, 5]])[None, None]
    assert torch.allclose(rare_weights(label), torch.tensor([[4 / 9] * 3 + [8 / 3], [4 / 9] * 3 + [8 / 3]])[None, None])
    assert rare_weights(label).mean() == pytest.approx(1)


@pytest.fixture(scope="module")
def layered():
    """A tiny UNet with a colour layer, its process of four steps below 600, and that of all steps."""
    flags = {"noise_schedule": "cosine", "prediction": "v", "color_layer": True, "learn_sigma": False}
    model, whole = tiny_network(**flags)
    late = {"diffusion_steps": 1000, "noise_schedule": "cosine", "timestep_respacing": "4", "start_time": 600}
    return model.requires_grad_(False), create_gaussian_diffusion(**late, prediction="v"), whole


PLANES = torch.cat([Y, normals(1, 3, *SIZE, seed=3).clamp(-1, 1), torch.full((1, 1, *SIZE), 0.5)], dim=1)


@pytest.mark.parametrize("sent", [True, False])
def test_late_start_is_ddim_from_the_noised_layer_or_without_one_from_the_noised_mean(layered, sent):
    model, late, whole = layered
    planes = torch.cat([PLANES[:, :-4], PLANES[:, -4:] * sent], dim=1)
    chain = Chain(model, late, BANK, SamplerSettings("ddim", clip_denoised=False, start_time=600), whole=whole)
    x, alpha = BANK[4][None], [*whole.alphas_cumprod[[0, 200, 399, 599]].tolist()]
    assert late.kept == [0, 200, 399, 599]
    last = float(whole.alphas_cumprod[-1])
    mean = math.sqrt(last) * x - math.sqrt(1 - last) * model(x, torch.tensor([999.0]), planes)
    x = math.sqrt(1 - alpha[3]) * x + math.sqrt(alpha[3]) * mean * (not sent)
    for k in (3, 2, 1, 0):
        v = model(x, torch.tensor([float(late.kept[k])]), planes)
        x_start = math.sqrt(alpha[k]) * x - math.sqrt(1 - alpha[k]) * v
        eps = (x - math.sqrt(alpha[k]) * x_start) / math.sqrt(1 - alpha[k])
        below = alpha[k - 1] if k else 1.0
        x = math.sqrt(below) * x_start + math.sqrt(1 - below) * eps
    result = chain.run(planes, [4])
    assert torch.allclose(result.images, (planes[:, -4:-1] + 0.2 * x).clamp(-1, 1), atol=1e-5)
    assert result.steps.tolist() == [4] and chain.evaluations(result) == 4 + (not sent)


def test_realism_is_the_share_of_the_sample_beside_the_mean(layered):
    model, late, whole = layered
    settings = SamplerSettings("ddim", clip_denoised=False, start_time=600)
    chains = {r: Chain(model, late, BANK, settings, realism=r, whole=whole) for r in (0.0, 0.3, 1.0)}
    dim = torch.cat([Y, PLANES[:, 5:] * 0.1], dim=1)  # where no picture is clipped
    mean, some, sample = (chains[r].run(dim, [2]).images for r in (0.0, 0.3, 1.0))
    x, alpha = BANK[2][None], float(whole.alphas_cumprod[999])
    expected = math.sqrt(alpha) * x - math.sqrt(1 - alpha) * model(x, torch.tensor([999.0]), dim)
    assert torch.allclose(mean, (dim[:, 5:8] + 0.2 * expected).clamp(-1, 1), atol=1e-5)
    inside = (mean.abs() < 1) & (sample.abs() < 1)
    assert inside.any() and torch.allclose(some[inside], (0.7 * mean + 0.3 * sample)[inside], atol=1e-5)
    assert [chain.evaluations(chain.run(dim, [2])) for chain in chains.values()] == [1, 5, 4]
    first, last = (select_initial(chains[r], dim, IMAGE, range(6)) for r in (0.0, 1.0))
    assert first.index == last.index and torch.equal(first.picture, chains[0.0].run(dim, [first.index]).images[0])


def test_weight_moves_the_choice_of_noise_to_where_it_is(layered):
    model, late, whole = layered
    settings = SamplerSettings("ddim", eta=1.0, clip_denoised=False, start_time=600)
    chain = Chain(model, late, BANK, settings, selected_steps=3, whole=whole)
    left = (torch.arange(SIZE[1]) < 4).float().expand(1, 1, *SIZE)
    plain, weighted = (
        select_per_step(chain, PLANES, IMAGE, 0, StepCodebook(20, 1), weight=weight) for weight in (1.0, left)
    )
    assert plain.codewords != weighted.codewords
    seen = {}

    def look(t, x, out):
        seen.setdefault(t, out["pred_xstart"])

    chain.run(PLANES, [0], on_step=look)
    wanted = left * (residual(IMAGE, PLANES) - seen[3])
    products = [float((wanted[0] * step_mask(BANK, 599) * BANK[k]).sum()) for k in range(20)]
    assert weighted.codewords[0][0] == (max(range(20), key=lambda k: abs(products[k])),)
