"""Draw the step of one plan under two schedules: where does the pipeline wait?"""

import sys
from pathlib import Path

import parsim
from parsim.charts.gantt import draw_gantt

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
for schedule in ("1f1b", "zb-h1"):
    prediction, timeline = parsim.simulate(
        f"dp=2,tp=8,pp=4,zero=1,schedule={schedule}",
        model="llama-3.1-70b",
        hardware="h100-sxm-80gb",
        global_batch=16,
    )
    picture = folder / f"{schedule}.png"
    draw_gantt(timeline, picture)
    bubble = prediction.breakdown_s["bubble"] / prediction.step_time_s
    print(f"{prediction.step_time_s:.3f} s  bubble {bubble:.1%}  {picture}")
