"""What Megatron-LM itself makes of arguments; JSON in, JSON out, run in Megatron-Core's Python.

In: a list of {"arguments", "world_size", "environment"}. Out: for each what was read back, or
{"error": …}. Parser and validation alone miss heads that tp does not divide and too many experts; the
config classes and the process groups, on a fake backend, see those.
"""

import json
import os
import sys


def groups(args):
    """Ranks of every group, as parallel_state lays them out."""
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"
    dense = RankGenerator(
        tp=args.tensor_model_parallel_size, ep=1, dp=args.data_parallel_size,
        pp=args.pipeline_model_parallel_size, cp=args.context_parallel_size, order=order,
    )  # fmt: skip
    return {name: dense.get_ranks(name) for name in ("tp", "cp", "dp", "pp")}


def stage_layers(config, args):
    """Layers of every stage, in order of stage."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    chunks = args.virtual_pipeline_model_parallel_size
    layers = []
    for chunk in range(chunks or 1):
        for rank in range(args.pipeline_model_parallel_size):
            parallel_state.set_pipeline_model_parallel_rank(rank)
            stage = chunk if chunks else None
            layers.append(get_num_layers_to_build(config, vp_stage=stage, pp_rank=rank))
    parallel_state.set_pipeline_model_parallel_rank(None)
    return layers


def check(case):
    """One case; what Megatron raises is its answer."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
    from megatron.training import arguments
    from megatron.training.argument_utils import core_transformer_config_from_args
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(case["environment"])
    os.environ.update(WORLD_SIZE=str(case["world_size"]), RANK="0", LOCAL_RANK="0")
    if "CUDA_DEVICE_MAX_CONNECTIONS" not in case["environment"]:
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    sys.argv = ["pretrain_gpt.py", *case["arguments"]]
    try:
        args = arguments.parse_args()
        arguments.validate_args(args, {})
        args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args)
        config = core_transformer_config_from_args(args)
        torch.distributed.init_process_group(
            "fake", store=FakeStore(), rank=0, world_size=case["world_size"]
        )
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
            create_gloo_process_groups=False,
        )
        plain = {
            key: value
            for key, value in {**vars(args), **vars(config)}.items()
            if isinstance(value, int | float | str | list | tuple | type(None))
        }
        return {
            "args": json.loads(json.dumps(plain, default=str)),
            "layers": stage_layers(config, args),
            "groups": groups(args) if case["world_size"] <= 64 else {},
            "optimizer_shards": torch.distributed.get_world_size(
                parallel_state.get_data_parallel_group(
                    with_context_parallel=True,
                    partial_data_parallel=args.num_distributed_optimizer_instances > 1,
                )
            ),
            "expert_data_parallel": parallel_state.get_expert_data_parallel_world_size(),
        }
    except SystemExit as error:
        return {"error": f"SystemExit: {error}"}
    except Exception as error:
        import traceback

        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def pretend_a_hopper():
    """Arguments are judged as on an H100 with Transformer Engine, of which there is neither here."""
    import torch
    from megatron.core import utils
    from packaging.version import Version

    utils.get_te_version = lambda: Version("2.14")
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.training import arguments

    rope_utils.fused_apply_rotary_pos_emb = rope_utils.fused_apply_rotary_pos_emb_thd = object()
    arguments.get_device_arch_version = lambda: 9


def main():
    """All cases in one process: importing Megatron takes longest."""
    import typing
    import warnings

    import triton_stand_in
    import typing_extensions

    warnings.simplefilter("ignore")
    triton_stand_in.install()
    typing.override = typing_extensions.override  # the wheel is for Python 3.12
    answers_go_to, sys.stdout = sys.stdout, sys.stderr
    pretend_a_hopper()
    answers = [check(case) for case in json.load(sys.stdin)]
    json.dump(answers, answers_go_to)


if __name__ == "__main__":
    main()
