"""--role receive: the transmitter's pictures from messages and checkpoint alone, bad messages, --verify."""

import shutil
import subprocess

import pytest
from test_run import assert_equal, column, pixels, script, stamps, table

from guided_diffusion.console import InputError
from guided_diffusion.link.message import SESSION


@pytest.mark.parametrize(
    "flags",
    [
        {"use_ddim": True, "eta": 0.3, "s": 1.7, "edge_levels": 2, "label_scale": 2},
        {"sampler": "dpm++", "noise_index": "best", "candidates": 6, "feedback_steps": 1},
        {"selection": "both", "candidates": 2, "step_candidates": 8},
        {"timestep_respacing": 6, "stop_tol": 10, "stop_patience": 1},
        {"precision": "bf16", "batch_size": 3},
    ],
)
def test_receive_makes_the_transmitters_pictures(sample, receive, tmp_path, flags):
    sample("sent", role="transmit", num_samples=2, **flags)
    receive()
    sent, received = table(tmp_path / "sent"), table(tmp_path / "received")
    for name in ("name", "picture_sha256", "steps", "bank_index", "bits_total", "bits_indices", "bpp"):
        assert [row[name] for row in received] == [row[name] for row in sent], name
    local, made = pixels(tmp_path / "sent" / "local"), pixels(tmp_path / "received" / "samples")
    assert local.keys() == made.keys() and all((local[name] == made[name]).all() for name in local)
    if "label_scale" not in flags:
        labels, decoded = (pixels(tmp_path / folder / "labels") for folder in ("sent", "received"))
        assert all((labels[name] == decoded[name]).all() for name in labels)
    assert (tmp_path / "received" / "panel.png").exists()


def test_receive_goes_on_in_shares_and_follows_its_messages(sample, receive, tmp_path):
    sample("sent", role="transmit")
    receive(folder="alone")
    receive(share=(1, 2))
    assert not (tmp_path / "received" / "results.csv").exists()
    receive(share=(0, 2))
    assert_equal(tmp_path / "received", tmp_path / "alone")
    before = stamps(tmp_path / "received")
    sample("other", role="transmit", noise_index=7)
    name = sorted((tmp_path / "other" / "messages").glob("toytown*"))[1].name
    shutil.copy(tmp_path / "other" / "messages" / name, tmp_path / "sent" / "messages" / name)
    receive()
    after = stamps(tmp_path / "received")
    assert [k for k in sorted(before) if before[k] != after[k]] == [name.replace(".dgo", ".png")]
    assert column(tmp_path / "received", "bank_index")[1] == "7"
    with pytest.raises(InputError, match="seed"):
        receive(seed=5)


def test_receive_goes_on_past_bad_messages_and_verifies_the_others(sample, receive, tmp_path):
    sample("sent", role="transmit")
    first, bad, last = sorted((tmp_path / "sent" / "messages").glob("toytown*"))
    whole, verify = bad.read_bytes(), {"verify": tmp_path / "sent"}
    sample("other", role="transmit", s=2)
    for data in (b"", whole[:40], whole + b"x", (tmp_path / "other" / "messages" / bad.name).read_bytes()):
        bad.write_bytes(data)
        *_, equal, failure = receive(**verify)
        assert equal == "2 of 3 equal" and failure.startswith(f"{bad}: ") and failure.count(str(bad)) == 1
    assert "the message is of session" in failure and "session.dgo is" in failure
    assert {*pixels(tmp_path / "received" / "samples")} == {f"{path.stem}.png" for path in (first, last)}
    assert [row["picture_sha256"] != "" for row in table(tmp_path / "received")] == [True, False, True]
    for index in (1, 0):
        *_, failure = receive(folder="shared", share=(index, 2))
    assert failure.startswith(f"{bad}: ")
    assert_equal(tmp_path / "shared", tmp_path / "received")
    before = stamps(tmp_path / "received")
    bad.write_bytes(whole)
    last.unlink()
    results = tmp_path / "sent" / "results.csv"
    results.write_text(results.read_text().replace(column(results.parent, "picture_sha256")[0], "0"))
    *_, equal, differs, missing = receive(**verify)
    assert (equal, missing) == ("1 of 3 equal", f"{last.stem}: not received")
    assert differs == f"{first.stem}: another picture than in {tmp_path / 'sent'}"
    assert before.items() < stamps(tmp_path / "received").items()
    assert "0 of 2 equal" in receive(folder="one", num_samples=1, verify=tmp_path / "other")
    bad.write_bytes(b"")  # whole before
    results.write_text("\n".join(results.read_text().splitlines()[::2]))
    said = receive(**verify)
    assert "0 of 1 equal" in said
    assert any(line.endswith(f": not in {tmp_path / 'sent'}") for line in said)
    assert not {path.name for path in (tmp_path / "received").rglob(f"{bad.stem}.png")}
    results.write_text(results.read_text().splitlines()[0])
    with pytest.raises(InputError, match=r"--verify .*sent: no results.csv"):
        receive(**verify)
    with pytest.raises(InputError, match=r"--verify .*none: no results.csv"):
        receive(verify=tmp_path / "none")


def test_receive_refuses_other_weights_and_damaged_sessions(sample, receive, trained, tmp_path):
    sample("sent", role="transmit", num_samples=1)
    with pytest.raises(InputError, match=r"the message was made with fingerprint .*--model_path"):
        receive(model_path=trained / "model000004.pt")
    shutil.copy(trained / "ema_0.9_000004.pt", tmp_path)
    receive(folder="moved", model_path=tmp_path / "ema_0.9_000004.pt")  # the contents count, not where it is
    session = tmp_path / "sent" / "messages" / SESSION
    session.write_bytes(session.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{session}: damaged.*; copy it from the transmitter's messages"):
        receive()
    session.unlink()
    with pytest.raises(InputError, match=f"{session}: No such file.*; copy it from the transmitter's messages"):
        receive()
    assert not (tmp_path / "received").exists()
    with pytest.raises(InputError, match=r"--messages .*none: no \.dgo files there"):
        receive("none")


@pytest.mark.slow
def test_receive_in_another_process_with_messages_and_checkpoint_alone(scenes, trained, tmp_path):
    run = {"check": True, "stderr": subprocess.PIPE, "text": True}
    flags = {"data_dir": scenes, "model_path": trained, "num_samples": 2, "timestep_respacing": 3, "num_workers": 0}
    subprocess.run(script(role="transmit", results_path=tmp_path / "sent", **flags), cwd=tmp_path, **run)
    far = tmp_path / "far"
    shutil.copytree(tmp_path / "sent" / "messages", far / "messages")
    (far / "checkpoint").mkdir()
    for name in ("ema_0.9_000004.pt", "config.json"):
        shutil.copy(trained / name, far / "checkpoint")
    flags = {"role": "receive", "messages": "messages", "model_path": "checkpoint", "results_path": "out"}
    logged = subprocess.run(script(**flags), cwd=far, **run).stderr
    assert "receiving 2 pictures" in logged
    digests = column(tmp_path / "sent", "picture_sha256")
    assert column(far / "out", "picture_sha256") == digests and len(digests) == 2 and all(digests)
