"""Writing and reading checkpoints with torch.distributed.checkpoint, all ranks together."""

from __future__ import annotations

import pickle
import re
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from parsim.errors import ParsimError
from parsim.execute.launch.checkpoint_folder import Saved, complete, saved_at, unfinished, unwritten
from parsim.execute.steps import StepRecord
from parsim.execute.training.named_states import load_states, saved_states
from parsim.execute.training.trainer import Trainer


def save_checkpoint(trainer: Trainer, steps: list[StepRecord], plan_since: int) -> None:
    """Write what training has become after `steps`, of which those from `plan_since` on ran like this.

    The checkpoint counts from the moment that this returns.
    """
    case = trainer.case
    assert case.checkpoint is not None
    folder, step = Path(case.checkpoint.folder), len(steps)
    trainer.recorder.say(f"writing the checkpoint of step {step}")
    try:
        dcp.save(
            saved_states(trainer.data_parallel) | _loss_scale_states(trainer),
            storage_writer=FileSystemWriter(unfinished(folder, step)),
            process_group=trainer.control,
        )
        if dist.get_rank() == 0:
            complete(folder, case, steps, plan_since)
    except (CheckpointException, OSError) as error:  # the first one comes to all ranks
        unwritten(folder, step, error)
    trainer.recorder.say("waiting: checkpoint")
    dist.barrier(group=trainer.control)


def load_checkpoint(trainer: Trainer) -> Saved | None:
    """Put back what a checkpoint holds, if the run begins at one; what it says of itself."""
    policy = trainer.case.checkpoint
    # All begin where rank 0 does: on a shared disk not every machine sees the newest at once.
    start = torch.tensor([0 if policy is None else policy.start])
    dist.broadcast(start, src=0, group=trainer.control)
    if policy is None or not start.item():
        return None
    saved = saved_at(Path(policy.folder), int(start.item()))
    trainer.recorder.say(f"reading the checkpoint of step {saved.step}")

    def read(states: dict[str, torch.Tensor]) -> None:
        dcp.load(states, storage_reader=IndexReader(saved.path), process_group=trainer.control)

    load_states(trainer.data_parallel, read)
    if trainer.loss_scale is not None:
        scale = trainer.loss_scale.states()
        read(scale)
        trainer.loss_scale.load(scale)
    return saved


def _loss_scale_states(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {} if trainer.loss_scale is None else trainer.loss_scale.states()


_DATA_FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")


class IndexReader(FileSystemReader):  # type: ignore[misc]
    """torch's reader, but what it takes from files can build nothing but tensors and their index.

    Torch reads tensors with weights_only, but the index, .metadata, with a plain pickle.load, which runs
    whatever a file from elsewhere says.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with open(path, "rb") as file:
                metadata = _IndexUnpickler(file).load()
        except ParsimError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise _damaged(path, error) from None
        places = getattr(metadata, "storage_data", None) or {}
        if type(metadata) is not Metadata or not isinstance(places, dict):
            raise _damaged(path, type(metadata).__name__)
        for place in places.values():
            name = getattr(place, "relative_path", None)
            if not isinstance(name, str) or not _DATA_FILE.fullmatch(name):
                raise _damaged(path, name)  # torch would open whatever file it names
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _damaged(path: Path, got: object) -> ParsimError:
    return ParsimError(
        "this checkpoint's index is damaged",
        where=str(path),
        got=got,
        hint="the checkpoint before it may be whole: remove this one",
    )


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's index, and no others."""

    _CLASSES = frozenset(
        f"torch.distributed.checkpoint.{name}"
        for name in (
            "metadata.BytesStorageMetadata",
            "metadata.ChunkStorageMetadata",
            "metadata.Metadata",
            "metadata.MetadataIndex",
            "metadata.StorageMeta",
            "metadata.TensorProperties",
            "metadata.TensorStorageMetadata",
            "metadata._MEM_FORMAT_ENCODING",
            "filesystem._StorageInfo",
        )
    ) | {
        "torch.Size",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",  # its name in Python 3.13
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._member
        known = f"{module}.{name}" in self._CLASSES
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise self._refused(f"{module}.{name}")

    def _member(self, owner: object, name: str) -> Any:
        """A member of an enumeration, which Python 3.11 before 3.11.5 pickles as an attribute."""
        if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
            return owner[name]
        raise self._refused("builtins.getattr")

    @staticmethod
    def _refused(got: str) -> ParsimError:
        return ParsimError(
            "this checkpoint's index holds something other than an index of tensors",
            where=".metadata",
            got=got,
            hint="it was not written by parsim, or was tampered with",
        )
