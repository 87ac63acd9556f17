"""Noise selection: against the definition in a plain loop, against exhaustive search, and where the best denoiser is known."""

import functools
import math

import pytest
import torch
from conftest import tiny_network

from guided_diffusion import EarlyStop, InputError, NoiseBank, sample
from guided_diffusion.diffusion.gaussian_diffusion import create_gaussian_diffusion
from guided_diffusion.link.selection import (
    Chain,
    StepCodebook,
    codeword_noise,
    halving_rungs,
    mse,
    select_both,
    select_initial,
    select_per_step,
    step_mask,
)
from guided_diffusion.random_streams import generator

SIZE, T = (8, 16), 10
BANK = NoiseBank((3, *SIZE), 20, seed=150)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def unet():
    """A tiny UNet whose output layer is not zero, and its process of ten steps."""
    model, diffusion = tiny_network(timestep_respacing=str(T), noise_schedule="cosine", prediction="v")
    return model.requires_grad_(False), diffusion


@pytest.fixture
def make_chain(unet):
    return functools.partial(Chain, *unet, BANK)


@pytest.fixture
def evaluations(unet):
    """List that gets the number of samples of every network evaluation."""
    calls = []
    handle = unet[0].register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    yield calls
    handle.remove()


Y = (normals(1, 5, *SIZE, seed=7) > 0.8).float()
IMAGE = normals(1, 3, *SIZE, seed=9).clamp(-1, 1)


# -- where the chain starts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"method": "ddpm"}, {"method": "ddim", "s": 1.5}])
def test_the_exhaustive_winner_is_the_best_of_single_chains(unet, make_chain, options):
    candidates = [17, 3, 4, 9, 12]
    alone = {i: sample(*unet, Y, BANK[i][None], seeds=[BANK.chain_seed(i)], **options).images for i in candidates}
    scores = {i: mse(picture, IMAGE).item() for i, picture in alone.items()}
    best = min(scores, key=scores.get)
    choice = select_initial(make_chain(**options), Y, IMAGE, candidates, batch_size=2)
    assert choice.index == best and choice.codewords == () and choice.steps == T
    assert torch.equal(choice.picture[None], alone[best]) and choice.score == scores[best]
    worst = select_initial(make_chain(**options), Y, IMAGE, candidates, lambda *pair: -mse(*pair))
    assert worst.index == max(scores, key=scores.get)


def test_equal_scores_go_to_the_smaller_index(make_chain):
    for feedback_steps in (0, 2):
        choice = select_initial(
            make_chain(), Y, IMAGE, [8, 5, 11, 6], lambda x, image: torch.ones(len(x)), feedback_steps=feedback_steps
        )
        assert choice.index == 5


@pytest.mark.parametrize("options", [{"s": 1.0}, {"s": 2.0}, {"early_stop": EarlyStop(0.3, patience=1)}])
@pytest.mark.parametrize("feedback_steps", [0, 2])
def test_evaluations_are_those_really_made(make_chain, evaluations, options, feedback_steps):
    chain = make_chain(**options)
    choice = select_initial(chain, Y, IMAGE, range(7), batch_size=3, feedback_steps=feedback_steps, finalists=2)
    assert choice.evaluations == sum(evaluations)
    whole = 8 * T * (2 if chain.s > 1 else 1)  # the winner's picture is made again, alone
    assert choice.evaluations == whole if options == {"s": 1.0} and not feedback_steps else choice.evaluations <= whole
    if feedback_steps or "early_stop" in options:
        assert choice.evaluations < whole


def test_one_candidate_needs_no_search(make_chain, evaluations):
    choice = select_initial(make_chain(), Y, IMAGE, [7])
    assert choice.index == 7 and choice.evaluations == sum(evaluations) == T


