"""What only runs on a GPU, as far as it can be known without one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import parsim

torch = pytest.importorskip("torch")


def names_of_cuda() -> dict[str, str]:
    """Every NAME of torch.cuda.NAME in parsim, with a file that has it."""
    found = {}
    for path in sorted(Path(parsim.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                found[node.attr] = path.name
    return found


def test_every_name_taken_from_torch_cuda_is_there() -> None:
    names = names_of_cuda()
    assert "set_device" in names  # the search finds what there is
    assert {name: file for name, file in names.items() if not hasattr(torch.cuda, name)} == {}


def test_a_gpu_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from parsim.execute.training.timing import about_device

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H100 {device.index}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    found = about_device(torch.device("cuda", 3))
    assert found == {"device": "NVIDIA H100 3", "peak_bytes": 7, "torch": torch.__version__}
