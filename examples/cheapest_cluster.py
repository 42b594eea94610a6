"""Which cluster trains Llama 3.1 8B on a trillion tokens for the least money within a month?"""

import parsim
from parsim.search.space import Constraints

found = parsim.capacity(
    model="llama-3.1-8b",
    hardware=["h100-sxm-80gb", "b200-sxm-180gb"],
    gpus=[64],
    tokens="1T",
    deadline_s=30 * 86_400,
    constraints=Constraints(schedule=("1f1b",)),
)
for option in found.options:
    days, usd = option.wall_s / 86_400, option.usd or float("nan")
    cluster = f"{option.case.gpus} × {option.case.hardware}"
    print(f"{cluster}: {days:.1f} days, {usd:,.0f} USD; {option.binds}")
for answer in found.answers["llama-3.1-8b"]:
    print(f"{answer.objective}: {answer.choice.case.hardware}; {answer.reason}")
