"""What the Hub does not know, and a Hub that is out of reach."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import huggingface_hub
import pytest
from transformers import LlamaForCausalLM

import petune
from petune import PetuneError


class Hub(BaseHTTPRequestHandler):
    """A hub that knows no model."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def dead_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("load", [petune.from_pretrained, petune.load_tokenizer])
def test_a_name_that_the_hub_does_not_know_gets_near_misses(load):
    with pytest.raises(
        PetuneError,
        match=r"unknown model 'minilmm'\. Did you mean 'minilm'.*the Hub says: .*[Nn]ot [Ff]ound",
    ):
        load("minilmm")


@pytest.mark.usefixtures("dead_hub")
@pytest.mark.timeout(20)
def test_a_hub_out_of_reach_is_not_waited_for():
    with pytest.raises(
        PetuneError, match="It is no local folder, and the Hub says: Connect"
    ):
        petune.from_pretrained("someone/something")


@pytest.mark.usefixtures("dead_hub")
@pytest.mark.timeout(20)
def test_a_hub_out_of_reach_leaves_what_was_downloaded_before(saved, tmp_path):
    commit = "1" * 40
    home = tmp_path / "models--someone--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in saved.llama.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert (
        type(petune.from_pretrained("someone/tiny", cache_dir=str(tmp_path)))
        is LlamaForCausalLM
    )