def test_the_label_map_work_is_done_once_per_search(unet, make_chain):
    calls = []
    handle = unet[0].middle_block[0].in_norm.mlp_shared.register_forward_hook(lambda *_: calls.append(1))
    select_initial(make_chain(s=2.0), Y, IMAGE, range(5), batch_size=2, feedback_steps=3)
    handle.remove()
    assert len(calls) == 2  # the label map and the empty one


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpm++"])
def test_halving_equals_the_plain_rule(make_chain, method):
    chain, alive = make_chain(method=method), list(range(20))
    assert halving_rungs(20, T, 2, finalists=2) == [(2, 5), (4, 2), (None, 1)]
    for network_steps, keep in ((2, 5), (4, 2), (None, 1)):
        pictures = [chain.run(Y, [i], network_steps=network_steps).images for i in alive]
        scores = dict(zip(alive, (mse(picture, IMAGE).item() for picture in pictures), strict=True))
        alive = sorted(alive, key=scores.get)[:keep]
    choice = select_initial(chain, Y, IMAGE, range(20), batch_size=6, feedback_steps=2, finalists=2)
    assert [choice.index] == alive and choice.score == scores[choice.index]
    assert choice.evaluations == 20 * 2 + 5 * 4 + 2 * T + T


def test_with_all_as_finalists_halving_is_exhaustive(make_chain):
    chain = make_chain()
    exhaustive = select_initial(chain, Y, IMAGE, range(6))
    all_kept = select_initial(chain, Y, IMAGE, range(6), feedback_steps=3, finalists=6)
    assert (all_kept.index, all_kept.score, all_kept.evaluations) == (exhaustive.index, exhaustive.score, 7 * T)


@pytest.mark.parametrize(
    "numbers, rungs",
    [
        ((64, 50, 5, 4), [(5, 16), (10, 4), (None, 1)]),
        ((1000, 50, 5, 4), [(5, 250), (10, 63), (20, 16), (None, 1)]),  # 40 network steps would be no cheap look
        ((16, 50, 5, 4), [(5, 4), (None, 1)]),
        ((6, 50, 40, 4), [(40, 4), (None, 1)]),
        ((4, 50, 5, 4), [(None, 1)]),
        ((1, 50, 5, 4), []),
        ((64, 50, 0, 4), [(None, 1)]),
    ],
)
def test_the_plan_of_a_halving(numbers, rungs):
    assert halving_rungs(*numbers) == rungs


def test_a_search_of_64_with_its_defaults_costs_less_than_a_quarter_of_the_exhaustive_one():
    evaluations, left = 50, 64  # the picture itself
    for network_steps, keep in halving_rungs(64, 50, 5, finalists=4):
        evaluations, left = evaluations + left * (network_steps or 50), keep
    assert evaluations <= 0.25 * 64 * 50


# -- the noise of its steps: the definition ---------------------------------------------------------------------------


def by_definition(unet, options, candidates, atoms, selected_steps, tail_steps):
    """Per-step selection as a plain loop: (picks, picture)."""
    model, diffusion = unet
    x, codewords, d = BANK[0][None], [], math.prod(BANK.shape)
    noisy = [t for t in reversed(range(T)) if t >= max(1, tail_steps)]
    selected = noisy[-selected_steps:] if selected_steps else noisy
    for t in reversed(range(T)):
        out = diffusion.p_mean_variance(model, x, torch.tensor([t]), Y, options.get("s", 1.0))
        at, before, x_start = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod_prev[t], out["pred_xstart"]
        if t < tail_steps:
            eps = (x - at.sqrt() * x_start) / (1 - at).sqrt()
            x = (before.sqrt() * x_start + (1 - before).sqrt() * eps).float()
            continue
        timestep = diffusion.kept[t]
        if t in selected:
            mask = step_mask(BANK, timestep)
            codebook = [mask * BANK[k] for k in range(candidates)]
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


@pytest.mark.parametrize("options", [{"method": "ddpm"}, {"method": "ddpm", "s": 1.5}, {"method": "ddim", "eta": 1.0}])
@pytest.mark.parametrize("atoms, selected_steps, tail_steps", [(1, 0, 0), (3, 4, 2), (12, 2, 0)])
def test_per_step_selection_is_the_definition(unet, make_chain, options, atoms, selected_steps, tail_steps):
    chain = make_chain(**options, selected_steps=selected_steps, tail_steps=tail_steps)
    choice = select_per_step(chain, Y, IMAGE, 0, StepCodebook(12, atoms), mse)
    codewords, picture = by_definition(unet, options, 12, atoms, selected_steps, tail_steps)
    assert choice.codewords == codewords and choice.index == 0 and choice.steps == T
    assert len(codewords) == (selected_steps or T - max(1, tail_steps))
    torch.testing.assert_close(choice.picture, picture, rtol=0, atol=1e-3)
    assert choice.score == mse(choice.picture[None], IMAGE).item()


