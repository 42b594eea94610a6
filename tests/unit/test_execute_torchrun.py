"""What is started: torchrun's arguments and environment, on one machine and on several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from parsim.cli.main import app
from parsim.errors import ParsimError
from parsim.execute.launch.torchrun import Nodes, command, device_of, variables

TWO = {"count": 2, "endpoint": "node0:29500"}


def test_ranks_are_dealt_out_machine_by_machine() -> None:
    nodes = [Nodes(index=i, **TWO) for i in (0, 1)]  # type: ignore[arg-type]
    assert [list(n.ranks(8)) for n in nodes] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [device_of(r, nodes[0], 8, "cuda") for r in (0, 3, 4, 7)] == [
        "cuda:0", "cuda:3", "cuda:0", "cuda:3"
    ]  # fmt: skip
    with pytest.raises(ParsimError, match="same number of ranks"):
        nodes[0].ranks(7)


def test_torch_reads_the_arguments_as_they_are_meant() -> None:
    run = pytest.importorskip("torch.distributed.run")
    given = command(Nodes(index=1, **TWO), 8, "/folder")  # type: ignore[arg-type]
    assert given[1:3] == ["-m", "torch.distributed.run"]
    read = run.parse_args(given[3:])
    assert (read.nnodes, read.nproc_per_node, read.node_rank) == ("2", "4", 1)
    assert (read.rdzv_backend, read.master_addr, read.master_port) == ("static", "node0", 29500)
    assert (read.max_restarts, read.module) == (0, True)
    assert read.training_script == "parsim.execute.launch.worker"
    assert read.training_script_args == ["/folder"]
    alone = run.parse_args(command(Nodes(), 8, "/folder")[3:])
    assert (alone.rdzv_backend, alone.rdzv_endpoint, alone.local_addr) == (
        "c10d", "127.0.0.1:0", "127.0.0.1"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"count": 2, "index": 2, "endpoint": "a:1"}, "--node-rank"),
        ({"index": 1}, "--node-rank"),
        ({"count": 2}, "--rdzv-endpoint"),
        ({"count": 2, "endpoint": "node0"}, "--rdzv-endpoint"),
        ({"count": 2, "endpoint": "node0:99999"}, "--rdzv-endpoint"),
        ({"count": 2, "endpoint": "node0:0"}, "--rdzv-endpoint"),
        ({"count": 2, "endpoint": "a b:1"}, "--rdzv-endpoint"),
    ],
)
def test_a_place_or_a_number_that_cannot_be_is_refused(fields: dict[str, object], where: str) -> None:
    with pytest.raises(ParsimError) as caught:
        Nodes(**fields)  # type: ignore[arg-type]
    assert caught.value.where == where


def test_ipv6_and_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert Nodes(count=2, endpoint="[fe80::1]:29500").host == "fe80::1"
    assert variables(Nodes(), "cpu")["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in variables(Nodes(**TWO), "cuda")  # type: ignore[arg-type]
    assert variables(Nodes(), "cpu")["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in variables(Nodes(), "cuda")


def test_a_dry_run_starts_nothing_and_shows_every_rank(tmp_path: Path) -> None:
    arguments = [
        "run", "dp=4,tp=8,pp=2", "--model", "llama-3.1-8b", "--hardware", "h100-sxm-80gb",
        "--device", "cuda", "--nnodes", "8", "--node-rank", "2", "--rdzv-endpoint", "node0:29500",
        "--checkpoint", str(tmp_path / "checkpoints"), "--dry-run",
    ]  # fmt: skip
    shown = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["dry_run"]
    assert shown["command"][-2:] == ["parsim.execute.launch.worker", shown["files"]["request"][:-13]]
    assert len(shown["ranks"]) == 64
    assert shown["ranks"][43] == {
        "rank": 43, "node": 5, "device": "cuda:3", "pp": 1, "dp": 1, "cp": 0, "tp": 3, "stages": [1]
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    text = CliRunner().invoke(app, arguments).stdout
    assert "--master-addr=node0 --master-port=29500" in text
    assert "64 ranks on 8 machines, 8 each; this is machine 2; nccl" in text


def test_a_dry_run_shows_which_part_of_the_sequences_a_rank_has() -> None:
    command = ["run", "dp=2,cp=2", "--model", "tiny-llama-8l", "--device", "cpu", "--dry-run"]
    lines = CliRunner().invoke(app, command).stdout.splitlines()
    found = [line.split("dp ")[1].split("  ")[:2] for line in lines if "  dp " in line]
    assert found == [["0", "cp 0"], ["0", "cp 1"], ["1", "cp 0"], ["1", "cp 1"]]
