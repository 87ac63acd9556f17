"""Checkpoint files: names, whole writes, safe reads, and the family's state dicts."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from guided_diffusion import create_model_and_diffusion, load_weights, model_and_diffusion_defaults
from guided_diffusion.console import InputError
from guided_diffusion.diffusion.unet import ResBlock, SPADEResBlock
from guided_diffusion.training.checkpoint import (
    load_file,
    load_parts,
    problem_of,
    save_parts,
    sweep_temporary_files,
    with_legacy_keys,
)
from guided_diffusion.training.checkpoint_choice import newest_checkpoint, parse_checkpoint_path, resume_point
from guided_diffusion.training.manifest import file_name, manifest_name

RATES = ("0.9999", "0.99")
KINDS = ("model", "opt", "state", "ema_0.9999_", "ema_0.99_")


TINY_FLAGS = {
    "num_channels": 32,
    "channel_mult": "1,1",
    "num_res_blocks": 1,
    "num_classes": 4,
    "attention_resolutions": "32",
}


def tiny_model(seed=0, **flags):
    torch.manual_seed(seed)
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **TINY_FLAGS, **flags})[0]


def parts(value=1.0, kinds=KINDS):
    return {kind: {"w": torch.full((2, 3), value)} for kind in kinds}


def names(step, kinds=KINDS):
    return sorted([manifest_name(step), *(file_name(kind, step) for kind in kinds)])


def flip(path):
    """Change one bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def weights():
    return tiny_model(1).state_dict()


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "step", "name"),
    [
        ("model", 0, "model000000.pt"),
        ("opt", 12, "opt000012.pt"),
        ("state", 999_999, "state999999.pt"),
        ("ema_0.9999_", 100_000, "ema_0.9999_100000.pt"),
        ("model", 1_234_567, "model1234567.pt"),
    ],
)
def test_file_names(kind, step, name):
    assert file_name(kind, step) == name


def test_saved_files_have_their_names_and_nothing_else_is_left(tmp_path):
    save_parts(tmp_path, 7, parts())
    assert sorted(os.listdir(tmp_path)) == names(7)


@pytest.mark.parametrize("name", ["model000012.pt", "model1234567.pt"])
def test_parse_checkpoint_path(name):
    assert parse_checkpoint_path(f"runs/a.b/{name}") == (Path("runs/a.b"), int(name[5:-3]))


@pytest.mark.parametrize(
    "name", ["ema_0.9999_000012.pt", "opt000012.pt", "model12.pt", "model000012.pt.tmp", "model.pt", ""]
)
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match=r"--resume_checkpoint .*: expected a file called model<step>\.pt, or auto"):
        parse_checkpoint_path(f"runs/{name}")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_the_manifest_appears_last_and_the_state_before_it(tmp_path, monkeypatch):
    order, replace = [], os.replace

    def note(source, target):
        order.append(Path(target).name)
        assert len(list(tmp_path.glob("*.tmp"))) == 8 - len(
            order
        )  # everything was written before the first took its name
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    save_parts(tmp_path, 7, parts())
    assert order[-2:] == ["state000007.pt", "manifest000007.json"] and len(order) == 7
    assert order[0] == "manifest000007.json"  # one that says that the rest is coming


@pytest.mark.parametrize("renames", range(1, 7))
def test_a_first_save_that_is_cut_short_is_no_checkpoint_yet(tmp_path, monkeypatch, renames):
    def killed(source, target, count=[0], replace=os.replace):  # noqa: B006 - counts
        count[0] += 1
        if count[0] > renames:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_parts(tmp_path, 7, parts())
    said = []
    assert resume_point(tmp_path, "auto", log=said.append) is None and "starting afresh" in said[0]
    save_parts(tmp_path, 7, parts())
    assert resume_point(tmp_path, "auto") == (str(tmp_path), 7)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
