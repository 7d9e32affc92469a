"""What leaves a run: the model card, an upload that needs a word, and what doctor says of the machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

import pytest
import timm
import torch
import yaml

import vitrim
from vitrim.cli.app import run
from vitrim.errors import CheckpointError, OutputError, RecipeError, VitrimError
from vitrim.machine import doctor
from vitrim.output.hub import push

DIGITS = str(files("vitrim") / "assets" / "digits-vit")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A small run without images."""
    out = tmp_path_factory.mktemp("share") / "small"
    vitrim.compress(DIGITS, method="magnitude", mlp_ratio=1, out=out, quiet=True)
    return out


def card_of(folder):
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_was_cut_and_carries_the_licence_over(output):
    head, body = card_of(output)
    assert head["license"] == "apache-2.0" and head["library_name"] == "timm" and "base_model" not in head
    assert "683,242 parameters became 349,738 (-49%) by `magnitude`" in body
    assert "384 became 96" in body and "was not measured" in body and "carried over from the original" in body


def test_the_code_in_the_card_loads_the_model(output):
    _, body = card_of(output)
    code = body.split("```python\n")[1].split("```")[0].replace("FOLDER", str(output))
    found = {}
    exec(code, found)
    assert sum(p.numel() for p in found["model"].parameters()) == 349_738


def test_a_licence_that_is_not_known_is_not_guessed(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    model.pretrained_cfg = {**model.pretrained_cfg, "license": None}
    vitrim.compress(model, method="random", mlp_ratio=1, out=tmp_path / "small", quiet=True)
    head, body = card_of(tmp_path / "small")
    assert head["license"] == "other" and "look it up" in body


def test_a_result_that_is_cut_again_keeps_the_licence_of_its_card(output, tmp_path):
    vitrim.compress(str(output), method="magnitude", mlp_ratio=0.5, out=tmp_path / "again", quiet=True)
    assert card_of(tmp_path / "again")[0]["license"] == "apache-2.0"


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that takes everything, and what was sent to it."""
    sent = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            sent.append((self.path, body))
            if self.path.startswith("/api/repos/create") and "refused" in body:
                return self.answer(403, {"error": "no rights"})
            if self.path.startswith("/api/repos/create"):
                return self.answer(200, {"url": f"{url}/me/small"})
            if "/preupload/" in self.path:
                found = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                return self.answer(200, {"files": found})
            return self.answer(200, {"commitUrl": f"{url}/me/small/commit/1", "commitOid": "1", "success": True})

        def do_GET(self):
            self.answer(404, {"error": "no such repository"})

        def answer(self, status, value):
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield sent
    server.shutdown()
    server.server_close()


def test_nothing_is_sent_without_a_word(output, hub, capsys):
    found = push(output, "me/small", confirm=False)
    assert found.url is None and {"README.md", "model.safetensors", "vitrim.json"} <= found.files.keys()
    assert run(["push", str(output), "me/small"]) == 0 and "Nothing was sent" in capsys.readouterr().out
    assert hub == []


def test_with_a_word_all_files_go_into_a_private_repository(output, hub, capsys):
    assert run(["push", str(output), "me/small", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"].endswith("/me/small/commit/1")
    created = next(json.loads(body) for path, body in hub if path.startswith("/api/repos/create"))
    assert created["name"] == "small" and created["organization"] == "me"
    assert "private" in (created.get("visibility"), *(["private"] if created.get("private") else []))
    commit = next(body for path, body in hub if "/commit/" in path)
    files_sent = {json.loads(line)["value"].get("path") for line in commit.splitlines()} - {None}
    assert files_sent == {path.name for path in output.iterdir() if path.is_file()}


def test_pushing_what_can_t_be_pushed_is_one_line(output, hub, tmp_path):
    for folder, repo, kind, said in (
        (tmp_path, "me/small", CheckpointError, "pass a folder that vitrim wrote"),
        (output, "small", RecipeError, "give ORG/NAME"),
        (output, "me/../small", RecipeError, "no name on the hub"),
        (output, "me/refused", OutputError, "the hub did not take it"),
    ):
        with pytest.raises(kind, match=said) as caught:
            push(folder, repo, confirm=True)
        assert isinstance(caught.value, VitrimError) and "\n" not in str(caught.value)


def test_doctor_says_what_there_is(capsys, tmp_path):
    assert run(["doctor"]) == 0
    assert f"torch   │ {torch.__version__.split('+')[0]}" in capsys.readouterr().out
    found = doctor(tmp_path)
    assert found["device"] in found["devices"] and found["extras"]["hf"]["transformers"]
    assert {"hf", "clip", "adapters", "shards", "export"} <= found["extras"].keys() and "test" not in found["extras"]
    assert found["memory"] > 2**20 and found["disk"] > 2**20


def test_doctor_says_what_would_get_in_the_way(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("os.cpu_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    said = " ".join(doctor(tmp_path)["problems"])
    assert "can't be written to" in said and "set OMP_NUM_THREADS" in said
