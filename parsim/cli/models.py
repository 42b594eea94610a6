"""`parsim models`: the models that parsim ships, and smaller ones by structured pruning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.completion import complete_model
from parsim.cli.options import JsonOption
from parsim.cli.output import document, print_json, say
from parsim.cli.output_paths import to_file
from parsim.cli.tables import print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from parsim.model import ModelSpec


def models(
    name: Annotated[
        str | None, typer.Argument(help="Show one: a name or a file.", autocompletion=complete_model)
    ] = None,
    prune: Annotated[
        str | None,
        typer.Option(
            "--prune",
            help="Make it smaller: what to keep of layers, heads, ffn and experts, as shares with a "
            "point or as numbers; tp=8: what is left must still split so.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the one model here, as TOML.", callback=to_file),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped models, show one, or prune it.

    \b
    Examples:
      parsim models
      parsim models llama-3.1-405b --json
      parsim models llama-3.1-8b --prune layers=0.75,heads=0.75,ffn=9216 -o small.toml
    """
    from parsim.config import load_model, to_data, to_toml, write_file
    from parsim.errors import ParsimError
    from parsim.shipped import shipped

    if name is None and (prune is not None or output is not None):
        raise ParsimError(
            "this is done to one model",
            where="--prune" if prune is not None else "--output",
            hint="parsim models llama-3.1-8b …",
        )
    specs = [load_model(each) for each in ([name] if name else shipped("models"))]
    whole = specs[0] if prune is not None else None
    if prune is not None:
        specs = [_pruned(specs[0], prune)]
    if output is not None:
        write_file(output, to_toml(to_data(specs[0])))
        say(f"wrote {output}")
    if as_json:
        answer: dict[str, Any] = {"models": [_data(spec) for spec in specs]}
        if whole is not None:
            answer["pruned_from"] = _data(whole)
        print_json(document("models", {"name": name, "prune": prune}, answer))
    elif whole is not None:
        _print_pruned(whole, specs[0])
    elif name:
        print_table(["field", "value"], [[key, str(value)] for key, value in _data(specs[0]).items()])
    else:
        _print_list(specs)


def _pruned(spec: ModelSpec, text: str) -> ModelSpec:
    from parsim.pruning import Keep, pruned
    from parsim.settings_text import parse_settings

    def amount(value: str) -> float | int:
        return float(value) if "." in value else int(value)

    readers: dict[str, Callable[[str], Any]] = dict.fromkeys(
        ("layers", "heads", "ffn", "experts"), amount
    )
    given = parse_settings(text, readers | {"tp": int}, where="--prune").values
    return pruned(spec, Keep(**given))


def _data(spec: ModelSpec) -> dict[str, Any]:
    from parsim.config import to_data
    from parsim.cost.flops import model_flops_per_token
    from parsim.model import num_parameters

    return to_data(spec) | {
        "parameters": num_parameters(spec),
        "active_parameters": num_parameters(spec, active=True),
        "flops_per_token": model_flops_per_token(spec, spec.max_seq_len),
    }


def _print_pruned(whole: ModelSpec, small: ModelSpec) -> None:
    """Before and after, with what is left of each."""
    from parsim.units import format_count

    before, after = _data(whole), _data(small)
    sizes = ("layers", "heads", "kv_heads", "head_dim", "ffn_hidden")
    rows = [["name", whole.name, small.name, ""]]
    rows += [[k, str(before[k]), str(after[k]), f"{after[k] / before[k]:.1%}"] for k in sizes]
    if whole.moe is not None and small.moe is not None:
        for key in ("experts", "ffn_hidden", "shared_ffn_hidden"):
            old, new = getattr(whole.moe, key), getattr(small.moe, key)
            if old:
                rows.append([f"moe.{key}", str(old), str(new), f"{new / old:.1%}"])
    for key in ("parameters", "active_parameters", "flops_per_token"):
        share = after[key] / before[key]
        rows.append([key, format_count(before[key]), format_count(after[key]), f"{share:.1%}"])
    print_table(["", "before", "after", "kept"], rows)


def _print_list(specs: list[ModelSpec]) -> None:
    rows = [
        [
            spec.name,
            _parameters(spec),
            f"{spec.layers} × {spec.hidden}",
            f"{spec.heads} MLA" if spec.attention_kind == "MLA" else f"{spec.heads}/{spec.kv_heads}",
            f"{spec.moe.top_k} of {spec.moe.experts}" if spec.moe else "dense",
            str(spec.max_seq_len),
        ]
        for spec in specs
    ]
    headers = ["\nmodel", "parameters\n(active)", "layers ×\nhidden", "\nheads/kv", "\nexperts",
               "\nseq_len"]  # fmt: skip
    print_table(headers, rows)


def _parameters(spec: ModelSpec) -> str:
    """All parameters, and of a model with experts those that a token meets."""
    from parsim.model import num_parameters
    from parsim.units import format_count

    text = format_count(num_parameters(spec))
    return f"{text} ({format_count(num_parameters(spec, active=True))})" if spec.moe else text