@pytest.mark.parametrize("fails_at", range(5))
def test_a_failed_save_leaves_the_earlier_files_and_nothing_else(tmp_path, monkeypatch, error, fails_at):
    save_parts(tmp_path, 7, parts(1.0))
    save, calls = torch.save, []

    def fill_the_disk(contents, f):
        calls.append(f)
        if len(calls) <= fails_at:
            return save(contents, f)
        f.write(b"half a check")
        raise error

    monkeypatch.setattr(torch, "save", fill_the_disk)
    for step in (7, 8):  # over a whole checkpoint, and a new one
        calls.clear()
        with pytest.raises(
            OSError, match=rf"{KINDS[fails_at]}00000{step}\.pt: cannot be written .*change --checkpoint_dir"
        ):
            save_parts(tmp_path, step, parts(2.0))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == names(7)
    assert problem_of(tmp_path, 7) == "" and newest_checkpoint(tmp_path) == 7
    for kind in KINDS:
        assert same(load_file(tmp_path / file_name(kind, 7)), parts(1.0)[kind])


def test_a_disk_that_is_full_at_the_last_moment(tmp_path, monkeypatch):
    """Some disks say so only when asked whether all has arrived."""
    save_parts(tmp_path, 7, parts())
    sync, calls = os.fsync, []

    def refuse_the_sixth(number):
        calls.append(number)
        if len(calls) == 6:  # the manifest
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", refuse_the_sixth)
    with pytest.raises(OSError, match=r"manifest000008\.json: cannot be written .*No space left"):
        save_parts(tmp_path, 8, parts())
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == names(7)


