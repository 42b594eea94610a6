"""The cells of one row of a table of measured runs, read by type."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from parsim.compare.csv_table import Row
from parsim.errors import ParsimError

REQUIRED_COLUMNS = (
    *("id", "framework", "hardware", "gpus", "layers", "hidden", "heads", "ffn_hidden", "gated_mlp"),
    *("vocab", "seq_len", "global_batch", "micro_batch", "tp", "pp", "precision", "recompute"),
    "iter_time_s",
)
OPTIONAL_COLUMNS = (
    *("source", "gpus_per_node", "inter_node_gbit_per_gpu", "model_name", "kv_heads", "experts"),
    *("top_k", "vpp", "cp", "ep", "dp", "zero_or_fsdp", "sequence_parallel", "schedule", "compile"),
    *("tp_overlap", "peak_memory_gib", "strict", "notes", "year", "interconnect", "params_b"),
    *("tflops_per_gpu", "mfu", "tokens_per_s_per_gpu"),
)


@dataclass(slots=True)
class Cells:
    """The cells of a row, read by type; every error names its column."""

    row: Row
    assumed: list[str] = field(default_factory=list)

    def text(self, key: str) -> str:
        return self.row.get(key, "").strip()

    def number(self, key: str) -> float | None:
        text = self.text(key)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ParsimError("this cell is no number", where=key, got=text)
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number from 1, such as 48 or 48.0; an empty cell is the default or an error."""
        value = self.number(key)
        if value is None:
            if default is None:
                raise ParsimError("this cell is empty", where=key, expected="a whole number")
            return default
        if value != int(value) or not 1 <= value < 2**31:
            raise ParsimError("this cell is no whole number from 1", where=key, got=self.text(key))
        return int(value)

    def flag(self, key: str) -> bool | None:
        value = self.number(key)
        if value not in (None, 0, 1):
            raise ParsimError("this cell is yes (1) or no (0)", where=key, got=self.text(key))
        return None if value is None else bool(value)


def measured_s(row: Row) -> float:
    """Measured seconds of a step."""
    seconds = Cells(row).number("iter_time_s")
    if seconds is None or not seconds > 0:
        raise ParsimError(
            "a measured time is greater than zero", where="iter_time_s", got=row.get("iter_time_s", "")
        )
    return seconds


def peak_memory_bytes(row: Row) -> float | None:
    """Measured peak of a device's memory, or None where it is not stated."""
    gib = Cells(row).number("peak_memory_gib")
    return None if gib is None or not gib > 0 else gib * 2**30


def precision_of(cells: Cells) -> str:
    """The GEMMs' dtype by its prefix; what follows names a scaling recipe."""
    text = cells.text("precision").lower()
    if not text:
        cells.assumed.append("precision not stated: bf16")
        return "bf16"
    for prefix, precision in (
        ("fp8-mx", "mxfp8"),
        ("mxfp8", "mxfp8"),
        ("nvfp4", "nvfp4"),
        ("fp8", "fp8"),
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("fp32", "fp32"),
        ("fp64", "fp64"),
    ):
        if text.startswith(prefix):
            return precision
    raise ParsimError("unknown precision", where="precision", got=text, expected="bf16, fp16, fp8 …")
