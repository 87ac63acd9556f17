"""The package as a whole: what it exports, what importing it costs, which way imports point, how large it is."""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import guided_diffusion

ROOT = Path(guided_diffusion.__file__).parent

# The house, from the roof down. A module may import from lower rows and from its own folder.
ORDER = [
    {"image_train", "image_sample"},
    {"dry_run"},
    {"build_link"},
    {"build"},
    {"evaluation"},
    {"training"},
    {"link"},
    {"diffusion"},
    {"data"},
    {"config"},
    {"flags", "files"},
    {"console", "random_streams"},
]
PUBLIC = ["model_and_diffusion_defaults", "create_model_and_diffusion", "load_weights", "NoiseBank", "load_data"]
PUBLIC += ["encode_semantics", "sample", "EarlyStop", "load_checkpoint", "Transmitter", "Receiver", "Message"]
PUBLIC += ["AnalogChannel", "DigitalChannel", "metrics"]
MOST_LINES, MOST_FUNCTION_LINES, MOST_IN_ALL = 400, 60, 9500

# Seconds each, and not needed before the first reverse step.
SLOW = ("torch._dynamo", "sympy", "torchvision", "torchmetrics", "tensorboard", "matplotlib", "sionna", "mpi4py")


PAGES = {page: (ROOT.parent / page).read_text() for page in ("README.md", "docs/python.md")}
BLOCKS = [(page, code) for page, text in PAGES.items() for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=120)


# -- exports and imports ----------------------------------------------------------------------------------------------


def test_exports_exist_and_unknown_names_are_attribute_errors():
    assert {*PUBLIC} <= {*guided_diffusion.__all__} <= {*dir(guided_diffusion)}
    for name in guided_diffusion.__all__:
        assert getattr(guided_diffusion, name).__name__.rpartition(".")[2] == name
    assert issubclass(guided_diffusion.InputError, ValueError)
    with pytest.raises(AttributeError, match="has no attribute 'NoiseBanc'"):
        _ = guided_diffusion.NoiseBanc


@pytest.mark.parametrize("module", ["guided_diffusion", "guided_diffusion.config", "image_train", "image_sample"])
def test_help_loads_no_torch(module):
    done = run_python(f"import sys, {module}; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_sampling_imports_nothing_slow_but_torch():
    loads = "import sys, guided_diffusion.build, guided_diffusion.evaluation.run as run; "
    done = run_python(loads + f"print(*({{*{SLOW}}} & {{*sys.modules}}))")
    assert (done.stdout, done.stderr) == ("\n", "")


@pytest.mark.parametrize("page, code", BLOCKS, ids=[f"{page}-{k}" for k, (page, _) in enumerate(BLOCKS)])
def test_python_of_the_docs_runs(page, code, trained, scenes, tmp_path, monkeypatch):
    """As it stands, in a folder with checkpoint and data; networks from flags are tiny."""
    tiny = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1"}
    flags = guided_diffusion.model_and_diffusion_defaults() | tiny
    monkeypatch.setattr(guided_diffusion, "model_and_diffusion_defaults", lambda: flags)
    monkeypatch.chdir(tmp_path)
    for name, folder in {"checkpoints/toy": trained, "datasets/toy_scenes": scenes}.items():
        shutil.copytree(folder, name)
    exec(compile(code, page, "exec"), {})
    assert len(code.splitlines()) <= 25


# -- the house --------------------------------------------------------------------------------------------------------


def modules():
    """Every module of the package, and the two scripts: dotted name below the package -> syntax tree."""
    found = {}
    for path in sorted([*ROOT.rglob("*.py"), *ROOT.parent.glob("image_*.py")]):
        parts = path.relative_to(ROOT if ROOT in path.parents else ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imported(name):
    """Modules of the package that module `name` imports, anywhere in its code."""
    is_package = any(other.startswith(name + ".") for other in MODULES) or not name
    here = name.split(".") if name else []
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = ["guided_diffusion", *here[: len(here) - node.level + is_package], *base]
            # What is imported may itself be a module.
            found |= {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
    inside = {
        full.removeprefix("guided_diffusion").lstrip(".") for full in found if full.startswith("guided_diffusion")
    }
    return {other for other in inside if other in MODULES and other != name} - {""}


def row(name):
    """Which row of the house a module lives in."""
    rows = [k for k, names in enumerate(ORDER) if name.split(".")[0] in names]
    assert rows, f"{name} has no place in the house: add it to ORDER"
    return rows[0]


def test_import_finder_sees_imports():
    assert {"console", "files", "flags"} <= imported("config")
    assert {"data.semantics", "link.channel", "random_streams"} <= imported("training.inputs")
    assert {"data.pictures", "data.pairing"} <= imported("data.datasets")
    assert {"build", "config", "console"} <= imported("image_train")


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_imports_point_downwards(name):
    folder = name.split(".")[0]
    upwards = [other for other in imported(name) if row(other) <= row(name) and other.split(".")[0] != folder]
    assert not upwards, f"{name} imports {upwards}"


def test_imports_make_no_circle():
    list(graphlib.TopologicalSorter({name: imported(name) for name in MODULES}).static_order())


def test_files_and_functions_stay_small():
    paths = [*ROOT.rglob("*.py"), *ROOT.parent.glob("image_*.py")]
    lengths = {str(path): len(path.read_text().splitlines()) for path in paths}
    assert not {name: n for name, n in lengths.items() if n > MOST_LINES}
    assert sum(lengths.values()) <= MOST_IN_ALL
    functions = [
        (name, node.name, node.end_lineno - node.lineno + 1)
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert not [found for found in functions if found[2] > MOST_FUNCTION_LINES]


def names_cuda(tree):
    """Lines on which code names the accelerator: an attribute or name cuda, or a text that starts with it."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "cuda")
        or (isinstance(node, ast.Name) and node.id == "cuda")
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda"))
        or (isinstance(node, ast.ImportFrom | ast.Import) and any("cuda" in alias.name for alias in node.names))
    ]


def test_only_devices_names_cuda():
    assert {name for name, tree in MODULES.items() if names_cuda(tree)} == {"training.devices"}


@pytest.mark.parametrize("script, most", [("image_train", 43), ("image_sample", 47)])
def test_run_imports_few_modules(script, most, trained, scenes, tmp_path):
    """What a reader crosses: modules of the package that a small run of a script has loaded at its end."""
    from conftest import TINY, TRAIN, as_arguments

    own = {**TRAIN, "checkpoint_dir": tmp_path / "run", "total_steps": 1, "preview_items": 1}
    if script == "image_sample":
        own = {"model_path": trained, "results_path": tmp_path / "results", "timestep_respacing": 2, "num_samples": 1}
    words = as_arguments({"preset": "toy", "data_dir": scenes, **TINY, **own})
    code = f"import sys; sys.argv = {['', *words]}; import {script}; {script}.main()\n"
    code += "print(sum(name.startswith('guided_diffusion.') for name in sys.modules))"
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-1000:]
    assert int(done.stdout.splitlines()[-1]) <= most
