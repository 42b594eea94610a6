"""What a person at a terminal sees: colour and tables there only, progress apart from the answer."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from parsim.cli.tables import split_columns

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PLAN = (
    "plan --model tiny-llama-8l --hardware h100-sxm-80gb --gpus 8 --global-batch 8 --budget-s 5 --top 6 "
    "--zero 0,1 --schedule 1f1b,interleaved"
)


def typed(command: str, *, columns: int, tty: tuple[str, ...]) -> dict[str, str]:
    """What a command writes to stdout and stderr; those named in `tty` are terminals of that width."""
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    ends = {name: pty.openpty() if name in tty else os.pipe() for name in ("stdout", "stderr")}
    for name in tty:
        fcntl.ioctl(ends[name][1], termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "parsim", "--no-config", *command.split()],
        stdin=subprocess.DEVNULL,
        stdout=ends["stdout"][1],
        stderr=ends["stderr"][1],
        env=environment | {"TERM": "xterm-256color"},
    ) as process:
        for _, child in ends.values():
            os.close(child)
        texts = {name: _read_all(parent) for name, (parent, _) in ends.items()}
    assert process.returncode == 0, texts
    return texts


def _read_all(descriptor: int) -> str:
    chunks = []
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # a terminal whose other end is closed
            chunk = b""
        if not chunk:
            os.close(descriptor)
            return b"".join(chunks).decode().replace("\r\n", "\n")
        chunks.append(chunk)


@pytest.mark.parametrize("columns", [80, 120])
def test_no_word_of_a_table_is_broken_on_a_terminal(columns: int) -> None:
    answer = typed("hardware", columns=columns, tty=("stdout", "stderr"))["stdout"]
    lines = ESCAPE.sub("", answer).splitlines()
    assert max(map(len, lines)) <= columns
    for word in ("h100-sxm-96gb-500w", "989.4 T bf16", "450.0 GB/s", "$13.00"):
        assert any(word in line for line in lines)
    assert "\x1b[1m" in answer


def test_colour_and_progress_are_for_terminals_only() -> None:
    piped = typed(PLAN, columns=80, tty=("stderr",))
    assert "\x1b" not in piped["stdout"]
    assert "replaying" not in piped["stdout"]
    assert ESCAPE.search(piped["stderr"]), "a live line of progress"
    row = next(line for line in piped["stdout"].splitlines() if line.startswith("1 "))
    assert "MiB" in row, "into a pipe a plan is one line"
    seen = typed(PLAN, columns=80, tty=("stdout",))
    assert "\x1b[1m" in seen["stdout"]
    assert "\x1b" not in seen["stderr"]
    tables = ESCAPE.sub("", seen["stdout"]).partition("rejected")[0].splitlines()
    assert max(map(len, tables[1:])) <= 80


def test_columns_go_on_below_beside_the_key() -> None:
    assert split_columns([5, 5, 5], 40) == [[0, 1, 2]]
    assert split_columns([10, 30, 30, 30], 80, keys=1) == [[0, 1, 2], [0, 3]]
    assert split_columns([10, 10, 30, 30], 60, keys=2) == [[0, 1, 2], [0, 1, 3]]
    assert split_columns([10, 300], 40) == [[0, 1]]
    assert split_columns([10, 40, 300], 60) == [[0, 1], [0, 2]]
    assert split_columns([10, 30, 30, 5], 74) == [[0, 1, 2], [0, 3]]
    assert split_columns([10, 30, 30, 5], 73) == [[0, 1], [0, 2, 3]]
