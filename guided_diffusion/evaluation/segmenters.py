"""Networks that a user brings as a file: segmenters (picture -> class ids) and feature extractors (picture -> vector).

Two formats are read: TorchScript (torch.jit.save) and exported programs (torch.export.save). Neither may bring Python
code: pickles that call functions are refused, and so is what an exported program's loader would otherwise evaluate. A
network is still a program of torch operations that its author chose, so load files of people you trust.
"""

import ast
import inspect
import io
import json
import re
import warnings

import torch

from ..console import InputError

# torch.export.load (2.15) unpickles sample inputs and some weights without restriction, evaluates size expressions, and
# looks functions up by their dotted name. Only what ordinary networks need is let through.
_RECORDS = re.compile(
    r"(data/(weights|constants|sample_inputs)/|models/model\.json$|archive_(format|version)$|version$|byteorder$|\.data/|extra/)"
)
_OPERATIONS = re.compile(
    r"torch\.ops\.(aten|prims|torchvision|quantized_decomposed|higher_order)(\.(?!from_file|save)(?!\w*__)\w+){1,2}"
    r"|torch\.ops\.aten\.__i?(and|or|xor|lshift|rshift)__\.\w+|torch\.sym_\w+|math\.[a-z]\w*"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
)
_SIZE_FUNCTIONS = {
    "Symbol",
    "Integer",
    "Rational",
    "Add",
    "Mul",
    "Pow",
    "Max",
    "Min",
    "Abs",
    "FloorDiv",
    "CeilDiv",
    "CleanDiv",
    "ModularIndexing",
    "Mod",
    "PythonMod",
    "FloorToInt",
    "CeilToInt",
    "IntTrueDiv",
    "Identity",
    "PowByNatural",
    "Equality",
    "Unequality",
    "StrictLessThan",
    "LessThan",
    "StrictGreaterThan",
    "GreaterThan",
    "And",
    "Or",
    "Not",
    "Where",
}
_SIZE_SYNTAX = (
    ast.Expression,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.keyword,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
)


class Network:
    """A network from a file: call it on pictures (N, 3, H, W) in [-1, 1]; gradients are off.

    `batch` is the batch size that an exported program was fixed to, or None: it is then fed in such groups.

    :raises InputError: where the network fails on pictures of this size.
    """

    def __init__(self, run, name, batch=None, device="cpu"):
        self.run, self.name, self.batch, self.device = run, name, batch, device

    def __call__(self, images):
        groups = images.to(self.device).split(self.batch or max(1, len(images)))
        try:
            with torch.no_grad():
                return torch.cat([self._whole_group(group) for group in groups])
        except Exception as error:  # whatever a foreign network raises, most often about the size
            size = "x".join(map(str, images.shape[2:]))
            raise InputError(
                f"{self.name} fails on {size} pictures ({_reason(error)}); give a network of that size"
            ) from None

    def _whole_group(self, group):
        missing = (self.batch or len(group)) - len(group)
        return self.run(torch.cat([group, group[:1].expand(missing, -1, -1, -1)]))[: len(group)]


def load_network(path, flag, device="cpu"):
    """Load a TorchScript file or an exported program as a `Network`.

    :param flag: the flag that named the file, for messages.
    :raises InputError: a file that is missing, damaged, of another kind, or that brings Python code.
    """
    name = f"--{flag} {path}"
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as error:
        raise InputError(
            f"{name}: cannot be read ({error.strerror}); give a TorchScript file or exported program"
        ) from None
    try:
        # Both loaders read through this very reader: what is checked is what they will see.
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        records = reader.get_all_records()
    except Exception:  # no archive, or a truncated one
        records = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remark that TorchScript is on its way out
            if "models/model.json" in records:
                _check_program(reader, records)
                return _program(data, name, device)
            if any(record.startswith("code/") for record in records):
                return Network(torch.jit.load(io.BytesIO(data), map_location=device).eval(), name, None, device)
    except _Refused as error:
        raise InputError(
            f"{name}: refused, because it brings {error}; export a plain network with torch.export.save"
        ) from None
    except Exception as error:  # torch raises many kinds for damaged files
        raise InputError(f"{name}: damaged ({_reason(error)}); write it again") from None
    raise InputError(
        f"{name}: neither TorchScript nor an exported program; write one with torch.jit.save or torch.export.save"
    )


def _reason(error):
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:160]


def _program(data, name, device):
    program = torch.export.load(io.BytesIO(data))
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    inputs = set(program.graph_signature.user_inputs)
    shapes = [
        node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs
    ]
    batch = shapes[0][0] if isinstance(shapes[0][0], int) else None  # else it is a symbol: any batch
    # Guards are Python source in the file: they are left out, and the batch is looked after here instead.
    unguarded = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    return Network(program.module(**unguarded), name, batch, device)


# -- what an exported program may hold --------------------------------------------------------------------------------


class _Refused(Exception):
    """Says what a file brings that might run code."""


