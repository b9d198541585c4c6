"""A Hub on loopback that speaks the protocol as far as huggingface_hub uses it to push and to load.

Create, preupload, commit, LFS, resolve with redirects and etags, model info, branches, tags, who is asking. Xet is not
spoken: `HF_HUB_DISABLE_XET=1`. What it can be told to do wrong stands in `Faults`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN = "hf_right"
USER = "someone"


@dataclass
class Stored:
    """A file of a commit.

    Args:
        content: its bytes.
        lfs: whether it is kept in large storage, behind a redirect.
    """

    content: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """What identifies the content: its SHA-256, or what git calls it."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits by their name, and what branches and tags point to."""

    private: bool = False
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Stored], ref: str = "main") -> str:
        """Make a commit and have a branch point to it."""
        content = repr((self.refs.get(ref), sorted((name, stored.etag) for name, stored in files.items())))
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name], self.refs[ref] = files, name
        return name

    def resolve(self, revision: str) -> str | None:
        """Name of the commit that a revision is."""
        name = self.refs.get(revision, revision)
        return name if name in self.commits else None


@dataclass
class Faults:
    """What goes wrong.

    Args:
        cut_after: large files break off after so many bytes, as often as `cuts` says.
        cuts: how often.
        corrupt: whether large files come with a byte changed.
        refuse_commits: whether commits end with an error of the server.
    """

    cut_after: int = 0
    cuts: int = 0
    corrupt: bool = False
    refuse_commits: bool = False


