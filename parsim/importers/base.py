"""What the families of Hugging Face configs share: strict validation, and the Llama-like decoder."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from parsim.errors import ParsimError
from parsim.model import MAX_LAYERS, MAX_SIZE

Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Count = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
LayerTypes = Annotated[list[str], Field(max_length=MAX_LAYERS)]


class Family(BaseModel):
    """One family's config: the keys that tell the shape, by the names that the family gave them.

    A default is the one that the `transformers` library takes where the key is left out; sizes that
    differ from model to model have none, so that a config without them is refused.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, protected_namespaces=())

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """The fields of ModelSpec that this config sets."""


class LlamaLike(Family):
    """Pre-norm decoder with RMSNorm, rotary positions and a gated feed-forward."""

    num_hidden_layers: Layers
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None
    head_dim: Size | None = None
    intermediate_size: Size
    vocab_size: Size
    max_position_embeddings: Size
    tie_word_embeddings: bool = False

    def shape(self) -> dict[str, Any]:
        return {
            "layers": self.num_hidden_layers,
            "hidden": self.hidden_size,
            "heads": self.num_attention_heads,
            "kv_heads": self.num_key_value_heads or 0,
            "head_dim": self.head_dim or 0,
            "ffn_hidden": self.intermediate_size,
            "gated_mlp": True,
            "vocab": self.vocab_size,
            "max_seq_len": self.max_position_embeddings,
            "tied_embeddings": self.tie_word_embeddings,
        }


def window_fields(window: int | None, layer_types: list[str] | None, *, every: int) -> dict[str, int]:
    """`window` and `window_every` of ModelSpec.

    `every` is the family's own pattern; `layer_types`, where the config lists them, must be a pattern
    that begins with a sliding layer and repeats.
    """
    if layer_types is not None:
        slides = [kind == "sliding_attention" for kind in layer_types]
        if not any(slides):
            return {}
        every = slides.index(True, 1) if any(slides[1:]) else len(slides)
        if slides != [i % every == 0 for i in range(len(slides))]:
            raise ParsimError(
                "this pattern of sliding and full attention is not supported",
                where="layer_types",
                got=layer_types,
                expected="one sliding layer, then a fixed number of full ones, repeated",
            )
    return {"window": window, "window_every": every} if window else {}
