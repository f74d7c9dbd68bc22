"""The answers of the stand-in of the Hub, one method for each address that huggingface_hub asks."""

import base64
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from math import ceil
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ruamel.yaml import YAML, YAMLError

from tests.hub_files import Content, Refusal, Repository, Request, digest, entry, flipped, is_large, sha256

if TYPE_CHECKING:
    from tests.hub_server import Hub


class Answer(BaseHTTPRequestHandler):
    """Answers one request."""

    server: "Hub"
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, or the client waits 40 ms for the second

    def answer(self) -> None:
        """Send what the route returns: JSON, content, or a refusal."""
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))) if self.command != "GET" else b""
        with self.server.lock:
            self.server.requests.append(Request(self.command, path, dict(self.headers)))
            try:
                self.fail_if_told(f"{self.command} {path}")
                answer = self.routed(path)
            except Refusal as refusal:
                answer = Content(json.dumps({"error": str(refusal)}).encode(), refusal.headers, refusal.status)
        self.send(answer if isinstance(answer, Content) else Content(json.dumps(answer).encode()))

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, content: Content) -> None:
        """Write it, the whole or as much as comes through."""
        self.send_response(content.status)
        for name, value in {"Content-Length": str(len(content.body)), **content.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content.body[: content.sent])
        self.close_connection = content.sent is not None

    def fail_if_told(self, asked: str) -> None:
        """Raise the first fault that is meant for this request."""
        for fault in self.server.faults:
            if fault.times and re.match(fault.pattern, asked):
                fault.times -= 1
                raise fault.refusal

    def routed(self, path: str) -> Any:
        """Call the route that the path matches."""
        for method, pattern, route in ROUTES:
            if (self.command == method or (self.command, method) == ("HEAD", "GET")) and (
                match := re.fullmatch(pattern, path)
            ):
                return route(self, *match.groups())
        raise Refusal(404, f"Sorry, we can't find {path}")

    def user(self) -> str | None:
        """Who asks; a token that nobody has is refused."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.users.get(token)

    def json(self) -> Any:
        """The request's JSON."""
        return json.loads(self.body)

    def readable(self, name: str) -> Repository:
        """The repository, where the user may know of it."""
        user, repository = self.user(), self.server.repositories.get(name)
        if repository is None or (repository.private and user != name.split("/")[0]):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def open_to_user(self, name: str) -> Repository:
        """The repository, where the user may have its files too."""
        repository = self.readable(name)
        if repository.gated and self.user() != name.split("/")[0]:
            raise Refusal(403 if self.user() else 401, f"Access to model {name} is restricted", "GatedRepo")
        return repository

    def writable(self, name: str) -> Repository:
        """The repository, where it is the user's own."""
        repository = self.readable(name)
        if self.user() != name.split("/")[0]:
            raise Refusal(403 if self.user() else 401, f"You don't have the rights to write to {name}")
        return repository

    def who(self) -> Any:
        """GET /api/whoami-v2."""
        if self.user() is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": self.user(), "auth": {"accessToken": {"role": "write"}}, "orgs": []}

    def create(self) -> Any:
        """POST /api/repos/create; 1.x says `private`, 2.x `visibility`."""
        wanted, user = self.json(), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        if not name.startswith(f"{user}/"):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repositories:
            return Content(json.dumps(answer | {"error": "You already created this model repo"}).encode(), status=409)
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.server.repositories[name] = Repository({}, {}, private)
        self.server.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return answer

    def branch(self, name: str, branch: str) -> Any:
        """POST /api/models/…/branch/…."""
        repository = self.writable(name)
        if branch in repository.branches:
            raise Refusal(409, f"Reference {branch} already exists")
        repository.branches[branch] = repository.branches[self.json().get("startingPoint", "main")]
        return {}

    def info(self, name: str, revision: str | None = None) -> Any:
        """GET /api/models/…: what a repository is, at a revision."""
        repository = self.readable(name)
        oid, files = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in files]
        card = re.match("---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
        facts = {"id": name, "sha": oid, "siblings": siblings, "private": repository.private}
        return facts | ({"cardData": YAML(typ="safe").load(card[1])} if card else {})

    def tree(self, name: str, revision: str) -> Any:
        """GET /api/models/…/tree/…: the files."""
        return [entry(*item) for item in sorted(self.open_to_user(name).at(revision)[1].items())]

    def validate(self) -> Any:
        """POST /api/validate-yaml: whether the Hub takes the card's head."""
        try:
            head = re.match("---\n(.*?)\n---", self.json()["content"], re.DOTALL)
            data = YAML(typ="safe").load(head[1]) if head else {}
        except YAMLError as error:
            data, wrong = {}, [str(error)]
        else:
            wrong = []
        base = data.get("base_model", "a/b")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            wrong.append(f'"base_model" with value "{base}" is not valid. Use a model id from hf.co/models.')
        refused = self.server.refused_cards.items() & {(key, str(value)) for key, value in data.items()}
        wrong += [f'"{key}" must not be {value}' for key, value in refused]
        answer = {"errors": [{"message": message} for message in wrong], "warnings": []}
        return Content(json.dumps(answer).encode(), status=400 if wrong else 200)

    def preupload(self, name: str, revision: str) -> Any:
        """POST /api/models/…/preupload/…: which files go up as large ones, and which are there already."""
        _, present = self.writable(name).at(revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs"
                    if self.server.large_objects and is_large(file["path"], file["size"])
                    else "regular",
                    "shouldIgnore": False,
                    "oid": digest(file["path"], present[file["path"]]) if file["path"] in present else None,
                }
                for file in self.json()["files"]
            ]
        }

    def batch(self, name: str) -> Any:
        """POST /….git/info/lfs/objects/batch: where the large files are to be put."""
        self.writable(name)
        return {"objects": [self.upload_of(item["oid"], item["size"]) for item in self.json()["objects"]]}

    def upload_of(self, oid: str, size: int) -> Any:
        """One address, or one for each part; none where the object is there already."""
        if oid in self.server.objects:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{self.server.url}/lfs/{oid}"}
        if self.server.part_bytes is not None:
            numbers = range(1, ceil(size / self.server.part_bytes) + 1)
            parts = {str(number): f"{self.server.url}/lfs/{oid}/{number}" for number in numbers}
            upload["header"] = {"chunk_size": str(self.server.part_bytes), **parts}
        return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload}}

    def put(self, oid: str, part: str | None = None) -> Any:
        """PUT /lfs/…: a large file, or a part of it; the address is all that is needed, no token."""
        if part is not None:
            self.server.parts.setdefault(oid, {})[int(part)] = self.body
            return Content(b"", {"ETag": f'"{sha256(self.body)}"'})
        if sha256(self.body) != oid:
            raise Refusal(400, "The content does not match the SHA-256 it was announced with")
        self.server.objects[oid] = self.body
        return Content(b"")

    def complete(self, oid: str) -> Any:
        """POST /lfs/…: the parts are one file now."""
        parts = self.server.parts[oid]
        told = [(part["partNumber"], part["etag"].strip('"')) for part in self.json()["parts"]]
        if told != [(number, sha256(parts[number])) for number in sorted(parts)]:
            raise Refusal(400, "Wrong parts")
        self.body = b"".join(parts[number] for number in sorted(parts))
        return self.put(oid)

    def commit(self, name: str, revision: str) -> Any:
        """POST /api/models/…/commit/…: lines of JSON, a header and the files."""
        repository = self.writable(name)
        parent, files = repository.at(revision)
        files = dict(files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", parent) != parent:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if line["key"] == "header":
                repository.summaries.append(value["summary"])
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            if value.get("path") in self.server.damaged:
                files[value["path"]] = flipped(files[value["path"]])
            if line["key"].startswith("deleted"):
                files.pop(value["path"])
        oid = repository.commit(revision, files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}

    def resolve(self, name: str, revision: str, path: str) -> Any:
        """GET /…/resolve/…: a small file, or the way to a large one on another host."""
        oid, files = self.open_to_user(name).at(revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        content = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{digest(path, content)}"'}
        if not is_large(path, len(content)):
            return self.ranged(path, content, headers)
        linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        place = f"http://localhost:{self.server.server_port}/cdn/{name}/{oid}/{path}"
        return Content(b"", {**headers, **linked, "Location": place}, 302)

    def cdn(self, name: str, oid: str, path: str) -> Any:
        """GET /cdn/…: a large file."""
        return self.ranged(path, self.server.repositories[name].commits[oid][path], {})

    def ranged(self, path: str, content: bytes, headers: dict[str, str]) -> Content:
        """The content from where the client has it already, with a wrong bit or a broken line if so told."""
        if path in self.server.damaged:
            content = flipped(content)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        extent = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if wanted else {}
        sent = self.server.broken_after.pop(path, None) if self.command == "GET" else None
        return Content(content[start:], {**headers, **extent}, 206 if wanted else 200, sent)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


NAME, OID = r"([\w.-]+/[\w.-]+)", "([0-9a-f]{64})"
ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/api/whoami-v2", Answer.who),
    ("POST", "/api/repos/create", Answer.create),
    ("POST", "/api/validate-yaml", Answer.validate),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Answer.branch),
    ("GET", f"/api/models/{NAME}", Answer.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Answer.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)/?", Answer.tree),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Answer.preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Answer.commit),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", Answer.batch),
    ("PUT", f"/lfs/{OID}", Answer.put),
    ("PUT", f"/lfs/{OID}/(\\d+)", Answer.put),
    ("POST", f"/lfs/{OID}", Answer.complete),
    ("GET", f"/cdn/{NAME}/([0-9a-f]{{40}})/(.+)", Answer.cdn),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Answer.resolve),
)
