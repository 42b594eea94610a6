"""Which split is best for Llama 3.1 70B on 64 H100s?"""

import parsim

result = parsim.plan(
    model="llama-3.1-70b", hardware="h100-sxm-80gb", gpus=64, global_batch=256, top=3, budget_s=10
)
for each in result.plans:
    print(f"{each.step_time_s:6.2f} s  MFU {each.mfu:.1%}  {each.plan.short()}")
