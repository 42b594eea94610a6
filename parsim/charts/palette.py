"""The colours of charts and reports, and what they stand for.

They stay apart for people with red- or green-blind eyes (tested with the matrices of Machado, Oliveira
and Fernandes 2009, doi:10.1109/TVCG.2009.113); most are from the sets of Okabe and Ito and of Paul Tol.
"""

COLORS = {
    "forward": "#0072B2",
    "backward": "#E69F00",
    "input_grad": "#C8431B",
    "weight_grad": "#009E73",
    "recompute": "#332288",
    "optimizer": "#661100",
    "tp": "#AA4499",
    "cp": "#DDCC77",
    "ep": "#88CCEE",
    "dp": "#117733",
    "pp_send": "#3C3C3C",
    "pp_recv": "#9A9A9A",
    "host": "#999933",
}
"""Colour by what the time is for: Span.kind, with pipeline transfers split by direction."""
OTHER_COLOR = "#C0A0D0"
"""For a kind of span that has no colour of its own."""
IDLE_COLOR = "#EBEBEB"
TEXT_COLOR = "#1A1A1A"
MUTED_COLOR = "#5A5A5A"
SERIES_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#332288", "#E69F00", "#56B4E9", "#000000")
"""For lines and points that stand for no kind of span."""
LABELS = {
    "input_grad": "input gradient",
    "weight_grad": "weight gradient",
    "tp": "tensor parallel",
    "cp": "context parallel",
    "ep": "expert parallel",
    "dp": "data parallel",
    "pp_send": "pipeline send",
    "pp_recv": "pipeline receive",
}
"""Words of the legend where they differ from the key of COLORS."""
