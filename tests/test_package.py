"""The package as a whole: what it exports, what importing it costs, and which way imports point."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import guided_diffusion
from guided_diffusion import console as errors

ROOT = Path(guided_diffusion.__file__).parent

# The house, from the roof down. A module may import from lower rows and from its own folder.
ORDER = [
    {"benchmark"},
    {"benchmarks"},
    {"receive"},
    {"regenerate"},
    {"build_link", "dry_run"},
    {"build", "measures"},
    {"prepare"},
    {"report", "placement"},
    {"training"},
    {"link"},
    {"diffusion"},
    {"data"},
    {"baselines", "segmenters"},
    {"metrics", "panels", "results"},
    {"idle_flags"},
    {"config"},
    {"flags"},
    {"presets"},
    {"digests", "files", "random_streams", "scripts", "startup"},
    {"errors"},
]
PUBLIC = [
    "model_and_diffusion_defaults",
    "create_model_and_diffusion",
    "load_weights",
    "NoiseBank",
    "load_data",
    "encode_semantics",
    "sample",
    "EarlyStop",
]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=120)


# -- exports and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_exported(name):
    assert callable(getattr(guided_diffusion, name))
    assert name in guided_diffusion.__all__ and name in dir(guided_diffusion)


def test_everything_exported_exists():
    for name in guided_diffusion.__all__:
        assert getattr(guided_diffusion, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'NoiseBanc'"):
        _ = guided_diffusion.NoiseBanc


def test_input_error_is_a_value_error_and_the_one_exported():
    assert issubclass(errors.InputError, ValueError)
    assert guided_diffusion.InputError is errors.InputError


@pytest.mark.parametrize("module", ["guided_diffusion", "guided_diffusion.config"])
def test_importing_loads_no_torch(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# Seconds each, and not needed before the first reverse step.
SLOW = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "sympy",
    "torchvision",
    "torchmetrics",
    "tensorboard",
    "matplotlib",
    "sionna",
    "mpi4py",
)


def test_importing_what_sampling_is_built_of_loads_nothing_slow_but_torch():
    code = f"import sys; from guided_diffusion import build_link; from guided_diffusion.evaluation import run; print([m for m in {SLOW} if m in sys.modules])"
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("name", ["digests", "prepare", "startup", "training.checkpoint_choice", "training.ranks"])
def test_what_scripts_use_before_torch_loads_none(name):
    done = run_python(f"import sys, guided_diffusion.{name}; print('torch' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")


# -- the house --------------------------------------------------------------------------------------------------------


def modules():
    """Every module of the package: dotted name below the package -> syntax tree."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
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


def test_the_import_finder_sees_imports():
    assert {"errors", "presets", "flags"} <= imported("config")
    assert {"data.semantics", "link.channel", "random_streams"} <= imported("training.samples")
    assert {"data.pictures", "data.pairing"} <= imported("data.image_datasets")


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_imports_point_downwards(name):
    folder = name.split(".")[0]
    upwards = [other for other in imported(name) if row(other) <= row(name) and other.split(".")[0] != folder]
    assert not upwards, f"{name} imports {upwards}"


def test_imports_make_no_circle():
    list(graphlib.TopologicalSorter({name: imported(name) for name in MODULES}).static_order())


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


def test_only_distributed_names_cuda():
    trees = MODULES | {path.name: ast.parse(path.read_text()) for path in ROOT.parent.glob("*.py")}
    naming = {name for name, tree in trees.items() if names_cuda(tree)}
    assert naming == {"training.distributed"}
