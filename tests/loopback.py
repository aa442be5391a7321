"""A Hub on the loopback interface: the few endpoints that pushing and loading a model need, in memory."""

import base64
import hashlib
import json
import re
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

USER = "tester"
LARGE = 1024  # bytes; larger files go through LFS, as weights do on the real Hub


class Repository:
    def __init__(self):
        self.commit = "0" * 40
        self.files: dict[str, bytes] = {}

    def apply(self, lines: list[dict], blobs: dict[str, bytes]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                self.files.pop(value["path"], None)
        self.commit = hashlib.sha1(uuid.uuid4().bytes).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves until :meth:`stop`; `url` is what HF_ENDPOINT has to be."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def reply(self, status: int, body, content_type: str = "application/json", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def route(self) -> None:
        path, body = unquote(urlparse(self.path).path), self.read_body()
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, path):
                return answer(self, body, *match.groups())
        self.reply(404, {"error": f"no such endpoint: {path}"}, X_Error_Code="NotImplemented")

    do_GET = do_POST = do_PUT = do_HEAD = route

    def repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None:
            self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def who(self, body):
        token = {"accessToken": {"role": "write"}}
        self.reply(200, {"name": USER, "type": "user", "orgs": [], "auth": token})

    def validate(self, body):
        self.reply(200, {"errors": [], "warnings": []})

    def create(self, body):
        request = json.loads(body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        known = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository())
        self.reply(409 if known else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def upload(self, body, digest):
        assert hashlib.sha256(body).hexdigest() == digest
        self.server.blobs[digest] = body
        self.reply(200, b"")

    def lfs_batch(self, body, name):
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/blob/{item['oid']}"}}
            known = item["oid"] in self.server.blobs
            objects.append({"oid": item["oid"], "size": item["size"], **({} if known else {"actions": upload})})
        self.reply(200, {"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def preupload(self, body, name):
        modes = [("lfs" if f["size"] > LARGE else "regular", f["path"]) for f in json.loads(body)["files"]]
        self.reply(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for m, p in modes]})

    def commit(self, body, name):
        if repository := self.repository(name):
            repository.apply([json.loads(line) for line in body.splitlines()], self.server.blobs)
            url = f"{self.server.url}/{name}/commit/{repository.commit}"
            self.reply(200, {"commitUrl": url, "commitOid": repository.commit})

    def tree(self, body, name, _):
        if repository := self.repository(name):
            files = repository.files.items()
            oid = {path: hashlib.sha1(data).hexdigest() for path, data in files}
            self.reply(200, [{"type": "file", "path": p, "size": len(d), "oid": oid[p]} for p, d in files])

    def info(self, body, name, _):
        if repository := self.repository(name):
            siblings = [{"rfilename": path} for path in repository.files]
            about = {"id": name, "modelId": name, "sha": repository.commit, "private": False, "tags": []}
            self.reply(200, {**about, "siblings": siblings})

    def resolve(self, body, name, revision, path):
        if repository := self.repository(name):
            data = repository.files.get(path)
            if data is None:
                return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=repository.commit)
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.reply(200, data, "application/octet-stream", ETag=tag, X_Repo_Commit=repository.commit)


ROUTES = (
    (r"/blob/(\w+)", Handler.upload),
    (r"/api/whoami-v2", Handler.who),
    (r"/api/validate-yaml", Handler.validate),
    (r"/api/repos/create", Handler.create),
    (r"/(.+?)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/api/models/(.+?)/preupload/.+", Handler.preupload),
    (r"/api/models/(.+?)/commit/.+", Handler.commit),
    (r"/api/models/(.+?)/tree/[^/]+(/.*)?", Handler.tree),
    (r"/api/models/([^/]+/[^/]+)(/revision/.+)?", Handler.info),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
)
