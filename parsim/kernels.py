"""Constants of the kernel models: what a device really reaches, beyond its data sheet.

Two kinds of each kernel stand side by side. A *fit* is a compact physical form whose constants were
fitted to published measurements (docs/kernels.md); a *measured* table holds what `parsim calibrate`
timed on one machine and is interpolated. Where both are given the machine's own table wins; where
neither is, parsim.cost falls back to a roofline with a stated efficiency. Efficiencies are shares of the
data sheet's figures, so that a fit holds for a relative of the device it was made for. Standard library
only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from parsim.errors import ParsimError

HOST_MODES = (
    *("plain", "recompute selective", "recompute full"),
    *("tensor parallel", "sequence parallel", "zero 2", "zero 3"),
)
"""How a model is split or recomputed, as far as the host's work depends on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """What a fitted form leaves over at the shapes that were measured: the library's own choices.

    Near a measured (row, column) the form's time is multiplied by 1 + percent/100, read between the
    knots over the log of the third size; away from them it is left alone.
    """

    rows: tuple[int, ...]
    """m of a GEMM, query heads of attention; ascending."""
    columns: tuple[int, ...]
    """n of a GEMM, key/value heads of attention; ascending."""
    knots: tuple[int, ...]
    """k of a GEMM, sequence length of attention; ascending."""
    percent: tuple[tuple[tuple[int, ...], ...], ...]
    """[row][column][knot], each between -60 and 150."""

    def __post_init__(self) -> None:
        for key in ("rows", "columns", "knots"):
            sizes = getattr(self, key)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ParsimError("sizes must ascend from 1 or more", where=key, got=sizes)
        expected = (len(self.rows), len(self.columns), len(self.knots))
        found = {(len(self.percent), len(row), len(cell)) for row in self.percent for cell in row}
        if found != {expected}:
            raise ParsimError(
                "the table's shape is wrong", where="percent", got=found, expected=f"{expected}"
            )
        if not all(-60 <= p <= 150 for row in self.percent for cell in row for p in cell):
            raise ParsimError("a residual lies between -60 and 150 percent", where="percent")


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmFit:
    """Constants of parsim.cost.gemm for one dtype of one device."""

    dtype: str
    tiles: tuple[tuple[int, int, float], ...]
    """(rows, columns, share of an SM's peak) of the library's tile shapes; both ways round."""
    launch_s: float
    """Time of the smallest GEMM: launch, prologue and epilogue."""
    ramp_k: float
    """Each tile costs as much as this many more steps of k: filling the pipeline, storing the tile."""
    split_k: float
    """The same for each part of a tile where SMs share its k: the partial sums' way through L2."""
    wave_quantisation: float
    """1: the last wave of tiles costs a full wave; 0: only its share, as over a mix of tile shapes."""
    memory_efficiency: float
    """Share of the memory bandwidth that tiles stream at."""
    overlap_exponent: float
    """p of (compute^p + memory^p)^(1/p): large where one hides behind the other."""
    droop: float
    """A kernel of many seconds runs slower by this share: the clock yields to the power limit."""
    droop_s: float
    """Length of a kernel that sees half of it."""
    quantize_bytes: float = 0.0
    """Memory traffic, bytes per value of A, of casting A to this dtype before the product."""
    quantize_unaligned: float = 0.0
    """This share more of it where m is no multiple of 16 and A is padded first."""
    layout_slowdown: dict[str, float] = field(default_factory=dict)
    """Time by layout over the same product in layout TN: NN, and NT that adds to an fp32 result."""
    residuals: Residuals | None = None
    source: str
    date: str
    fitted_to: str
    """Rows that the constants were fitted to, and the error on rows that were not used."""

    def __post_init__(self) -> None:
        _check_shares(self, "wave_quantisation")
        _check_not_negative(
            self,
            "launch_s",
            "ramp_k",
            "split_k",
            "droop",
            "droop_s",
            "quantize_bytes",
            "quantize_unaligned",
        )
        _check_efficiencies(self, "memory_efficiency")
        if not 1 <= self.overlap_exponent <= 64:
            raise ParsimError(
                "below 1 both would take longer than one after the other",
                where="overlap_exponent",
                got=self.overlap_exponent,
                expected="1 to 64",
            )
        for tile in self.tiles:
            if tile[0] < 1 or tile[1] < 1 or not 0 < tile[2] <= 1:
                raise ParsimError(
                    "a tile has two sizes and a share of the peak", where="tiles", got=tile
                )
        if not self.tiles:
            raise ParsimError("a GEMM needs at least one tile shape", where="tiles")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFit:
    """Constants of parsim.cost.attention for one head dimension of one device."""

    dtype: str
    head_dim: int
    flash: bool = True
    """False: the frameworks fall back to a slower kernel here, which training would not use."""
    launch_s: float
    efficiency: float
    """Share of the peak that full tiles reach."""
    tail: float
    """Share of the longest block's time that is not covered by other blocks."""
    query_traffic: float
    """Memory traffic of the serving op over the bytes of queries and output: RoPE and copies added."""
    kv_traffic: float
    """The same over the bytes of keys and values: the KV cache's writes and reads added."""
    residuals: Residuals | None = None
    source: str
    date: str
    fitted_to: str

    def __post_init__(self) -> None:
        _check_efficiencies(self, "efficiency")
        _check_not_negative(self, "launch_s", "tail", "query_traffic", "kv_traffic")
        if self.head_dim < 1:
            raise ParsimError("a size must be positive", where="head_dim", got=self.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBoundFit:
    """A kernel that moves bytes through device memory: launch_s + bytes / (efficiency · bandwidth)."""

    launch_s: float
    efficiency: float
    source: str
    date: str
    fitted_to: str

    def __post_init__(self) -> None:
        _check_efficiencies(self, "efficiency")
        _check_not_negative(self, "launch_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """One way a library moves a message: (latency^p + (bytes on the wire / bandwidth)^p)^(1/p)."""

    latency_s: float
    bus_efficiency: float
    """Bus bandwidth of long messages over the link's; above 1 where the switch does the adding."""
    exponent: float
    """p: 1 is the α-β model, 1/2 a pipeline whose chunks are cut best, above 1 latency is hidden."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "latency_s")
        for key, least in (("bus_efficiency", 1e-6), ("exponent", 0.01)):
            if not least <= getattr(self, key) <= 10:
                raise ParsimError("this lies above 0 and up to 10", where=key, got=getattr(self, key))


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveFit:
    """Constants of parsim.cost.collective for one kind and group size inside a scale-up domain."""

    kind: str
    gpus: int
    tiny_bytes: float = 0.0
    """Below this the library takes `tiny`, where it has three protocols."""
    tiny: Protocol | None = None
    switch_bytes: float = 0.0
    """The library takes `short` below and `long` from here on."""
    short: Protocol | None = None
    long: Protocol
    source: str
    date: str
    fitted_to: str

    def __post_init__(self) -> None:
        _check_not_negative(self, "tiny_bytes", "switch_bytes")
        if self.gpus < 2:
            raise ParsimError("a collective needs two ranks", where="gpus", got=self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGemm:
    """Times of bare GEMMs C[m,n] = A[m,k] B[k,n] of one dtype and layout, timed on this machine."""

    dtype: str
    layout: str = "TN"
    """TN: forward, NN: gradient of the input, NT: gradient of the weight."""
    points: tuple[tuple[int, int, int, float], ...]
    """(m, n, k, seconds)."""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _check_points(self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredAttention:
    """Times of the fused attention kernel, forward or backward, timed on this machine."""

    dtype: str
    backward: bool = False
    causal: bool = True
    points: tuple[tuple[int, int, int, int, int, float], ...]
    """(batch, seq_len, heads, kv_heads, head_dim, seconds)."""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _check_points(self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMemoryBound:
    """Times of a kernel that does nothing but move memory, timed on this machine."""

    points: tuple[tuple[float, float], ...]
    """(bytes read and written, seconds)."""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _check_points(self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCollective:
    """Times of one collective over one group size, timed on this machine."""

    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or send_recv."""
    gpus: int
    """Ranks in the group (2 for send_recv)."""
    points: tuple[tuple[float, float], ...]
    """(bytes of the full buffer as nccl-tests counts them, seconds)."""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _check_points(self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredOptimizer:
    """Times of one optimizer step of parsim's executor, timed on this machine."""

    optimizer: str
    """adamw."""
    points: tuple[tuple[float, float], ...]
    """(parameters of a rank, seconds)."""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _check_points(self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMode:
    """Host time of parsim's executor with one way of splitting or recomputing a model."""

    mode: str
    """One of HOST_MODES."""
    layer_forward_s: float
    layer_backward_s: float
    """With what it recomputes."""
    ends_forward_s: float = 0.0
    """Embedding, final norm, head and loss together."""
    ends_backward_s: float = 0.0
    layer_step_s: float = 0.0
    """What each layer adds to a step outside its passes: flattened gradients, an update's tensors."""
    step_s: float = 0.0
    """The rest of a step outside passes."""

    def __post_init__(self) -> None:
        if self.mode not in HOST_MODES:
            raise ParsimError(
                "unknown mode", where="mode", got=self.mode, expected=", ".join(HOST_MODES)
            )
        _check_points(((self.layer_forward_s, self.layer_backward_s),))
        _check_not_negative(self, "ends_forward_s", "ends_backward_s", "layer_step_s", "step_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostExperts:
    """Host time of a layer with experts in parsim's executor, which runs one expert after the other."""

    layer_forward_s: float
    """Of the layer without its experts: attention, router, permutations of tokens."""
    layer_backward_s: float
    expert_forward_s: float
    """Of each expert on the rank, routed or shared."""
    expert_backward_s: float

    def __post_init__(self) -> None:
        _check_not_negative(self, *self.__slots__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredHost:
    """Time that eager PyTorch itself takes on this machine's host, at sizes where kernels take none.

    On a GPU it runs beside the kernels; where the device is a core of the host it adds to them.
    """

    op_s: float
    """One operation without autograd."""
    layer_forward_s: float
    """One layer of parsim's executor (RMSNorm, rotary positions, SwiGLU)."""
    layer_backward_s: float
    modes: tuple[HostMode, ...] = ()
    """Without them the stack's own constants stand for what else the host does."""
    action_s: float = 0.0
    """torch's pipeline runtime around every action."""
    wait_s: float = 0.0
    """What a collective among layers takes between real ranks beyond the host's part and its own time
    when nothing else runs: waking threads, and waiting for the rank that comes last."""
    split_s: float = 0.0
    """What a layer's backward takes more where the gradients of input and weights run apart."""
    split_walk_s: float = 0.0
    """On top, for each pair of layers of a stage: the gradient of every tensor of weights is a walk of
    its own over the graph of all layers before."""
    experts: HostExperts | None = None
    """Without it a layer with experts takes what a dense one does."""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        _check_points(((self.op_s, self.layer_forward_s, self.layer_backward_s),))
        _check_not_negative(self, "action_s", "wait_s", "split_s", "split_walk_s")
        missing = set(HOST_MODES) - {mode.mode for mode in self.modes}
        if self.modes and (missing or len(self.modes) > len(HOST_MODES)):
            raise ParsimError(
                "either none of the modes is measured or all are, once each",
                where="modes",
                got=[mode.mode for mode in self.modes],
                expected=", ".join(HOST_MODES),
            )

    def mode(self, name: str) -> HostMode | None:
        """What was measured with a mode, if modes were."""
        return next((mode for mode in self.modes if mode.mode == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Fitted or measured behaviour of one device's kernels and collectives."""

    relative: str = ""
    """The profile that these constants were taken over from, where this device was not measured."""
    gemm: tuple[GemmFit, ...] = ()
    attention: tuple[AttentionFit, ...] = ()
    memory_bound: MemoryBoundFit | None = None
    collective: tuple[CollectiveFit, ...] = ()
    measured_gemm: tuple[MeasuredGemm, ...] = ()
    measured_attention: tuple[MeasuredAttention, ...] = ()
    measured_memory_bound: MeasuredMemoryBound | None = None
    measured_collective: tuple[MeasuredCollective, ...] = ()
    measured_optimizer: MeasuredOptimizer | None = None
    measured_host: MeasuredHost | None = None


def _check_shares(owner: object, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(owner, key) <= 1:
            raise ParsimError("a share lies between 0 and 1", where=key, got=getattr(owner, key))


def _check_efficiencies(owner: object, *keys: str) -> None:
    for key in keys:
        if not 1e-6 <= getattr(owner, key) <= 1:
            raise ParsimError(
                "an efficiency lies above 0 and up to 1",
                where=key,
                got=getattr(owner, key),
            )


def _check_not_negative(owner: object, *keys: str) -> None:
    for key in keys:
        if getattr(owner, key) < 0:
            raise ParsimError("this cannot be negative", where=key, got=getattr(owner, key))


def _check_points(points: tuple[tuple[float, ...], ...]) -> None:
    if not points:
        raise ParsimError("a measured table needs at least one point", where="points")
    for point in points:
        if not all(value > 0 for value in point):
            raise ParsimError("sizes and times are greater than zero", where="points", got=point)
