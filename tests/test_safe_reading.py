"""Files that torch must never get to read: refused by a look at them, without taking the memory they ask for."""

import copy
import io
import os
import struct
import tracemalloc
import zipfile

import pytest
import torch
from conftest import tiny_network

from guided_diffusion.console import InputError
from guided_diffusion.training import safe_reading
from guided_diffusion.training.checkpoint import load_file

HUGE = 10**12
FORMATS = pytest.mark.parametrize("zipped", [True, False])


def save(contents, path, zipped=True):
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)


def rezip(path, change, compression=zipfile.ZIP_STORED, add=()):
    """Write a file of torch again with its pickle changed: `change` maps bytes to bytes."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [*entries, *add]:
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


def long(number):
    """The opcode LONG1 of a number."""
    return b"\x8a\x08" + struct.pack("<q", number)


@pytest.fixture
def refused(monkeypatch):
    """Function that asserts that a file is refused with a reason, by the look alone and within a few MB."""

    def check(path, reason, limit=4 * 2**20):
        monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch got to read it"))
        tracemalloc.start()
        try:
            with pytest.raises(
                InputError, match=rf"cannot be read as a checkpoint of plain tensors \({reason}"
            ) as caught:
                load_file(path)
            assert tracemalloc.get_traced_memory()[1] < limit
        finally:
            tracemalloc.stop()
            monkeypatch.undo()
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    return check


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# -- what must go through ---------------------------------------------------------------------------------------------


@FORMATS
def test_weights_and_optimizer_states_are_read(tmp_path, zipped):
    model, _ = tiny_network()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for contents in (model.state_dict(), copy.deepcopy(optimizer.state_dict())):
        save(contents, tmp_path / "a.pt", zipped)
        read = load_file(tmp_path / "a.pt")
        assert type(read) is type(contents) and read.keys() == contents.keys()
        for key, value in (contents["state"][0] if "state" in contents else contents).items():
            assert torch.equal((read["state"][0] if "state" in read else read)[key], value)


@FORMATS
def test_every_plain_value_is_read(tmp_path, zipped):
    storage = torch.arange(20.0)
    contents = {
        "numbers": [1, -300, 2**70, 1.5, float("inf"), None, True, False, "text"],
        "nested": ({"a": [(1, (2, []))]}, {1, 2}, torch.Size([3])),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "views": [storage[3:7], storage[::2], storage.view(4, 5).t(), storage[:0], torch.tensor(3)],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "dtypes": [
            torch.zeros(2, dtype=getattr(torch, name))
            for name in (
                "float64",
                "float16",
                "bfloat16",
                "int64",
                "int32",
                "int16",
                "int8",
                "uint8",
                "bool",
                "complex64",
            )
        ],
    }
    save(contents, tmp_path / "a.pt", zipped)
    read = load_file(tmp_path / "a.pt")
    for key in ("numbers", "nested", "dtype", "device"):
        assert read[key] == contents[key]
    for key in ("views", "dtypes"):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(read[key], contents[key], strict=True))
    assert torch.equal(read["parameter"], contents["parameter"]) and isinstance(read["parameter"], torch.nn.Parameter)


def test_a_container_that_is_named_twice_is_read(tmp_path):
    shared = [1, 2]
    save({"a": shared, "b": (shared, shared)}, tmp_path / "a.pt")
    assert load_file(tmp_path / "a.pt") == {"a": [1, 2], "b": ([1, 2], [1, 2])}


# -- calls ------------------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(os.system, "echo"), "posix.system"),
        (Call(bytearray, HUGE), "(builtins|__builtin__).bytearray"),
        (Call(torch.UntypedStorage, HUGE), "torch.storage.UntypedStorage"),
        (Call(torch.Tensor, HUGE), "torch.Tensor"),
        (Call(torch._utils._rebuild_tensor, HUGE), "torch._utils._rebuild_tensor"),
        (Call(eval, "1"), "(builtins|__builtin__).eval"),
    ],
)
def test_functions_that_run_code_or_take_memory(tmp_path, refused, call, name, zipped):
    save({"w": torch.zeros(2), "x": call}, tmp_path / "a.pt", zipped)
    refused(tmp_path / "a.pt", rf"it asks for {name}, ")


def test_storage_classes_and_types_are_names_and_cannot_be_called(tmp_path, refused):
    for name in (b"FloatStorage", b"float32"):
        save({}, tmp_path / "a.pt")
        rezip(tmp_path / "a.pt", lambda _, name=name: b"\x80\x02ctorch\n" + name + b"\n" + long(HUGE) + b"\x85R.")
        refused(tmp_path / "a.pt", rf"it calls torch\.{name.decode()}")


def test_opcodes_of_other_pickle_protocols(tmp_path, refused):
    torch.save({"w": 1}, tmp_path / "a.pt", pickle_protocol=4)
    refused(tmp_path / "a.pt", "its pickle uses FRAME")


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_a_compressed_entry(tmp_path, refused):
    save({"w": torch.zeros(1)}, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt", bytes, zipfile.ZIP_DEFLATED, [("a/data/1", bytes(30 * 2**20))])
    assert (tmp_path / "a.pt").stat().st_size < 2**20
    refused(tmp_path / "a.pt", "its entry .* is compressed")


@FORMATS
@pytest.mark.parametrize("count", [1001, HUGE, 2**62, -1])
def test_a_storage_that_is_said_to_be_larger_than_it_is(tmp_path, refused, zipped, count):
    path = tmp_path / "a.pt"
    save({"w": torch.zeros(1000)[:1]}, path, zipped)
    if zipped:
        rezip(path, lambda pickle: pickle.replace(b"M\xe8\x03", long(count)))
    else:
        path.write_bytes(path.read_bytes().replace(b"M\xe8\x03", long(count)))
    refused(path, "it has a storage of an unknown kind" if count < 0 else "storage .* is said to have [0-9,]+ bytes, ")


@FORMATS
@pytest.mark.parametrize("count", [1001, HUGE, -1])
def test_a_tensor_larger_than_its_storage(tmp_path, refused, zipped, count):
    path = tmp_path / "a.pt"
    save({"w": torch.zeros(1000)[:500]}, path, zipped)
    if zipped:
        rezip(path, lambda pickle: pickle.replace(b"M\xf4\x01", long(count)))
    else:
        path.write_bytes(path.read_bytes().replace(b"M\xf4\x01", long(count)))
    refused(
        path,
        "it has a tensor whose size" if count < 0 else r"it has a tensor of [0-9,]+ elements in a storage of 1,000",
    )


def test_a_tensor_of_one_number_repeated_or_out_of_bounds(tmp_path, refused):
    for wrong in (torch.zeros(1).expand(500), torch.zeros(501)[1:]):
        save({"w": wrong}, tmp_path / "a.pt")
        rezip(tmp_path / "a.pt", lambda pickle: pickle.replace(b"QK\x01M", b"QK\x02M"))
        refused(tmp_path / "a.pt", "it has a tensor of 500 elements in a storage of")


def test_a_directory_that_counts_bytes_twice(tmp_path, refused):
    """Entries that share their bytes: a small file would take any amount of memory."""
    path = tmp_path / "a.pt"
    save({"w": torch.zeros(1000)}, path)
    rezip(path, bytes)
    with zipfile.ZipFile(path) as archive:
        start, entries = archive.start_dir, archive.infolist()
    raw = path.read_bytes()
    directory = raw[start:-22]
    entry = next(part for part in directory.split(b"PK\1\2") if b"a/data/0" in part)
    copies = b"".join(b"PK\1\2" + entry.replace(b"a/data/0", b"a/data/%c" % k) for k in range(65, 85))
    count = len(entries) + 20
    end = raw[-22:-14] + struct.pack("<HHII", count, count, len(directory + copies), start) + b"\0\0"
    path.write_bytes(raw[:start] + directory + copies + end)
    assert len(zipfile.ZipFile(path).infolist()) == count
    refused(path, "its entries are larger than the file")


def test_a_file_with_two_directories(tmp_path, refused):
    save({"w": torch.zeros(1)}, tmp_path / "a.pt")
    raw = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "b.pt").write_bytes(raw + raw)
    refused(tmp_path / "b.pt", "its directory is out of place")
    (tmp_path / "c.pt").write_bytes(raw + b"more")
    refused(tmp_path / "c.pt", "its end is missing")


def test_two_entries_of_one_name(tmp_path, refused):
    save({"w": torch.zeros(1)}, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt", bytes, add=[("a/DATA.pkl", b"\x80\x02N.")])
    refused(tmp_path / "a.pt", "its entries' names are ambiguous")


# -- shapes of the pickle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pickle",
    [
        b"]" * 20_000 + b"a" * 19_999 + b".",  # lists
        b")" + b"\x85" * 20_000 + b".",  # tuples, whose hash has no bound on its recursion
        b"(" * 20_000 + b"t" * 20_000 + b".",
    ],
)
def test_deeply_nested_containers(tmp_path, refused, pickle):
    save({}, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt", lambda _: b"\x80\x02" + pickle)
    refused(tmp_path / "a.pt", "more than 50 containers in one another", limit=2**24)


@pytest.mark.parametrize("pickle", [b"]q\x00h\x00a.", b"]q\x00]q\x01ah\x01]a."])
def test_nesting_cannot_be_hidden(tmp_path, refused, pickle):
    """A container that is put into another one before it has its own contents, or into itself."""
    save({}, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt", lambda _: b"\x80\x02" + pickle)
    refused(tmp_path / "a.pt", "a container grows after its use")


def test_too_many_things(tmp_path, refused, monkeypatch):
    save({}, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt", lambda _: b"\x80\x02](" + b"}" * 2000 + b"e.")
    assert len(load_file(tmp_path / "a.pt")) == 2000
    monkeypatch.setattr(safe_reading, "MAX_OPCODES", 1000)
    with pytest.raises(InputError, match="it describes more than 1,000 things"):
        load_file(tmp_path / "a.pt")
    monkeypatch.setattr(safe_reading, "MAX_PICKLE", 1000)
    with pytest.raises(InputError, match=r"no data\.pkl of at most 1,000 bytes"):
        load_file(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "pickle", [b"R.", b"a.", b"(", b".", b"h\x07.", b"Q.", b"\x85.", b"X\xff\xff\xff\xffx.", b"K", b""]
)
def test_broken_pickles(tmp_path, pickle):
    save({}, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt", lambda _: b"\x80\x02" + pickle)
    (tmp_path / "b.pt").write_bytes(b"\x80\x02" + pickle)
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match=rf"{name}: cannot be read as a checkpoint") as caught:
            load_file(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_an_old_file_that_is_cut_short_anywhere(tmp_path):
    buffer = io.BytesIO()
    save({"w": torch.zeros(4), "v": torch.ones(3)}, buffer, zipped=False)
    path = tmp_path / "a.pt"
    path.write_bytes(buffer.getvalue())
    assert load_file(path)["v"].tolist() == [1, 1, 1]
    for length in range(len(buffer.getvalue())):
        path.write_bytes(buffer.getvalue()[:length])
        with pytest.raises(InputError, match="cannot be read"):
            load_file(path)