class Hub:
    """The server, in a thread; `address` is what HF_ENDPOINT takes."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults = Faults()
        self.requests: list[str] = []
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        # Large files are on another host, as the Hub's are: where a redirect within a host leads is asked at once.
        self.storage = f"http://localhost:{self.server.server_address[1]}/storage"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What is in a repository."""
        repository = self.repositories[repo]
        return {name: stored.content for name, stored in repository.commits[repository.refs[revision]].items()}


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        """Answer it."""
        self.answer("GET")

    def do_HEAD(self) -> None:
        """Answer it."""
        self.answer("HEAD")

    def do_POST(self) -> None:
        """Answer it."""
        self.answer("POST")

    def do_PUT(self) -> None:
        """Answer it."""
        self.answer("PUT")

    def answer(self, method: str) -> None:
        """Find what a request is for."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{method} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.is_known = token == TOKEN
        if token and not self.is_known:
            self.refuse(401, "Invalid username or password.")
            return
        for pattern, verb, respond in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and (verb == method or (verb, method) == ("GET", "HEAD")):
                respond(self, *found.groups())
                return
        self.refuse(404, f"{method} {path} is not known here.")

    # Answers

    def refuse(self, status: int, message: str, code: str = "") -> None:
        """Answer with an error as the Hub does."""
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def send_json(self, content: Any, status: int = 200) -> None:
        """Answer with JSON."""
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        """Answer."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_content(self, content: bytes, headers: dict[str, str], faulty: bool = False) -> None:
        """Answer with a file, or the part of it that is asked for."""
        faults = self.hub.faults
        if faulty and faults.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status, start, stop = 200, 0, len(content)
        if asked:
            status, start = 206, int(asked[1])
            stop = min(int(asked[2]) + 1, len(content)) if asked[2] else len(content)
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        part = content[start:stop]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(part)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if faulty and faults.cuts > 0 and len(part) > faults.cut_after:
            faults.cuts -= 1
            self.wfile.write(part[: faults.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(part)

    def found(self, repo: str) -> Repository | None:
        """A repository that whoever asks may see."""
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not self.is_known):
            self.refuse(404 if self.is_known else 401, "Repository not found", "RepoNotFound")
            return None
        return repository

    # Requests

    def who(self) -> None:
        """Who is asking."""
        if self.is_known:
            self.send_json({"type": "user", "name": USER, "auth": {"type": "access_token"}, "orgs": []})
        else:
            self.refuse(401, "Invalid username or password.")

    def create(self) -> None:
        """Make a repository."""
        if not self.is_known:
            self.refuse(401, "Invalid username or password.")
            return
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            self.send_json({**answer, "error": "You already created this model repo"}, 409)
            return
        self.hub.repositories[repo] = Repository(private=bool(asked.get("private")))
        self.hub.repositories[repo].commit({})
        self.send_json(answer)

    def check_yaml(self) -> None:
        """Whether the metadata of a card is valid."""
        content = json.loads(self.body)["content"]
        errors = [] if "base_model: /" not in content else [{"message": "base_model is no repository"}]
        self.send_json({"errors": errors, "warnings": []})

    def preupload(self, repo: str, _: str) -> None:
        """Which files go to large storage."""
        if self.writable(repo) is None:
            return
        files = json.loads(self.body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        self.send_json({"files": modes})

    def writable(self, repo: str) -> Repository | None:
        """A repository that whoever asks may change."""
        if not self.is_known:
            self.refuse(401, "Invalid username or password.")
            return None
        return self.found(repo)

    def lfs_batch(self, repo: str) -> None:
        """Where large files are to be uploaded."""
        if self.writable(repo) is None:
            return
        objects = []
        for entry in json.loads(self.body)["objects"]:
            href = f"{self.hub.address}/upload/{entry['oid']}"
            actions = {} if entry["oid"] in self.hub.large else {"upload": {"href": href}}
            objects.append({**entry, "authenticated": True} | ({"actions": actions} if actions else {}))
        self.send_json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        """A large file."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.refuse(400, "The content is not what was announced.")
            return
        self.hub.large[oid] = self.body
        self.send(200, b"", {})

    def commit(self, repo: str, revision: str) -> None:
        """Make a commit of the lines that came."""
        repository = self.writable(repo)
        if repository is None:
            return
        if self.hub.faults.refuse_commits:
            self.refuse(400, "The commit was refused.")
            return
        files = dict(repository.commits.get(repository.refs.get(revision, ""), {}))
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), lfs=False)
            elif entry["key"] == "lfsFile":
                files[value["path"]] = Stored(self.hub.large[value["oid"]], lfs=True)
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        name = repository.commit(files, revision)
        url = f"{self.hub.address}/{repo}/commit/{name}"
        self.send_json({"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})

    def make_ref(self, repo: str, _: str, name: str) -> None:
        """Make a branch or a tag."""
        repository = self.writable(repo)
        if repository is not None:
            repository.refs[name] = repository.refs["main"]
            self.send_json({})

    def model_info(self, repo: str, revision: str | None = None) -> None:
        """What is in a repository."""
        repository = self.found(repo)
        if repository is None:
            return
        name = repository.resolve(revision or "main")
        if name is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        siblings = [
            {"rfilename": file, "size": len(stored.content), "blobId": stored.etag}
            for file, stored in repository.commits[name].items()
        ]
        self.send_json({"_id": repo, "id": repo, "modelId": repo, "sha": name, "private": False, "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        """The files of a repository."""
        repository = self.found(repo)
        if repository is None:
            return
        name = repository.resolve(revision)
        files = repository.commits.get(name or "", {})
        self.send_json(
            [
                {"type": "file", "path": file, "size": len(stored.content), "oid": stored.etag}
                for file, stored in files.items()
            ]
        )

    def resolve(self, repo: str, revision: str, file: str) -> None:
        """A file: by itself, or where it is in large storage."""
        repository = self.found(repo)
        if repository is None:
            return
        name = repository.resolve(revision)
        if name is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        stored = repository.commits[name].get(file)
        if stored is None:
            self.send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": name})
            return
        headers = {"X-Repo-Commit": name, "ETag": f'"{stored.etag}"'}
        if not stored.lfs:
            self.send_content(stored.content, headers)
            return
        headers |= {
            "X-Linked-Etag": f'"{stored.etag}"',
            "X-Linked-Size": str(len(stored.content)),
            "Location": f"{self.hub.storage}/{stored.etag}",
        }
        self.send(302, b"", headers)

    def storage(self, oid: str) -> None:
        """A file in large storage."""
        self.send_content(self.hub.large[oid], {"ETag": f'"{oid}"'}, faulty=True)


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    (r"/api/whoami-v2", "GET", Handler.who),
    (r"/api/repos/create", "POST", Handler.create),
    (r"/api/validate-yaml", "POST", Handler.check_yaml),
    (rf"/api/models/{REPO}", "GET", Handler.model_info),
    (rf"/api/models/{REPO}/revision/(.+)", "GET", Handler.model_info),
    (rf"/api/models/{REPO}/tree/(.+)", "GET", Handler.tree),
    (rf"/api/models/{REPO}/preupload/(.+)", "POST", Handler.preupload),
    (rf"/api/models/{REPO}/commit/(.+)", "POST", Handler.commit),
    (rf"/api/models/{REPO}/(branch|tag)/(.+)", "POST", Handler.make_ref),
    (rf"/{REPO}\.git/info/lfs/objects/batch", "POST", Handler.lfs_batch),
    (r"/upload/([0-9a-f]+)", "PUT", Handler.upload),
    (r"/storage/([0-9a-f]+)", "GET", Handler.storage),
    (rf"/{REPO}/resolve/([^/]+)/(.+)", "GET", Handler.resolve),
]
