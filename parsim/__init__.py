"""parsim: simulate, choose and run parallel plans for training large language models.

`parsim.plan(...)`, `parsim.simulate(...)` and the other names of parsim.api load on first use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parsim.api import capacity, load_cluster, load_model, plan, simulate, to_data, to_json

__version__ = "0.1.0"
__all__ = ["capacity", "load_cluster", "load_model", "plan", "simulate", "to_data", "to_json"]


def __getattr__(name: str) -> Any:
    """A function of parsim.api."""
    if name not in __all__:
        raise AttributeError(f"module 'parsim' has no attribute {name!r}")
    return getattr(importlib.import_module("parsim.api"), name)


class _Package(ModuleType):
    """parsim.plan and parsim.simulate are also modules, which Python binds to the package when they are
    imported; here the functions keep these names, and `from parsim.plan import …` finds the modules.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
