"""Lets modules that define Triton kernels be imported where Triton is not installed.

The kernels are never run: a name in the stand-in is a decorator that returns what it decorates, or
else a value that takes any use made of it at import time.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class Anything:
    """Takes every call, subscript and operator that a module makes while it is imported."""

    def __call__(self, *args, **kwargs):
        """As a decorator: the function itself."""
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __getitem__(self, key):
        return self

    def __or__(self, other):
        return self

    __ror__ = __or__


class StandIn(types.ModuleType):
    """A module of such names."""

    __path__ = ()
    __version__ = "3.0.0"
    __getattr__ = Anything.__getattr__


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds triton and everything inside it."""

    def find_spec(self, name, path, target=None):
        """A package for triton and all that lies in it."""
        if name.partition(".")[0] != "triton":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        """An empty module."""
        return StandIn(spec.name)

    def exec_module(self, module):
        """There is nothing to run."""


def install():
    """Make `import triton` work; torch goes on knowing that it has none."""
    import torch._inductor.runtime.triton_compat
    import torch.utils._triton
    import torch.utils.flop_counter

    for name in dir(torch.utils._triton):
        probe = getattr(torch.utils._triton, name)
        if name.startswith("has_triton") and callable(probe):
            probe()  # remembers the answer
    sys.meta_path.insert(0, Finder())