@pytest.mark.parametrize("s", [1.0, 1.5])
def test_per_step_evaluations_are_those_really_made(make_chain, evaluations, s):
    choice = select_per_step(make_chain(selected_steps=0, s=s), Y, IMAGE, 3, StepCodebook(8, 2))
    assert choice.evaluations == sum(evaluations) == T * (2 if s > 1 else 1) and choice.score is None


def test_masks_follow_from_bank_seed_and_timestep():
    mask = step_mask(BANK, 40)
    assert mask.shape == BANK.shape and mask.dtype == torch.float32 and set(mask.unique().tolist()) == {-1.0, 1.0}
    assert abs(mask.mean().item()) < 0.2
    assert torch.equal(mask, step_mask(NoiseBank((3, *SIZE), 7, seed=150), 40))
    assert not torch.equal(mask, step_mask(BANK, 41)) and not torch.equal(
        mask, step_mask(NoiseBank((3, *SIZE), 20, 151), 40)
    )


class CountingBank(NoiseBank):
    """A bank that notes which entries it makes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.made = []

    def __getitem__(self, index):
        self.made.append(index)
        return super().__getitem__(index)


def test_picked_noise_has_the_norm_of_its_size_and_makes_only_its_entries():
    bank = CountingBank((3, *SIZE), 20, 150)
    z = codeword_noise(bank, ((4, 7, 19), (1, -1, 1)), 30)
    assert bank.made == [4, 7, 19]
    expected = step_mask(bank, 30) * (BANK[4] - BANK[7] + BANK[19])
    torch.testing.assert_close(z, expected * math.sqrt(z.numel()) / expected.norm())
    assert z.norm().item() == pytest.approx(math.sqrt(3 * 8 * 16))


@pytest.mark.parametrize("candidates", [1, 5, 32, 33, 70])
def test_a_streamed_codebook_picks_what_a_kept_one_does(candidates):
    bank = CountingBank((3, 4, 6), 70, 3)
    kept, streamed = (
        StepCodebook(candidates, min(3, candidates)),
        StepCodebook(candidates, min(3, candidates), memory=0),
    )
    for k in range(3):
        assert kept.pick(bank, normals(3, 4, 6, seed=k), k) == streamed.pick(bank, normals(3, 4, 6, seed=k), k)
    assert bank.made == [*range(candidates)] * 4  # once for the one, at every step for the other


def test_a_kept_codebook_follows_the_picture_size():
    codebook, bank = StepCodebook(8, 2), NoiseBank((3, 4, 6), 8, 3)
    for size in ((4, 6), (4, 8), (4, 6)):
        residual = normals(3, *size)
        assert codebook.pick(bank.sized(3, *size), residual, 5) == StepCodebook(8, 2).pick(
            bank.sized(3, *size), residual, 5
        )


def test_ties_go_to_the_smaller_entry():
    assert StepCodebook(20, 3).pick(BANK, torch.zeros(BANK.shape), 5) == ((0, 1, 2), (1, 1, 1))


def test_a_residual_made_of_atoms_is_found():
    residual = step_mask(BANK, 5) * (BANK[11] - BANK[4])
    assert StepCodebook(20, 2).pick(BANK, residual, 5) == ((4, 11), (-1, 1))


# -- the receiver -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"selected_steps": 0},
        {"selected_steps": 3, "tail_steps": 2, "s": 1.5},
        {"selected_steps": 5, "method": "ddim", "eta": 1.0},
    ],
)
def test_the_receiver_replays_the_picture_bit_by_bit(make_chain, options):
    chain = make_chain(**options)
    choice = select_per_step(chain, Y, IMAGE, 6, StepCodebook(16, 4))
    assert torch.equal(chain.run(Y, [6], [choice.codewords]).images[0], choice.picture)
    assert not torch.equal(chain.run(Y, [6]).images[0], choice.picture)
    assert not torch.equal(chain.run(Y, [6], [choice.codewords[:-1]]).images[0], choice.picture)


def test_the_winner_of_a_search_is_replayed_bit_by_bit(make_chain):
    chain = make_chain()
    choice = select_initial(chain, Y, IMAGE, range(5), feedback_steps=2)
    assert torch.equal(chain.run(Y, [choice.index]).images[0], choice.picture)


def test_what_is_left_of_the_picks_is_used_and_the_rest_is_seeded(make_chain):
    chain = make_chain(selected_steps=4)
    codewords = select_per_step(chain, Y, IMAGE, 6, StepCodebook(16, 4)).codewords
    noises = {}

    def tracing(t, x, out):
        noises[t] = x

    pieces = [codewords, codewords[:2], (), codewords[:1]]
    chain.run(Y, [6] * 4, pieces, on_step=tracing)
    alone = [chain.run(Y, [6], [piece]).images for piece in pieces]
    together = chain.run(Y, [6] * 4, pieces).images
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    assert torch.equal(alone[2], chain.run(Y, [6]).images)
    # Selected are t = 4, 3, 2, 1: x_4 is common to all, x_3 to those with a pick for t = 4, and so on.
    same = [[bool((noises[t][k] - noises[t][0]).abs().max() < 1e-4) for k in range(4)] for t in (4, 3, 2, 1)]
    assert same == [[True] * 4, [True, True, False, True], [True, True, False, False], [True, False, False, False]]


def test_selected_steps_are_the_last_that_take_a_noise(make_chain):
    assert make_chain().selected == []
    assert make_chain(selected_steps=0).selected == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert make_chain(selected_steps=3).selected == [3, 2, 1]
    assert make_chain(selected_steps=3, tail_steps=4).selected == [6, 5, 4]
    assert make_chain(selected_steps=0, tail_steps=9).selected == [9]


def test_both_selections_join(make_chain, evaluations):
    chain, codebook = make_chain(selected_steps=3), StepCodebook(16, 4)
    both = select_both(chain, Y, IMAGE, range(5), codebook, feedback_steps=2)
    assert both.evaluations == sum(evaluations)
    first = select_initial(chain, Y, IMAGE, range(5), feedback_steps=2)
    second = select_per_step(chain, Y, IMAGE, first.index, codebook, mse)
    assert (both.index, both.codewords, both.score) == (first.index, second.codewords, second.score)
    assert torch.equal(both.picture, second.picture) and both.evaluations == first.evaluations + second.evaluations


# -- a Gaussian data distribution with the exact denoiser -------------------------------------------------------------

TOY = (32, 64)


def spectrum():
    """Power spectrum of pictures with a 1/f^2 power law, of standard deviation 0.33, for rfft2."""
    rows, columns = torch.fft.fftfreq(TOY[0])[:, None], torch.fft.fftfreq(TOY[1])
    power = 1 / (rows**2 + columns**2 + 1 / TOY[1] ** 2)
    return (0.33**2 * power / power.mean())[:, : TOY[1] // 2 + 1]


def filtered(x, gain):
    return torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=TOY)


@pytest.fixture(scope="module")
def toy():
    """The chain of 50 steps with E[x_0 | x_t] as its network, and a picture."""
    alphas_cumprod = create_gaussian_diffusion(diffusion_steps=1000, noise_schedule="cosine").alphas_cumprod.float()
    power = spectrum()

    def network(x, timesteps, y):
        alpha_bar = alphas_cumprod[int(timesteps[0])]
        return filtered(x, alpha_bar.sqrt() * power / (alpha_bar * power + 1 - alpha_bar))

    diffusion = create_gaussian_diffusion(
        diffusion_steps=1000, noise_schedule="cosine", timestep_respacing="50", prediction="x0"
    )
    chain = Chain(network, diffusion, NoiseBank((3, *TOY), 256, 150), clip_denoised=False, selected_steps=0)
    return chain, filtered(normals(1, 3, *TOY, seed=90), power.sqrt())


def psnr_of(choice, image):
    return -10 * math.log10(mse(choice.picture[None], image).item() / 4)


def test_more_atoms_come_nearer_and_the_masked_bank_is_as_good_as_fresh_codebooks(toy, monkeypatch):
    chain, image = toy
    y = torch.zeros(1, 1, *TOY)
    random = -10 * math.log10(mse(chain.run(y, [0]).images, image).item() / 4)
    one, many = (psnr_of(select_per_step(chain, y, image, 0, StepCodebook(256, atoms)), image) for atoms in (1, 16))
    assert one > random + 2.5 and many > one + 2.5
    monkeypatch.setattr("guided_diffusion.link.selection.step_mask", lambda bank, timestep: torch.ones(bank.shape))
    unmasked = psnr_of(select_per_step(chain, y, image, 0, StepCodebook(256, 16)), image)
    assert many > unmasked + 2

    class FreshCodebooks:  # another bank at every step, not masked
        def pick(self, bank, residual, timestep):
            self.bank = NoiseBank(bank.shape, 256, 1000 + timestep)
            return StepCodebook(256, 16).pick(self.bank, residual, timestep)

    fresh = FreshCodebooks()
    make = codeword_noise
    monkeypatch.setattr(
        "guided_diffusion.link.selection.codeword_noise", lambda bank, pick, t: make(fresh.bank, pick, t)
    )
    assert psnr_of(select_per_step(chain, y, image, 0, fresh), image) == pytest.approx(many, abs=0.4)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "ddim"}, "per-step selection with ddim, eta 0: it needs ancestral sampling, or DDIM with eta 1"),
        ({"method": "ddim", "eta": 0.5}, "eta 0.5"),
        ({"method": "dpm++"}, r"per-step selection with dpm\+\+"),
        ({"method": "dpm++", "eta": 1.0}, r"per-step selection with dpm\+\+"),
        ({"early_stop": EarlyStop()}, "drop early stopping"),
        ({"selected_steps": T}, "--selected_steps 10: expected 0 .* to 9"),
        ({"selected_steps": -1}, "--selected_steps -1"),
        ({"selected_steps": 7, "tail_steps": 4}, "expected 0 .* to 6, .* --tail_steps 4"),
        ({"tail_steps": T}, "--selected_steps 0: expected 0 .* to 0"),
    ],
)
def test_chains_that_cannot_be_selected_for(make_chain, options, words):
    with pytest.raises(InputError, match=words):
        make_chain(**{"selected_steps": 0, **options})


@pytest.mark.parametrize(
    "options, words",
    [
        ({"candidates": []}, "--candidates 0: expected 1 to 20 entries"),
        ({"candidates": range(21)}, "--candidates 21"),
        ({"candidates": [-1]}, "--candidates 1"),
        ({"feedback_steps": T}, "--feedback_steps 10: expected 0 .* to 9"),
        ({"feedback_steps": -1}, "--feedback_steps -1"),
        ({"finalists": 0}, "--finalists 0"),
        ({"distance": lambda x, image: mse(x, image).mean()}, r"one number for each of 2 pictures, found \(\)"),
    ],
)
def test_bad_searches(make_chain, options, words):
    with pytest.raises(InputError, match=words):
        select_initial(make_chain(), Y, IMAGE, **{"candidates": range(2), **options})


@pytest.mark.parametrize(
    "numbers, words", [((0, 1), "--step_candidates 0"), ((4, 0), "--step_atoms 0"), ((4, 5), "--step_atoms 5")]
)
def test_bad_codebooks(numbers, words):
    with pytest.raises(InputError, match=words):
        StepCodebook(*numbers)


def test_a_codebook_larger_than_the_bank(make_chain):
    with pytest.raises(InputError, match="--step_candidates 21: the noise bank has 20 entries"):
        select_per_step(make_chain(selected_steps=0), Y, IMAGE, 0, StepCodebook(21, 1))


def test_per_step_selection_needs_a_chain_for_it_and_picks_as_well(make_chain):
    with pytest.raises(InputError, match="--selected_steps"):
        select_per_step(make_chain(), Y, IMAGE, 0, StepCodebook(4, 1))
    codewords = [(((0,), (1,)),)]
    for chain, samples, given in ((make_chain(), 1, codewords), (make_chain(selected_steps=0), 2, codewords)):
        with pytest.raises(InputError, match="picks for 1 samples of up to 1 steps"):
            chain.run(Y, [0] * samples, given)
