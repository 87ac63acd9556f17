"""How the cost grows: with pixels, batch, entries of the bank, and candidates of noise selection."""

from ..diffusion.solvers import SamplerSettings
from ..link.noise_bank import NoiseBank
from ..link.selection import Chain
from .sampling import fast_step, plain_step
from .setup import fast_network, inputs, plain_network, precision_context
from .timing import Contender, alternate, seconds, summary

FACTORS = (0.5, 1, 2)  # of the picture's sides
BATCHES = (1, 2, 4, 8)
BANKS = (10, 100, 1000, 10000)
CANDIDATES = (1, 4, 16)
TOGETHER = 8  # candidates in one batch, as noise selection does it
CHAIN = 20  # steps of the chains that candidates are priced for


def steps(setup):
    """A fast reverse step at several sizes and batches, in every precision."""
    plain, diffusion = plain_network(setup), setup.diffusion()
    height, width = setup.size
    shapes = [(1, int(height * f), int(width * f)) for f in FACTORS] + [(n, height, width) for n in BATCHES[1:]]
    fitting = [shape for shape in shapes if not (shape[1] % plain.downsampling or shape[2] % plain.downsampling)]
    rows = []
    for precision in setup.precisions:
        fast = fast_network(setup, plain, precision)
        contenders = {
            shape: fast_step(setup, fast, diffusion, inputs(setup, shape[0], shape[1:]), precision) for shape in fitting
        }
        times = alternate(
            contenders, _rounds(setup), setup.device, lambda text, p=precision: setup.tell(f"{p}, {text}")
        )
        for n, h, w in fitting:
            ms = summary(times, (n, h, w), (n, h, w))["ms"]
            rows.append(
                {
                    "precision": precision,
                    "picture": f"{h}x{w}",
                    "batch": n,
                    "ms": ms,
                    "ms_per_picture": ms / n,
                    "ns_per_pixel": 1e6 * ms / (n * h * w),
                }
            )
    return {
        "rows": rows,
        "notes": [f"medians of {_rounds(setup)} alternations of one guided reverse step; one label map"],
    }


def banks(setup):
    """Banks of several sizes: the one pass over the stream, and an entry afterwards. A reverse step does not depend on it."""
    rows = []
    for size in BANKS[: 3 if setup.quick else None]:
        setup.tell(f"{size} entries")
        bank = NoiseBank((3, *setup.size), size)
        first = seconds(Contender(lambda bank=bank, size=size: bank[size - 1]), setup.device)
        times = [
            seconds(Contender(lambda bank=bank, i=i, size=size: bank[i * size // 10]), setup.device) for i in range(10)
        ]
        rows.append(
            {"entries": size, "index_bits": bank.index_bits, "pass_s": first, "entry_ms": 1e3 * sorted(times)[5]}
        )
    return {"rows": rows, "notes": []}


def candidates(setup):
    """K noise candidates of one picture, their label-map work done once, against K plain chains in the same precision."""
    plain = plain_network(setup)
    given, run = inputs(setup), min(2 if setup.quick else 4, setup.flags.diffusion_steps)
    diffusion = setup.diffusion(run)
    rows = []
    for precision in setup.precisions:
        context = precision_context(setup, precision)
        chain = Chain(
            fast_network(setup, plain, precision),
            diffusion,
            NoiseBank((3, *setup.size)),
            SamplerSettings(s=setup.s),
            device=setup.device,
            precision=context,
            cache_bytes=setup.cache_bytes,
        )
        one = plain_step(setup, plain, setup.diffusion(), given, precision)
        ready = chain.prepare(given.y)
        contenders = {"plain": one, "label map": Contender(lambda chain=chain: chain.prepare(given.y))}
        for k in CANDIDATES:
            contenders[k] = Contender(lambda chain=chain, ready=ready, k=k: _chains(chain, ready, k))
        times = alternate(
            contenders,
            1 if setup.quick else 3,
            setup.device,
            lambda text, p=precision: setup.tell(f"{p}, candidates: {text}"),
        )
        step, label_map = (summary(times, name, name)["ms"] for name in ("plain", "label map"))
        for k in CANDIDATES:
            ours, theirs = label_map + CHAIN / run * summary(times, k, k)["ms"], k * CHAIN * step
            rows.append(
                {
                    "precision": precision,
                    "candidates": k,
                    "fast_s": ours / 1e3,
                    "plain_s": theirs / 1e3,
                    "share_of_plain_%": 100 * ours / theirs,
                    "label_map_ms": label_map,
                }
            )
    return {
        "rows": rows,
        "notes": [f"chains of {CHAIN} ancestral steps, scaled from {run}; up to {TOGETHER} candidates run together"],
    }


def _chains(chain, ready, k):
    for start in range(0, k, TOGETHER):
        chain.run(ready, range(start, min(start + TOGETHER, k)))


def _rounds(setup):
    return max(1, setup.rounds // 2)
