"""`parsim models`: the models that parsim ships."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from parsim.cli.options import JsonOption
from parsim.cli.output import document, print_json, print_table


def models(
    name: Annotated[str | None, typer.Argument(help="Show one: a name or a file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped models, or show one.

    \b
    Examples:
      parsim models
      parsim models llama-3.1-405b --json
    """
    from parsim.config import load_model, shipped, to_data
    from parsim.model import ModelSpec, num_parameters
    from parsim.units import format_count

    def data(spec: ModelSpec) -> dict[str, Any]:
        counts = {
            "parameters": num_parameters(spec),
            "active_parameters": num_parameters(spec, active=True),
        }
        return to_data(spec) | counts

    specs = [load_model(each) for each in ([name] if name else shipped("models"))]
    if as_json:
        print_json(document("models", {"name": name}, {"models": [data(spec) for spec in specs]}))
        return
    if name:
        print_table(["field", "value"], [[key, str(value)] for key, value in data(specs[0]).items()])
        return
    rows = [
        [
            spec.name,
            format_count(num_parameters(spec)),
            format_count(num_parameters(spec, active=True)),
            str(spec.layers),
            str(spec.hidden),
            f"{spec.heads}/{spec.kv_heads}",
            spec.attention_kind,
            f"{spec.moe.top_k} of {spec.moe.experts}" if spec.moe else "dense",
            str(spec.vocab),
            str(spec.max_seq_len),
        ]
        for spec in specs
    ]
    headers = ["model", "parameters", "active", "layers", "hidden", "heads/kv", "attention",
               "experts", "vocab", "seq_len"]  # fmt: skip
    print_table(headers, rows)
