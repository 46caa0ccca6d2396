"""What .metadata asks for beyond DCP's own classes is refused by name, and none of it runs."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorProperties

from megatron_ext.checkpoint.metadata import TensorReader, objects_of, read_metadata
from megatron_ext.checkpoint.read import WeightReader
from megatron_ext.errors import RequestError
from tests.malice import Deed, edit_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    state = {"model.a": torch.arange(6.0).view(2, 3), "model.b": {"c": torch.zeros(2, dtype=torch.bfloat16)}, "o": [1]}
    dcp.save(state, checkpoint_id=tmp_path / "ck", no_dist=True)
    return tmp_path / "ck"


def test_it_is_what_torch_reads(checkpoint: Path) -> None:
    ours, theirs = read_metadata(checkpoint), dcp.FileSystemReader(checkpoint).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert objects_of(ours) == ["o"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_writers_are_read_too(checkpoint: Path, protocol: int) -> None:
    """Of any protocol, of torch before 2.3, with fields that megatron-core adds."""

    def change(metadata: Any) -> None:
        metadata.mcore_data = OrderedDict(a={"nd_reformulated_orig_global_shape": torch.Size([2, 3])})
        metadata.state_dict_metadata["model.a"].properties = OldProperties(torch.float32)
        del metadata.storage_meta

    expected = read_metadata(checkpoint)
    edit_metadata(checkpoint, change, protocol)
    assert read_metadata(checkpoint) == expected


@pytest.mark.parametrize(
    "place",
    ["instead", "planner_data", "storage_meta", "key", "size", "dtype", "path"],
)
@pytest.mark.parametrize("deed", ["os.system", "eval", "numpy", "getattr"])
def test_nothing_that_it_names_is_run(checkpoint: Path, tmp_path: Path, place: str, deed: str) -> None:
    mark = tmp_path / "mark"
    bad: Any = {
        "os.system": Deed(os.system, f"touch {mark}"),
        "eval": Deed(eval, f"open({str(mark)!r}, 'w')"),
        "numpy": Deed(torch.save, 1, str(mark)),
        "getattr": Deed(getattr, Path(mark), "touch"),
    }[deed]

    def change(metadata: Any) -> Any:
        entry = metadata.state_dict_metadata["model.a"]
        match place:
            case "instead":
                return bad
            case "key":
                metadata.state_dict_metadata[bad] = entry
            case "size":
                entry.size = bad
            case "dtype":
                entry.properties = Deed(TensorProperties, bad)
            case "path":
                next(iter(metadata.storage_data.values())).relative_path = bad
            case name:
                setattr(metadata, name, bad)

    edit_metadata(checkpoint, change)
    asked = {"os.system": "posix.system", "numpy": "torch.serialization.save"}.get(deed, f"builtins.{deed}")
    for read in (read_metadata, WeightReader, TensorReader):
        with pytest.raises(RequestError) as refusal:
            read(checkpoint)
        assert f"{checkpoint}/.metadata cannot be read (it asks for {asked}, which" in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert not mark.exists()


def test_torchs_classes_are_left_alone(checkpoint: Path) -> None:
    """BUILD sets attributes of whatever is on the stack, of a class too."""
    text = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(S'__init__'\nI1\ndtb."
    (checkpoint / ".metadata").write_bytes(text)
    with pytest.raises(RequestError, match="cannot be read"):
        read_metadata(checkpoint)
    assert Metadata({}).state_dict_metadata == {}


@pytest.mark.parametrize("name", ["/etc/hostname", "../x", "a/../../x", "", "link", "linked/x"])
def test_files_outside_the_folder_are_refused(checkpoint: Path, name: str) -> None:
    (checkpoint.parent / "x").write_bytes(b"")
    (checkpoint / "link").symlink_to(checkpoint.parent / "x")
    (checkpoint / "linked").symlink_to(checkpoint.parent)
    edit_metadata(checkpoint, lambda m: [setattr(info, "relative_path", name) for info in m.storage_data.values()])
    with pytest.raises(RequestError, match=f"are stored in '{name}', which is outside the checkpoint's folder"):
        read_metadata(checkpoint)


def test_a_folder_that_is_a_link_is_read(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint)
    assert read_metadata(tmp_path / "link") == read_metadata(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.storage_data.update({MetadataIndex("model.a", [0, 0]): _StorageInfo("__0_0.distcp", -1, 4)}),
        lambda m: m.storage_data.update(
            {MetadataIndex("model.a", [0, 0]): _StorageInfo("__0_0.distcp", 0, 4, ["zstd"])}
        ),
        lambda m: m.state_dict_metadata.update({"model.a": m}),
        lambda m: m.state_dict_metadata.update({7: m.state_dict_metadata["model.a"]}),
        lambda m: setattr(m.state_dict_metadata["model.a"], "chunks", [1]),
        lambda m: setattr(m.state_dict_metadata["model.a"], "size", (2.5, 3)),
        lambda m: setattr(m, "storage_data", None),
        vars,
    ],
)
def test_other_contents_are_one_line(checkpoint: Path, change: Any) -> None:
    edit_metadata(checkpoint, change)
    with pytest.raises(RequestError, match=r"/\.metadata cannot be read \(") as refusal:
        read_metadata(checkpoint)
    assert "\n" not in str(refusal.value)


def test_a_weight_that_is_an_object_is_refused(checkpoint: Path) -> None:
    with pytest.raises(
        RequestError, match=r"^--load .*/\.metadata: o is stored as a pickled object and not as a tensor"
    ):
        TensorReader(checkpoint, "--load")
    assert WeightReader(checkpoint).shapes.keys() == {"a", "b.c"}
    edit_metadata(checkpoint, lambda m: m.state_dict_metadata.update({"model.a": BytesStorageMetadata()}))
    with pytest.raises(RequestError, match=r"\.metadata: model\.a is stored as a pickled object and not as a tensor"):
        WeightReader(checkpoint)
