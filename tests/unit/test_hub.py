"""hf:org/name through the real huggingface_hub, from a Hub of our own on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from parsim.errors import ParsimError
from parsim.importers.hub import hub_config

CONFIGS = json.loads((Path(__file__).parent / "huggingface_configs.json").read_text())
QWEN = json.dumps(CONFIGS["qwen3-8b"]["config"]).encode()
ERRORS = {"gone": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "empty": (404, "EntryNotFound")}


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for a file of a repository: headers that the library asks for."""

    def do_HEAD(self) -> None:
        """What the file is."""
        repository = self.path.split("/")[2]
        status, code = ERRORS.get(repository, (200, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
        else:
            self.send_header("ETag", '"0123456789abcdef"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(QWEN)))
        self.end_headers()

    def do_GET(self) -> None:
        """The file."""
        self.do_HEAD()
        if self.path.split("/")[2] not in ERRORS:
            self.wfile.write(QWEN)

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def models(name: str, endpoint: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """`parsim models NAME --json`; the library reads its endpoint when it is imported."""
    pytest.importorskip("huggingface_hub", reason="pip install 'parsim[hf]'")
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    environment = {k: v for k, v in environment.items() if "proxy" not in k.lower()}
    return subprocess.run(
        [sys.executable, "-m", "parsim", "models", name, "--json"],
        capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip


def test_a_model_is_fetched_once_and_then_read_from_the_cache(endpoint: str, tmp_path: Path) -> None:
    done = models("hf:Qwen/Qwen3-8.2B", endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    assert model["name"] == "Qwen3-8.2B"
    assert model["parameters"] == CONFIGS["qwen3-8b"]["parameters"]
    offline = models("hf:Qwen/Qwen3-8.2B", "http://127.0.0.1:9", tmp_path)
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout) == json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "message"),
    [("hf:acme/gone", "no such model"), ("hf:acme/gated", "accepted users"),
     ("hf:acme/empty", "no config.json")],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_clear_message(
    name: str, message: str, endpoint: str, tmp_path: Path
) -> None:
    done = models(name, endpoint, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network_the_file_is_asked_for(tmp_path: Path) -> None:
    done = models("hf:acme/other", "http://127.0.0.1:9", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot reach the Hub" in done.stderr
    assert "config.json" in done.stderr


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:../../etc/passwd", "hf:a/b/c", "hf:org/na me", "hf:org/..", "hf:-x/y", "hf:o/n@",
     "hf:o/n..x", "hf:o/n\n", "hf:https://x/y", "hf:o/" + "n" * 97],
)  # fmt: skip
def test_what_is_no_name_never_reaches_the_library(name: str) -> None:
    with pytest.raises(ParsimError, match="no name of a repository"):
        hub_config(name)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ParsimError, match="need huggingface_hub") as caught:
        hub_config("hf:Qwen/Qwen3-8B")
    assert "parsim[hf]" in str(caught.value.hint)
