"""`cca-export --push_to_hub`, by huggingface_hub itself, to a server of this test's own."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cca_ds import export
from tests.support.trained_run import trained_run


class Hub(BaseHTTPRequestHandler):
    """The calls of an upload without large-file storage."""

    def log_message(self, *arguments):
        """Nothing on the console."""

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        server.seen.append((self.path, self.headers.get("Authorization"), body))
        if server.status != 200:
            return self.answer(server.status, {"error": "no"})
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"{server.address}/me/model", "name": "me/model"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{server.address}/me/model/commit/{'0' * 40}"
            return self.answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})
        return self.answer(404, {"error": self.path})

    def do_GET(self):
        self.answer(404, {"error": self.path})

    def answer(self, status, tree):
        content = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.files, server.status = [], {}, 200
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    from huggingface_hub import constants

    for name, value in (("ENDPOINT", server.address), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def push(tmp_path, capsys, name="me/model"):
    output = tmp_path / "out" / "model.safetensors"
    code = export.main(["--run", str(trained_run()), "--output", str(output), "--push_to_hub", name])
    shown = capsys.readouterr()
    return code, shown.out, shown.err.strip().splitlines()[-1:], output.parent


def test_weights_card_and_config_in_one_commit(hub, tmp_path, capsys):
    code, shown, error, folder = push(tmp_path, capsys)
    assert code == 0, error
    assert f"pushed to {hub.address}/me/model: model.safetensors, README.md, config.json" in shown
    assert set(hub.files) == {"model.safetensors", "README.md", "config.json"}
    for name, content in hub.files.items():
        assert content == (folder / name).read_bytes()
    created = json.loads(next(body for path, _, body in hub.seen if path == "/api/repos/create"))
    assert created.get("private") is True or created.get("visibility") == "private"
    assert {token for _, token, _ in hub.seen} == {"Bearer hf_test"}
    config = json.loads(hub.files["config.json"])
    assert (config["model_type"], config["num_classes"], config["preset"]) == ("llamagen", 10, "digits")
    card = hub.files["README.md"].decode()
    assert 'cca_ds.load("model.safetensors"' in card and "base_model: digits_base.safetensors" in card


@pytest.mark.parametrize(("status", "reason"), [(401, "token is not valid"), (403, "may not write"), (500, "500")])
def test_what_the_hub_refuses_is_one_line_and_the_files_stay(hub, status, reason, tmp_path, capsys):
    hub.status = status
    code, _, error, folder = push(tmp_path, capsys)
    assert code == 1 and reason in error[0] and str(folder) in error[0]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_no_network_is_one_line(hub, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, error, _ = push(tmp_path, capsys)
    assert code == 1 and "--push_to_hub me/model: " in error[0]


@pytest.mark.parametrize(
    ("name", "token", "reason"), [("model", "t", "write OWNER/NAME"), ("me/model", "", "no token")]
)
def test_bad_input_writes_nothing(name, token, reason, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    code, _, error, folder = push(tmp_path, capsys, name)
    assert code == 2 and reason in error[0] and not folder.exists() and not hub.seen
