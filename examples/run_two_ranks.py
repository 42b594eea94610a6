"""Run a plan on two real ranks of this machine, and compare the step with its prediction."""

import importlib.util
import json
import subprocess
import sys

PLAN = "dp=2,micro_batch=2"

if importlib.util.find_spec("torch") is None:
    sys.exit("running a plan needs PyTorch: pip install 'parsim[torch]'")

# Ranks are processes of their own, so a script starts them by the command and reads its document.
command = [sys.executable, "-m", "parsim", "run", PLAN, "--model", "tiny-llama-8l", "--device", "cpu"]
done = subprocess.run(
    [*command, "--steps", "5", "--json"], stdout=subprocess.PIPE, text=True, check=True
)
run = json.loads(done.stdout)
print(f"measured   {run['step_time_s']:.4f} s on {run['world_size']} ranks")
print(f"predicted  {run['predicted_s']:.4f} s, error {run['error']:+.1%}")
print(f"loss       {run['loss'][0]:.3f} to {run['loss'][-1]:.3f}")
