"""What torchtitan itself makes of exported modules; JSON in, JSON out, run in torchtitan's Python.

In: {"folder": where the modules lie, "cases": [{"module", "world_size", "build"}]}. Out: for each case
what was read back, or {"error": …}. With `build` one rank's part is built as the trainer builds it
(pipeline stages, tensor parallelism, checkpointing, FSDP, the schedule) on a fake process group.
"""

import importlib
import json
import os
import sys


def read(case):
    """The config as torchtitan's own parser and classes take it."""
    from torch.distributed.pipelining.schedules import get_schedule_class
    from torchtitan.config import ConfigManager
    from torchtitan.distributed import ParallelDims

    importlib.import_module(case["module"])  # torchtitan does not say why an import fails
    config = ConfigManager().parse_args(["--module", case["module"], "--config", "train"])
    parallelism, training = config.parallelism, config.training
    dims = ParallelDims.from_config(parallelism, case["world_size"])
    config.model_spec.model.update_from_config(config=config)
    checkpointing = config.activation_checkpoint
    answer = {
        "dp_replicate": dims.dp_replicate,
        "dp_shard": dims.dp_shard,
        "cp": dims.cp,
        "tp": dims.tp,
        "pp": dims.pp,
        "ep": dims.ep,
        "sequence_parallel": parallelism.enable_sequence_parallel,
        "reshard": parallelism.fsdp_reshard_after_forward,
        "micro_batch": (
            parallelism.pipeline_parallel_microbatch_size if dims.pp > 1 else training.local_batch_size
        ),
        "local_batch": training.local_batch_size,
        "global_batch": training.global_batch_size,
        "seq_len": training.seq_len,
        "schedule": get_schedule_class(parallelism.pipeline_parallel_schedule).__name__,
        "stages": [
            sum(name.startswith("layers.") for name in part)
            for part in parallelism.module_fqns_per_model_part or []
        ],
        "csv": bool(parallelism.pipeline_parallel_schedule_csv),
        "checkpointing": type(checkpointing).__qualname__.split(".")[0] if checkpointing else "none",
        "async_tp": config.compile.enable_async_tensor_parallel,
        "param_dtype": training.mixed_precision_param,
        "linears": sorted({type(c).__qualname__ for c in linears(config)}),
        "optimizer": config.optimizer.param_groups[0].optimizer_name,
    }
    return config, dims, answer


def linears(config):
    """Configs of the matrix products of the first layer's feed-forward."""
    layer = config.model_spec.model.layers[0]
    part = layer.feed_forward
    return [] if part is None else [part.w1, part.w2, part.w3]


def parameters(config):
    """Parameters of the model as torchtitan builds it, tied ones once."""
    import torch

    with torch.device("meta"):
        model = config.model_spec.model.build()
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def build(config, dims):
    """One rank's part, as Trainer.__init__ has it, without weights."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torchtitan.distributed import utils

    # The default backend wants a newer torch than the one that comes with this release's wheel.
    config.parallelism.spmd_backend = dims.spmd_backend = "partial_dtensor"
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=dims.world_size)
    try:
        dims.build_mesh()
        utils.set_spmd_backend(config.parallelism.spmd_backend)
        spec = config.model_spec
        with torch.device("meta"):
            model = spec.model.build()
        shared = {
            "parallel_dims": dims,
            "training": config.training,
            "parallelism": config.parallelism,
            "compile_config": config.compile,
            "ac_config": config.activation_checkpoint,
            "dump_folder": "",
        }
        if dims.pp == 1:
            spec.parallelize_fn(model, **shared)
            return {"built": [len(model.layers)]}
        schedule, parts, _, _ = spec.pipelining_fn(
            model, device=torch.device("cpu"), model_config=spec.model,
            parallelize_fn=spec.parallelize_fn, loss_fn=lambda *args: None, **shared,
        )  # fmt: skip
        order = getattr(schedule, "pipeline_order", None) or {}
        return {
            "built": [len(part.layers) for part in parts],
            "micro_batches": schedule._n_microbatches,
            "class": type(schedule).__name__,
            "actions": [[str(a) for a in order[r] if a is not None] for r in sorted(order)],
        }
    finally:
        torch.distributed.destroy_process_group()


def check(case):
    """One case; what torchtitan raises is its answer."""
    try:
        config, dims, answer = read(case)
        answer["parameters"] = parameters(config)
        return answer | (build(config, dims) if case["build"] else {})
    except BaseException as error:
        import traceback

        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def main():
    """All cases in one process: importing torchtitan takes longest."""
    import torch
    import triton_stand_in

    triton_stand_in.install()
    from torchtitan.tools import utils

    # Read by value when others are imported; fp8 asks for a GPU when a config is made.
    utils.device_type, utils.device_module = "cpu", torch.cpu
    utils.has_cuda_capability = lambda *version: True
    asked = json.load(sys.stdin)
    sys.path.insert(0, asked["folder"])
    answers_go_to, sys.stdout = sys.stdout, sys.stderr  # torchtitan logs to stdout
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="1")
    answers = [check(case) for case in asked["cases"]]
    json.dump(answers, answers_go_to)


if __name__ == "__main__":
    main()
