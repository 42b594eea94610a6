"""The most memory that the tensors of a process take at once, where no allocator counts it.

Torch's MemTracker follows modules, and loses its way where a module runs again before its backward, as
in every pipeline; here only storages are followed.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):  # type: ignore[misc]
    """Follows every storage on one device as long as it lasts: those there are, and those that come.

    Kernels' own workspace is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self._sizes: dict[int, int] = {}
        self._now = 0
        self.peak_bytes = 0
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> PeakMemory:
        gc.collect()
        for each in gc.get_objects():
            if issubclass(type(each), torch.Tensor) and not issubclass(type(each), DTensor):
                self._follow(each)
        tracker, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)  # FSDP lets go of parameters by making their storage empty
            tracker._note(storage, followed_only=True)
            return result

        torch.UntypedStorage.resize_ = resized
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._follow(each)
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == self._device and tensor.layout == torch.strided:
            self._note(tensor.untyped_storage())

    def _note(self, storage: torch.UntypedStorage, *, followed_only: bool = False) -> None:
        key, size = storage._cdata, storage.nbytes()
        before = self._sizes.get(key)
        if before is None:
            if followed_only:
                return
            weakref.finalize(storage, self._forget, key)
        self._sizes[key] = size
        self._now += size - (before or 0)
        self.peak_bytes = max(self.peak_bytes, self._now)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)