def _check_program(reader, records):
    """Raise `_Refused` for whatever torch.export.load would unpickle freely, evaluate, import, or call by name."""
    for record in records:
        if not _RECORDS.match(record):
            raise _Refused(f"an unknown part {record}")
        in_tensors = record.startswith(("data/weights/", "data/constants/"))
        if in_tensors and record.endswith(".json"):
            for entry in json.loads(reader.get_record(record))["config"].values():
                if entry["use_pickle"] or not entry["path_name"].startswith(("weight_", "tensor_")):
                    raise _Refused("pickled objects among its weights")
        elif record.endswith(".pt"):
            try:
                torch.load(io.BytesIO(reader.get_record(record)), weights_only=True)
            except Exception:  # torch.export.load would now unpickle it without restriction
                raise _Refused(f"a pickle of more than tensors in {record}") from None
    _check_graph(json.loads(reader.get_record("models/model.json")))


def _check_graph(part):
    """Check a piece of the program's JSON: operations, names, size expressions and containers."""
    if isinstance(part, list):
        for entry in part:
            _check_graph(entry)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in ("target", "as_operator") and isinstance(value, str) and not _OPERATIONS.fullmatch(value):
                raise _Refused(f"a call of {value[:60]!r}")
            if key == "name" and isinstance(value, str) and not re.fullmatch(r"[\w.]*", value):
                raise _Refused(f"a name {value[:60]!r}")
            if key in ("in_spec", "out_spec") and set(re.findall(r'"type": "([^"]*)"', value)) - _CONTAINERS:
                raise _Refused("unusual containers")
            if key == "expr_str":
                _check_size(value)
            if key == "range_constraints":
                for expression in value:
                    _check_size(expression)
            if key != "metadata":  # source lines and module names, for people
                _check_graph(value)


_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict"}


def _check_size(expression):
    """Check that a size expression, which sympy evaluates, is arithmetic on symbols."""
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except (SyntaxError, ValueError):
        nodes = [None]
    for node in nodes:
        calls = isinstance(node, ast.Call)
        if (
            not isinstance(node, _SIZE_SYNTAX)
            or (calls and getattr(node.func, "id", "") not in _SIZE_FUNCTIONS)
            or (isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isalnum())
        ):
            raise _Refused(f"the expression {expression[:60]!r}")


# -- uses -------------------------------------------------------------------------------------------------------------


def segment(network, images, num_classes, flag="segmenter"):
    """Return the class of every pixel, (N, 1, H, W) int64.

    :param network: a callable; gives scores (N, K, H, W), K = num_classes, or ids (N, H, W) or (N, 1, H, W).
    :param images: (N, 3, H, W) in [-1, 1].
    :param flag: the flag that brought the network, for messages.
    :raises InputError: an answer of another shape, or ids outside 0..num_classes-1.
    """
    n, _, height, width = images.shape
    with torch.no_grad():
        out = network(images)
    channels = out.shape[1] if torch.is_tensor(out) and out.dim() == 4 else 1
    if not torch.is_tensor(out) or out.numel() != n * channels * height * width or out.shape[-2:] != (height, width):
        found = tuple(out.shape) if torch.is_tensor(out) else type(out).__name__
        raise InputError(
            f"--{flag} gave {found} for pictures ({n}, 3, {height}, {width}); it must give scores (N, K, H, W)"
            " or ids (N, H, W) of the same height and width"
        )
    if channels not in (1, num_classes):
        raise InputError(
            f"--{flag} gave scores of {channels} classes, but --num_classes is {num_classes};"
            " give a segmenter of the same label space"
        )
    ids = out.argmax(1, keepdim=True) if channels > 1 else out.reshape(n, 1, height, width).long()
    if ids.min() < 0 or ids.max() >= num_classes:
        raise InputError(
            f"--{flag} gave class ids {int(ids.min())}..{int(ids.max())}, but --num_classes is {num_classes};"
            " give a segmenter of the same label space"
        )
    return ids


def segmenter_of(network, num_classes):
    """Return `segment` as a function of the pictures alone, as `Metrics` takes it."""
    return lambda images: segment(network, images, num_classes)


def features_of(network):
    """Return a function from pictures (N, 3, H, W) in [-1, 1] to feature vectors (N, D) float32.

    :param network: a callable; gives (N, D), or maps (N, D, H, W), which are averaged over pixels.
    """

    def features(images):
        with torch.no_grad():
            out = network(images)
        if not torch.is_tensor(out) or out.dim() not in (2, 4) or len(out) != len(images):
            found = tuple(out.shape) if torch.is_tensor(out) else type(out).__name__
            raise InputError(f"--features gave {found} for {len(images)} pictures; it must give (N, D) or (N, D, H, W)")
        return out.float().mean((2, 3)) if out.dim() == 4 else out.float()

    return features


def disagreement(network, images, label, num_classes):
    """Return the share of pixels, (N,) in [0, 1], that a segmenter labels otherwise than the label map.

    It is the goal-driven distance of noise selection: 0 where the receiver's task is served perfectly.

    :param images: (N, 3, H, W) in [-1, 1].
    :param label: ids (N, 1, H, W), or (1, 1, H, W) for all.
    """
    ids = segment(network, images, num_classes)
    return (ids != label.to(ids.device)).float().mean((1, 2, 3))