def test_a_real_limit_on_file_sizes(tmp_path):
    """torch writes from C++: its error must come through as ours."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"opt000007\.pt: cannot be written \(.*File too large"):
            save_parts(tmp_path, 7, {**parts(), "opt": {"w": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("killed_at", range(6))
def test_a_save_that_is_killed_is_no_checkpoint(tmp_path, monkeypatch, killed_at):
    save_parts(tmp_path, 7, parts())
    save_parts(tmp_path, 8, parts(1.0))
    flip(tmp_path / "opt000008.pt")  # a damaged step is saved again as the run comes to it
    replace, done = os.replace, []

    def die(source, target):
        if len(done) == killed_at:
            os._exit(9)
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    child = os.fork()
    if child == 0:
        save_parts(tmp_path, 8, parts(2.0))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path) == 7
    sweep_temporary_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(names(7) + names(8))
    save_parts(tmp_path, 8, parts(2.0))
    assert newest_checkpoint(tmp_path) == 8


# -- reading ----------------------------------------------------------------------------------------------------------


class Burglar:
    """Pickles as a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    torch.save({"w": torch.zeros(1), "x": Burglar(tmp_path / "trace")}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt: cannot be read as a checkpoint of plain tensors") as caught:
        load_weights(tiny_model(), tmp_path / "evil.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_garbage_is_refused(tmp_path, content):
    path = tmp_path / "model000001.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model000001\.pt: cannot be read"):
        load_weights(tiny_model(), path)


def test_a_torn_file_is_refused(tmp_path, weights):
    path = tmp_path / "model000001.pt"
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"model000001\.pt: cannot be read"):
        load_file(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"gone\.pt: no such file"):
        load_weights(tiny_model(), tmp_path / "gone.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load_file(tmp_path)


@pytest.mark.parametrize("contents", [[1, 2], torch.zeros(3), {0: torch.zeros(1)}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"odd\.pt: expected a state dict, found "):
        load_weights(tiny_model(), tmp_path / "odd.pt")


# -- load_weights -----------------------------------------------------------------------------------------------------


def test_weights_from_a_dict_and_from_paths(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    for source in (weights, tmp_path / "w.pt", str(tmp_path / "w.pt")):
        model = tiny_model(2)
        assert not same(model.state_dict(), weights)
        load_weights(model, source)
        assert same(model.state_dict(), weights)


def test_spade_norm_extras_are_ignored(weights):
    extras = {
        f"input_blocks.{k}.0.spade_norm.mlp_{m}.weight": torch.zeros(3) for k in (1, 12) for m in ("gamma", "shared.0")
    }
    model = tiny_model(2)
    load_weights(model, {**weights, **extras})
    assert same(model.state_dict(), weights)


@pytest.mark.parametrize(
    "key", ["middle_block.0.spade_norm.mlp_gamma.weight", "input_blocks.1.spade_norm.w", "ema.out.2.bias"]
)
def test_other_extras_are_named(weights, key):
    with pytest.raises(InputError, match=f"unexpected key {key};"):
        load_weights(tiny_model(), {**weights, key: torch.zeros(1)})


def test_a_missing_key_is_named(tmp_path, weights):
    torch.save({k: v for k, v in weights.items() if k != "out.2.weight"}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt: missing key out\.2\.weight;"):
        load_weights(tiny_model(), tmp_path / "w.pt")


def test_many_missing_keys_are_counted(weights):
    fewer = {k: v for k, v in weights.items() if not k.startswith("out.")}
    with pytest.raises(InputError, match=r"state dict: missing key out\.0\.bias and 3 more"):
        load_weights(tiny_model(), fewer)


@pytest.mark.parametrize(("value", "found"), [(torch.zeros(3, 32, 1, 1), r"\(3, 32, 1, 1\)"), (1.5, "float")])
def test_a_wrong_shape_is_named(weights, value, found):
    with pytest.raises(InputError, match=rf"key out\.2\.weight has shape {found}, the network expects \(3, 32, 3, 3\)"):
        load_weights(tiny_model(), {**weights, "out.2.weight": value})


def test_refused_weights_leave_the_model_alone(weights):
    model = tiny_model(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError):
        load_weights(model, {**weights, "out.2.weight": torch.zeros(1)})
    assert same(model.state_dict(), before)


def test_half_precision_weights_keep_the_models_precision(weights):
    model = tiny_model(2)
    load_weights(model, {k: v.half() for k, v in weights.items()})
    assert all(v.dtype == torch.float32 for v in model.state_dict().values())
    assert same(model.state_dict(), {k: v.half().float() for k, v in weights.items()})


# -- legacy keys ------------------------------------------------------------------------------------------------------

LEGACY_SHAPES = {
    "mlp_shared.0.weight": (128, 3, 3, 3),
    "mlp_shared.0.bias": (128,),
    "mlp_gamma.weight": (None, 128, 3, 3),
    "mlp_gamma.bias": (None,),
    "mlp_beta.weight": (None, 128, 3, 3),
    "mlp_beta.bias": (None,),
}


@pytest.mark.parametrize("flags", [{}, {"resblock_updown": True, "channel_mult": "1,2", "num_res_blocks": 2}])
def test_legacy_keys_for_every_plain_block_of_the_encoder(flags):
    model = tiny_model(1, **flags)
    extended = with_legacy_keys(model.state_dict(), model)
    added = {k: v for k, v in extended.items() if k not in model.state_dict()}
    blocks = {
        f"input_blocks.{i}.{j}": block
        for i, stage in enumerate(model.input_blocks)
        for j, block in enumerate(stage)
        if isinstance(block, ResBlock)
    }
    assert len(blocks) == (5 if flags else 2)
    assert added.keys() == {f"{name}.spade_norm.{key}" for name in blocks for key in LEGACY_SHAPES}
    for name, block in blocks.items():
        channels = block.in_layers[0].num_channels
        for key, shape in LEGACY_SHAPES.items():
            value = added[f"{name}.spade_norm.{key}"]
            assert tuple(value.shape) == tuple(channels if n is None else n for n in shape) and not value.any()


def test_legacy_weights_load_back(tmp_path, weights):
    torch.save(with_legacy_keys(weights, tiny_model()), tmp_path / "w.pt")
    model = tiny_model(2)
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), weights)


def test_no_legacy_keys_where_the_encoder_has_spade_blocks():
    model = tiny_model(1, unet_model="spadeboth")
    assert any(isinstance(m, SPADEResBlock) for m in model.input_blocks.modules())
    assert with_legacy_keys(model.state_dict(), model).keys() == model.state_dict().keys()


def test_legacy_keys_leave_weights_and_the_global_stream_alone(weights):
    model, keys, before = tiny_model(), set(weights), torch.get_rng_state()
    with_legacy_keys(weights, model)
    assert set(weights) == keys
    assert torch.equal(before, torch.get_rng_state())


# -- all parts ---------------------------------------------------------------------------------------------------------


def test_weights_that_differ_from_their_manifest_are_refused(tmp_path, weights):
    save_parts(tmp_path, 4, {"ema_0.99_": weights, "model": weights, "opt": {}, "state": {}})
    path = tmp_path / "ema_0.99_000004.pt"
    model = tiny_model(2)
    load_weights(model, path)
    assert same(model.state_dict(), weights)
    flip(path)
    with pytest.raises(
        InputError, match=r"ema_0\.99_000004\.pt: it is damaged \(.*differs from its SHA-256\); restore it"
    ):
        load_weights(model, path)
    (tmp_path / "elsewhere").mkdir()
    path.rename(tmp_path / "elsewhere" / path.name)  # as files from elsewhere, it cannot be verified
    load_weights(model, tmp_path / "elsewhere" / path.name)


def test_load_parts_reads_everything_back(tmp_path):
    saved = {kind: {"w": torch.rand(2), "n": 3, "x": [1.5, None, float("inf")]} for kind in KINDS}
    save_parts(tmp_path, 4, saved)
    loaded, missing = load_parts(tmp_path, 4, RATES)
    assert missing == [] and loaded.keys() == saved.keys()
    for kind in KINDS:
        assert torch.equal(loaded[kind]["w"], saved[kind]["w"]) and loaded[kind]["x"] == saved[kind]["x"]


def test_every_part_is_verified_as_it_is_read(tmp_path):
    for kind in KINDS:
        save_parts(tmp_path, 4, parts())
        flip(tmp_path / file_name(kind, 4))
        with pytest.raises(InputError, match=rf"{kind}000004\.pt: it is damaged \(.*differs from its SHA-256\)"):
            load_parts(tmp_path, 4, RATES)
        if kind != "model":
            loaded, missing = load_parts(tmp_path, 4, RATES, partial=True)
            assert missing == [file_name(kind, 4)] and kind not in loaded
    save_parts(tmp_path, 4, parts(kinds=("model", "opt", "state", "ema_0.9999_")))
    assert (tmp_path / "ema_0.99_000004.pt").exists()  # left over from the save before
    with pytest.raises(InputError, match=r"lacks ema_0\.99_000004\.pt"):
        load_parts(tmp_path, 4, RATES)
    (tmp_path / manifest_name(4)).write_bytes(b"{}")
    with pytest.raises(InputError, match="the manifest cannot be read"):
        load_parts(tmp_path, 4, RATES)
    assert load_parts(tmp_path, 4, RATES, partial=True)[1] == []


def test_missing_parts_are_named_unless_asked_for(tmp_path):
    save_parts(tmp_path, 4, parts(kinds=("model", "state", "ema_0.9999_")))
    with pytest.raises(
        InputError, match=r"checkpoint 4 lacks opt000004\.pt, ema_0\.99_000004\.pt;.*--resume_partial True"
    ):
        load_parts(tmp_path, 4, RATES)
    loaded, missing = load_parts(tmp_path, 4, RATES, partial=True)
    assert missing == ["opt000004.pt", "ema_0.99_000004.pt"]
    assert loaded.keys() == {"model", "state", "ema_0.9999_"}


def test_a_missing_model_is_always_an_error(tmp_path):
    save_parts(tmp_path, 4, parts(kinds=("opt", "state")))
    with pytest.raises(InputError, match=r"model000004\.pt: no such file"):
        load_parts(tmp_path, 4, (), partial=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_without_values_takes_over_those_of_the_file(tmp_path, dtype):
    trained = tiny_model(seed=3)
    torch.save({key: value.to(dtype) for key, value in trained.state_dict().items()}, tmp_path / "w.pt")
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **TINY_FLAGS})[0]
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(before, torch.get_rng_state())
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    load_weights(trained, tmp_path / "w.pt")
    inputs = torch.rand(1, 3, 32, 32), torch.tensor([5]), torch.rand(1, 5, 32, 32)
    assert torch.equal(model.eval()(*inputs), trained.eval()(*inputs))


def test_a_model_without_values_takes_no_others(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    with torch.device("meta"):
        model = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **TINY_FLAGS})[0]
    with pytest.raises(InputError, match="missing key"):
        load_weights(model, tmp_path / "w.pt")
