"""What torch does not promise is used in one module only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleGPipe, ScheduleInterleavedZeroBubble
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).parents[2]
ALLOWED = ROOT / "megatron_ext" / "torch_private.py"
OWNERS = (
    torch, torch._C, dist, torch.Tensor, DTensor, nn.Module, torch.UntypedStorage, torch.optim.Optimizer,
    torch.autograd.Function, DeviceMesh, dist.ProcessGroup, FSDPModule, FSDPState, FSDPParamGroup, PipelineStage,
    ScheduleGPipe, ScheduleInterleavedZeroBubble, FileSystem, DefaultSavePlanner, dcp.FileSystemReader,
    dcp.FileSystemWriter,
)  # fmt: skip


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names() -> set[str]:
    """Attributes and methods of torch's modules and classes, and what the classes only annotate."""
    annotated = (vars(base).get("__annotations__", {}) for owner in OWNERS for base in getattr(owner, "__mro__", ()))
    return {name for names in (*map(dir, OWNERS), *annotated) for name in names if is_private(name)}


def uses(source: str, private: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of every use in a module: imports; attributes, but for those that the module sets itself; methods
    that override torch's; names in strings."""
    nodes = list(ast.walk(ast.parse(source)))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    own = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    of_torch: set[str] = set()
    for node in imports:
        module = getattr(node, "module", None) or ""
        for alias in node.names:
            path = f"{module}.{alias.name}".strip(".").split(".")
            if path[0] == "torch":
                of_torch.add(alias.asname or path[-1 if module else 0])
                yield from ((node.lineno, part) for part in path if is_private(part))
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if root(node) in of_torch or (node.attr in private and node.attr not in own):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ClassDef) and of_torch.intersection(map(root, node.bases)):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            yield from ((method.lineno, method.name) for method in methods if method.name in private)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in private:
            yield node.lineno, node.value


def root(node: ast.expr) -> str:
    """The first name of a.b.c."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def test_private_names_of_torch_are_in_one_module() -> None:
    private = private_names()
    rooms = ("megatron_ext", "pretrain", "tools")
    found = {file: list(uses(file.read_text(encoding="utf-8"), private)) for room in rooms
             for file in sorted((ROOT / room).rglob("*.py"))}  # fmt: skip
    there = {name for _, name in found.pop(ALLOWED)}
    assert {"_spec", "_cdata", "_foreach_norm", "_C", "_utils", "_prepare_forward_infra", "_StorageInfo"} <= there
    elsewhere = [f"{file.relative_to(ROOT)}:{line}: {name}" for file, names in found.items() for line, name in names]
    assert not elsewhere, elsewhere
