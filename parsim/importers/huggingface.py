"""A Hugging Face config.json as a ModelSpec.

A config is data from outside: what names a size is validated strictly, everything else (token ids,
dropout, dtypes, rotary scaling) is ignored because it changes neither shape nor cost. What would change
the shape and cannot be said in a ModelSpec is refused, never approximated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from types import MappingProxyType

from pydantic import ValidationError

from parsim.errors import ParsimError, did_you_mean, shorten
from parsim.importers import dense, experts
from parsim.importers.base import Family
from parsim.model import ModelSpec

FAMILIES: Mapping[str, type[Family]] = MappingProxyType(
    {
        "bloom": dense.Bloom,
        "deepseek_v2": experts.DeepseekV2,
        "deepseek_v3": experts.DeepseekV3,
        "falcon": dense.Falcon,
        "gemma": dense.Gemma,
        "gemma2": dense.Gemma2,
        "gpt2": dense.Gpt2,
        "gpt_neox": dense.GptNeox,
        "gpt_oss": experts.GptOss,
        "kimi_k2": experts.DeepseekV3,
        "llama": dense.Llama,
        "mistral": dense.Mistral,
        "mixtral": experts.Mixtral,
        "opt": dense.Opt,
        "qwen2": dense.Qwen2,
        "qwen2_moe": experts.Qwen2Moe,
        "qwen3": dense.Qwen3,
        "qwen3_moe": experts.Qwen3Moe,
    }
)
"""The families parsim reads, by the config's `model_type`."""


def model_from_config(data: object, *, where: str) -> ModelSpec:
    """The model that a parsed config.json describes; `where` is the file, for messages and the name.

    The model is called as the file, or as its folder where the file is a plain config.json. Modules
    beside the decoder (vision) are not part of it.

    Raises ParsimError naming every wrong or missing key at once.
    """
    if not isinstance(data, Mapping):
        raise ParsimError("a config.json is one JSON object", where=where, got=data)
    model_type = data.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ParsimError(
            "the config lacks model_type" if model_type is None else "unknown model_type",
            where=f"{where}: model_type",
            got=model_type,
            expected=f"one of {', '.join(FAMILIES)}",
            hint=did_you_mean(str(model_type), FAMILIES),
        )
    try:
        config = family.model_validate(dict(data))
        return ModelSpec(
            name=_name(where) or str(model_type),
            source=f"Hugging Face config.json, model_type {model_type}",
            **config.shape(),
        )
    except ValidationError as error:
        problems = [_describe(e) for e in error.errors()]
        noun = "problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ParsimError(f"{noun} in this file:\n  - " + "\n  - ".join(problems), where=where) from None
    except ParsimError as error:
        raise error.at(where) from None


def _name(where: str) -> str:
    """What to call the model that `where` describes.

    >>> _name("zoo/Llama-3.1-8B/config.json"), _name("zoo/my-model.json"), _name("config.json")
    ('Llama-3.1-8B', 'my-model', '')
    """
    path = PurePath(where)
    name = path.parent.name if path.stem == "config" else path.stem
    return "".join(c for c in name if c.isprintable())


def _describe(error: Mapping[str, object]) -> str:
    """One pydantic error as "key: message, got value"."""
    loc = error["loc"]
    assert isinstance(loc, tuple)
    text = str(error["msg"]).removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    # The input of a missing key is the whole config, and that of a rule over several keys as well.
    if error["type"] != "missing" and loc:
        text += f", got {shorten(error['input'])}"
    return ": ".join(filter(None, (".".join(map(str, loc)), text)))
