"""The torch model is the ModelSpec's: its parameters, its stages, its seeds."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from parsim.execute.training.checking import gradient_error  # noqa: E402
from parsim.execute.training.transformer import (  # noqa: E402
    Block,
    Part,
    Transformer,
    build,
    rope_angles,
    synthetic_tokens,
    whole,
)
from parsim.model import ModelSpec, MoeSpec, num_parameters  # noqa: E402

LLAMA = ModelSpec(
    name="llama", layers=3, hidden=32, heads=4, kv_heads=2, ffn_hidden=48, gated_mlp=True, vocab=64,
    max_seq_len=16,
)  # fmt: skip
GPT = dataclasses.replace(
    LLAMA, kv_heads=4, gated_mlp=False, norm="layernorm", position="learned", linear_bias=True
)
BLOOM = dataclasses.replace(GPT, position="none", embedding_norm=True, tied_embeddings=True)
OPT = dataclasses.replace(GPT, position_rows=18, norm_bias=False)
QWEN = dataclasses.replace(LLAMA, head_dim=6, qkv_bias=True, qk_norm=True, final_norm=False)
MIXTRAL = dataclasses.replace(LLAMA, moe=MoeSpec(experts=4, top_k=2, ffn_hidden=24))
DEEPSEEK = dataclasses.replace(
    LLAMA,
    moe=MoeSpec(
        experts=4, top_k=3, ffn_hidden=24, shared_ffn_hidden=32, dense_layers=1, expert_bias=True,
        shared_gate=True,
    ),
)  # fmt: skip
MODELS = pytest.mark.parametrize("spec", [LLAMA, GPT, BLOOM, OPT, QWEN, MIXTRAL, DEEPSEEK])


def made(spec: ModelSpec, part: Part | None = None, **options: Any) -> Transformer:
    settings = {"seq_len": 16, "recompute": "none", "dtype": torch.float64, "seed": 3} | options
    return build(spec, part or whole(spec), device=torch.device("cpu"), **settings)


@MODELS
def test_it_has_the_parameters_that_the_model_counts(spec: ModelSpec) -> None:
    assert sum(p.numel() for p in made(spec).parameters()) == num_parameters(spec)


@MODELS
def test_stages_one_after_another_are_the_whole_model(spec: ModelSpec) -> None:
    if spec.tied_embeddings:
        spec = dataclasses.replace(spec, tied_embeddings=False)
    tokens, _ = synthetic_tokens(spec.vocab, 16, 2, seed=0, step=0)
    first = made(spec, Part(layers=range(1), first=True, last=False, recomputed=0))
    last = made(spec, Part(layers=range(1, 3), first=False, last=True, recomputed=1), recompute="full")
    model = made(spec)
    assert torch.equal(last(first(tokens)), model(tokens))
    parts = dict(first.named_parameters()) | dict(last.named_parameters())
    assert parts.keys() == dict(model.named_parameters()).keys()


@MODELS
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_no_gradient(spec: ModelSpec, recompute: str) -> None:
    tokens, _ = synthetic_tokens(spec.vocab, 16, 2, seed=0, step=0)
    gradients = []
    for mode in ("none", recompute):
        model = made(spec, recompute=mode)
        model(tokens).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-12, atol=1e-12, msg=name)


def test_only_the_first_layers_give_their_activations_up() -> None:
    """Each keeps its input alone, and all save alike: what autograd keeps falls on a straight line."""
    tokens, _ = synthetic_tokens(LLAMA.vocab, 16, 2, seed=0, step=0)
    model = made(LLAMA, dataclasses.replace(whole(LLAMA), recomputed=2), recompute="full")
    assert [block.recompute for block in model.layers.values()] == [True, True, False]
    kept_bytes = []
    for recomputed in range(4):
        model = made(LLAMA, dataclasses.replace(whole(LLAMA), recomputed=recomputed), recompute="full")
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens)
        kept_bytes.append(sum(kept.values()))
    saved = [more - less for more, less in pairwise(kept_bytes)]
    assert saved[0] > 0
    assert saved == [saved[0]] * 3


@MODELS
def test_no_token_sees_those_after_it(spec: ModelSpec) -> None:
    tokens, _ = synthetic_tokens(spec.vocab, 16, 1, seed=0, step=0)
    other = tokens.clone()
    other[0, 9] = (other[0, 9] + 1) % spec.vocab
    model = made(spec)
    before, after = model(tokens), model(other)
    if spec.moe is None:
        assert torch.equal(before[:, :9], after[:, :9])
    else:  # the experts' products have other sizes where another token goes elsewhere
        torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_rotary_scores_depend_on_distance_alone() -> None:
    """Su et al. 2021, section 3.2: the product of rotated q and k is a function of m − n."""
    from parsim.execute.training.transformer import rope_angles, rotate

    angles = rope_angles(torch.arange(12), 8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 12, 1, 8)
    q, k = rotate(q, angles.cos(), angles.sin()), rotate(k, angles.cos(), angles.sin())
    scores = torch.einsum("bmhd,bnhd->mn", q, k)
    for offset in range(-5, 6):
        diagonal = torch.diagonal(scores, offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_values_depend_on_seed_and_name_alone() -> None:
    one, same, other = made(LLAMA), made(LLAMA), made(LLAMA, seed=4)
    for name, value in one.named_parameters():
        assert torch.equal(value, dict(same.named_parameters())[name])
        assert not torch.equal(value, dict(other.named_parameters())[name])


def test_targets_are_the_tokens_that_follow() -> None:
    tokens, targets = synthetic_tokens(64, 16, 4, seed=0, step=5)
    assert tokens.shape == targets.shape == (4, 16)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert not torch.equal(tokens, synthetic_tokens(64, 16, 4, seed=0, step=6)[0])


class Told:
    """A reference whose gradients are given."""

    def __init__(self, **gradients: list[float]) -> None:
        self.parameters = {n: torch.tensor(g, dtype=torch.float64) for n, g in gradients.items()}

    def gradient(self, name: str) -> Any:
        return self.parameters[name]


def test_the_worst_parameter_is_found_by_its_own_scale() -> None:
    reference = Told(large=[1.0, -4.0], small=[1e-3, 2e-3], absent=[7.0])
    mine = {
        "large": torch.tensor([1.0, -4.4], dtype=torch.float64),
        "small": torch.tensor([1e-3, 2.4e-3], dtype=torch.float64),
    }
    error, name = gradient_error(reference, mine)  # type: ignore[arg-type]
    assert name == "small"
    assert error == pytest.approx(0.2)


def test_gradients_that_are_zero_but_for_rounding_do_not_count() -> None:
    reference = Told(weight=[1.0], bias=[1e-18])
    mine = {"weight": torch.ones(1).double(), "bias": -2e-18 * torch.ones(1).double()}
    assert gradient_error(reference, mine)[0] < 1e-11  # type: ignore[arg-type]


def test_a_token_gets_the_weighted_sum_of_its_best_experts() -> None:
    """Jiang et al. 2024, section 2.1: Softmax(TopK(x·W_g))_i · SwiGLU_i(x), token by token."""
    model = made(MIXTRAL)
    layer = model.layers["0"].feed_forward
    x = torch.randn(2, 8, MIXTRAL.hidden, dtype=torch.float64)
    found = layer(x)
    for b, s in [(0, 0), (0, 5), (1, 7)]:
        scores = layer.router(x[b, s])
        best = scores.argsort(descending=True)[:2]
        weights = scores[best].softmax(dim=0)
        parts = [w * layer.experts[str(int(e))](x[b, s]) for w, e in zip(weights, best, strict=True)]
        torch.testing.assert_close(found[b, s], parts[0] + parts[1], rtol=1e-12, atol=1e-12)


def test_an_expert_without_tokens_has_a_gradient_of_zeros() -> None:
    layer = made(MIXTRAL).layers["0"].feed_forward
    with torch.no_grad():
        layer.router.weight[3] = 0.0
    x = layer.router.weight[:3].sum(dim=0).detach().expand(1, 4, -1)  # the others score higher
    layer(x).sum().backward()
    gradients = [p.grad for p in layer.experts["3"].parameters()]
    assert all(g is not None and not g.any() for g in gradients)
    assert any(p.grad.any() for p in layer.experts["0"].parameters())


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_context_ranks_have_the_whole_sequence_and_equal_work(ranks: int) -> None:
    from parsim.execute.training.context import chunks_of

    chunks = [chunks_of(i, ranks) for i in range(ranks)]
    assert sorted(sum(chunks, ())) == list(range(2 * ranks))
    assert len({first + second for first, second in chunks}) == 1  # chunks seen, but for a constant


@pytest.mark.parametrize(("gated", "tensors"), [(True, 9), (False, 8)])
def test_torch_recomputes_a_layer_for_each_tensor_whose_gradient_it_takes_apart(
    gated: bool, tensors: int
) -> None:
    """What the stack's recomputes_for_each_weight says, found by counting a layer's forwards."""
    backward = pytest.importorskip("torch.distributed.pipelining._backward")
    spec = dataclasses.replace(LLAMA, gated_mlp=gated)
    with torch.random.fork_rng():
        layer = Block(spec, "full")
    runs: list[int] = []
    layer.feed_forward_norm.register_forward_hook(lambda *_: runs.append(1))
    x = torch.randn(1, 4, spec.hidden, requires_grad=True)
    angles = rope_angles(torch.arange(4), spec.head_dim).float()
    out = layer(x, angles.cos(), angles.sin())
    assert len(runs) == 1
    _, groups = backward.stage_backward_input([out], [torch.ones_like(out)], [x], layer.parameters())
    assert len(runs) == 2
    backward.stage_backward_weight(layer.parameters(), groups)
    assert len(runs) == 2 + tensors
