"""What would half the bandwidth between nodes cost this plan?"""

import parsim
from parsim.hardware import with_overrides

cluster = parsim.load_cluster("h100-sxm-80gb")
for bandwidth in ("400Gb/s", "200Gb/s", "100Gb/s"):
    prediction, _ = parsim.simulate(
        "dp=4,tp=8,pp=2,zero=1",
        model="llama-3.1-70b",
        hardware=with_overrides(cluster, inter_node=bandwidth),
        global_batch=64,
    )
    print(f"{bandwidth}  {prediction.step_time_s:.3f} s")
