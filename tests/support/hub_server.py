"""A Hugging Face Hub of one user on a local port: the endpoints that huggingface_hub calls to push and to download.

    with HubServer() as hub:
        environment = hub.environment  # HF_ENDPOINT, HF_TOKEN; Xet is off, so that files go by Git LFS's protocol
        hub.repositories["ada/model"].files["README.md"]

It checks what the Hub checks: the token, the namespace, the card's header, each file's sha256.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

USER, TOKEN = "ada", "hf_of_the_test"
COMMIT = "1234567890123456789012345678901234567890"


@dataclass
class HubRepository:
    """One repository: whether it is private, its files, and the messages of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class HubServer:
    """The server; `fail` maps the beginning of a request ("POST /api/repos") to the status that it answers with."""

    def __init__(self) -> None:
        self.repositories: dict[str, HubRepository] = {}
        self.objects: dict[str, bytes] = {}  # of Git LFS, by sha256
        self.fail: dict[str, int] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that uses this Hub, with the user's token."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *parts: object) -> None:
        """Nothing on the test's console."""

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, path = self.server_state, self.path.partition("?")[0]
        asked = f"{self.command} {path}"
        hub.requests.append(asked)
        for begin, status in hub.fail.items():
            if asked.startswith(begin):
                return self._answer(status, {"error": f"status {status} by the test"})
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"},
                                {"X-Error-Message": "Invalid credentials in Authorization header"})  # fmt: skip
        for pattern, answer in ROUTES:
            if found := re.fullmatch(pattern, asked):
                return answer(self, **found.groupdict())
        self._answer(404, {"error": f"no such address: {asked}"})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def whoami(self) -> None:
        self._answer(200, {"type": "user", "name": USER, "orgs": []})

    def model(self, name: str) -> None:
        found = self.server_state.repositories.get(name)
        if found is None:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": file} for file in found.files]
        self._answer(200, {"id": name, "private": found.private, "sha": COMMIT, "siblings": siblings, "tags": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or USER
        name, hub = f"{owner}/{asked['name']}", self.server_state
        if owner != USER:
            error = f"You don't have the rights to create a model under the namespace {owner!r}"
            return self._answer(403, {"error": error}, {"X-Error-Message": error})
        there = name in hub.repositories
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.repositories.setdefault(name, HubRepository(private))
        self._answer(409 if there else 200, {"url": f"{hub.address}/{name}", "name": name})

    def validate(self) -> None:
        header = json.loads(self.body)["content"].split("---\n")[1]
        base = yaml.safe_load(header).get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            return self._answer(
                400, {"errors": [{"message": '"base_model" is not a model of the Hub'}], "warnings": []}
            )
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, name: str) -> None:
        modes = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            modes.append({"path": file["path"], "shouldIgnore": False, "uploadMode": mode})
        self._answer(200, {"files": modes})

    def batch(self, name: str) -> None:
        address = self.server_state.address
        objects = [{**asked, "actions": {"upload": {"href": f"{address}/lfs/{asked['oid']}"}}}
                   for asked in json.loads(self.body)["objects"]]  # fmt: skip
        self._answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        fits = hashlib.sha256(self.body).hexdigest() == oid
        if fits:
            self.server_state.objects[oid] = self.body
        self._answer(200 if fits else 400, {})

    def commit(self, name: str) -> None:
        repository = self.server_state.repositories[name]
        for line in self.body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                repository.messages.append(value["summary"])
            elif part["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                repository.files[value["path"]] = self.server_state.objects[value["oid"]]
        self._answer(200, {"commitUrl": f"{self.server_state.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def resolve(self, name: str, file: str) -> None:
        data = self.server_state.repositories[name].files[file]
        etag = hashlib.sha256(data).hexdigest()
        self._answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = (
    (r"GET /api/whoami-v2", _Handler.whoami),
    (rf"GET /api/models/{_NAME}", _Handler.model),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/main", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", _Handler.upload),
    (rf"POST /api/models/{_NAME}/commit/main", _Handler.commit),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/main/(?P<file>.+)", _Handler.resolve),
)
