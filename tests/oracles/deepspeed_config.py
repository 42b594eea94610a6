"""What DeepSpeed itself makes of configurations; JSON in, JSON out, run in DeepSpeed's Python.

In: a list of {"config", "dp"}. Out: for each what was read back, or {"error": …}. Keys that DeepSpeed
does not know at the top level are ignored by it: they are answered as "unknown".
"""

import json
import os
import sys


class Mesh:
    """Says how many replicas there are, as Megatron's mpu does; else DeepSpeed takes all ranks."""

    def __init__(self, dp):
        self.dp = dp

    def get_data_parallel_world_size(self):
        """Replicas."""
        return self.dp

    def get_model_parallel_world_size(self):
        """Not asked for by the config."""
        return 1


def known_keys():
    """Every top-level key that DeepSpeed's readers ask for: the strings among its constants."""
    from deepspeed.module_inject import auto_ep_config
    from deepspeed.runtime import config, constants
    from deepspeed.runtime.tensor_parallel import config as tensor_parallel
    from deepspeed.runtime.zero import config as zero

    modules = (config, constants, tensor_parallel, zero, auto_ep_config)
    values = {v for m in modules for k, v in vars(m).items() if k.isupper() and isinstance(v, str)}
    return values | {"pipeline", "tensor_parallel"}  # their readers name these in place


def check(case):
    """One case; what DeepSpeed raises is its answer."""
    from deepspeed.runtime import config as module

    try:
        config = module.DeepSpeedConfig(case["config"], mpu=Mesh(case["dp"]))
        zero = config.zero_config
        return {
            "train_batch_size": config.train_batch_size,
            "micro_batch": config.train_micro_batch_size_per_gpu,
            "accumulation": config.gradient_accumulation_steps,
            "zero": int(zero.stage),
            "overlap": zero.overlap_comm,
            "bucket": zero.reduce_bucket_size,
            "bf16": config.bfloat16_config.enabled,
            "fp16": config.float16_config.enabled,
            "grad_accum_dtype": config.grad_accum_dtype,
            "communication": str(config.communication_data_type),
            "optimizer": config.optimizer_name,
            "tp": config.tensor_parallel_config.autotp_size,
            "ep": config.expert_parallel_config.autoep_size
            if config.expert_parallel_config.enabled
            else 1,
            "expert_tp": config.expert_parallel_config.expert_tensor_parallel_size,
            "stages": config.pipeline["stages"],
            "recompute_every": config.pipeline["activation_checkpoint_interval"],
            "unknown": sorted(set(case["config"]) - known_keys()),
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main():
    """All cases in one process: importing DeepSpeed takes longest."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    answers_go_to, sys.stdout = sys.stdout, sys.stderr
    import deepspeed.runtime.config as module

    module.dist.get_rank = lambda *args, **kwargs: 0
    answers = [check(case) for case in json.load(sys.stdin)]
    json.dump(answers, answers_go_to)


if __name__ == "__main__":
    main()
