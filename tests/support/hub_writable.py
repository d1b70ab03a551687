"""The small Hub, with what `HfApi` uploads by: repositories that are made, branches, LFS objects, commits.

Who writes needs the token that the server was made with. Large files go to the CDN by signed URLs, whose content must
be what was announced; a commit that names an object that never came is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from .hub import HubServer, _commit_id, _hashed, _json_reply, _refusal_reply, _RefusalError, _Reply, _Repo, _Request

_WRITE_ROUTE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>preupload|commit|branch)/(?P<rev>.+)")
_BATCH_ROUTE = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_UPLOAD_ROUTE = re.compile(r"/uploads/(?P<oid>[0-9a-f]{64})")


class WritableHub(HubServer):
    """commits: (repository, revision, summary) of each, in order. private: repositories that were made so."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self.commits: list[tuple[str, str, str]] = []
        self.private: set[str] = set()
        self._token = token
        self._folder = tempfile.TemporaryDirectory(prefix="hub-")
        self._objects: dict[str, Path] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._folder.cleanup()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Path]:
        """What a repository holds: name → where its content is."""
        return {name: file.location for name, file in self._find_commit(repo_id, revision)[1].items()}

    def _answer(self, request: _Request) -> _Reply:
        try:
            if request.origin == "cdn" and (match := _UPLOAD_ROUTE.fullmatch(request.path)):
                return self._take_object(request, match["oid"])
            if request.origin == "cdn":
                return super()._answer(request)
            writes = {"/api/repos/create": self._create, "/api/validate-yaml": lambda _: _json_reply({})}
            if request.path in writes:
                self._check_writer(request)
                return writes[request.path](request)
            if match := _WRITE_ROUTE.fullmatch(request.path):
                self._check_writer(request)
                act = {"preupload": self._preupload, "commit": self._commit, "branch": self._branch}[match["what"]]
                return act(request, match["repo"], unquote(match["rev"]))
            if match := _BATCH_ROUTE.fullmatch(request.path):
                self._check_writer(request)
                return self._batch(request)
        except _RefusalError as refusal:
            return _refusal_reply(refusal)
        return super()._answer(request)

    def _check_writer(self, request: _Request) -> None:
        if request.token != self._token:
            raise _RefusalError(401, "", "Invalid username or password.")

    def _create(self, request: _Request) -> _Reply:
        asked = json.loads(request.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self._repos:
            return _json_reply(url | {"error": "You already created this model repo"}, status=409)
        attributes = Path(self._folder.name) / "gitattributes"
        attributes.write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        files = {".gitattributes": self._file(attributes)}
        self._repos[repo_id] = _Repo(commits={_commit_id(files): files}, refs={"main": _commit_id(files)})
        if asked.get("visibility") == "private" or asked.get("private"):
            self.private.add(repo_id)
        return _json_reply(url)

    def _branch(self, request: _Request, repo_id: str, name: str) -> _Reply:
        repo = self._find_repo(repo_id)
        if name in repo.refs:
            raise _RefusalError(409, "", f"Reference already exists: {name}")
        repo.refs[name] = repo.refs["main"]
        return _json_reply({})

    def _preupload(self, request: _Request, repo_id: str, revision: str) -> _Reply:
        self._find_commit(repo_id, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(request.body)["files"]
        ]
        return _json_reply({"files": files})

    def _batch(self, request: _Request) -> _Reply:
        objects = []
        for asked in json.loads(request.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self._objects:
                entry["actions"] = {"upload": {"href": self._signed_url(f"/uploads/{asked['oid']}"), "header": {}}}
            objects.append(entry)
        return _json_reply({"transfer": "basic", "objects": objects})

    def _take_object(self, request: _Request, oid: str) -> _Reply:
        self._check_signed(request)
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise _RefusalError(400, "", "the content has another hash than was announced")
        path = Path(self._folder.name) / oid
        path.write_bytes(request.body)
        self._objects[oid] = path
        return _Reply(status=200)

    def _commit(self, request: _Request, repo_id: str, revision: str) -> _Reply:
        _, before = self._find_commit(repo_id, revision)
        files, summary = dict(before), ""
        for line in request.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    summary = value["summary"]
                case "file":
                    data = base64.b64decode(value["content"])
                    location = Path(self._folder.name) / hashlib.sha1(data, usedforsecurity=False).hexdigest()
                    location.write_bytes(data)
                    files[value["path"]] = self._file(location)
                case "lfsFile":
                    if value["oid"] not in self._objects:
                        raise _RefusalError(400, "", f"the object of {value['path']} was never uploaded")
                    # It is large by its name.
                    named = Path(self._folder.name) / f"{value['oid']}.safetensors"
                    if not named.exists():
                        named.write_bytes(self._objects[value["oid"]].read_bytes())
                    files[value["path"]] = self._file(named)
                case "deletedFile":
                    del files[value["path"]]
        commit = _commit_id(files)
        repo = self._repos[repo_id]
        repo.commits[commit], repo.refs[revision] = files, commit
        self.commits.append((repo_id, revision, summary))
        url = f"{self.endpoint}/{repo_id}/commit/{commit}"
        return _json_reply({"commitUrl": url, "commitOid": commit, "success": True})

    @staticmethod
    def _file(location: Path) -> Any:
        stat = location.stat()
        return _hashed(location.resolve(), stat.st_size, stat.st_mtime_ns)
