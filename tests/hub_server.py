"""A stand-in of the Hub on this machine: what huggingface_hub 1.x and 2.x ask of it, and how it fails when told to.

Written from what the clients send. It has no Xet storage, so large files come and go as Git LFS objects, which both
majors still do with HF_HUB_DISABLE_XET=1; `Hub.environment` sets that.
"""

import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.hub_answers import Answer
from tests.hub_files import OWNER, STRANGER, Fault, Refusal, Repository, Request, read


class Hub(ThreadingHTTPServer):
    """The repositories, what was asked, and what is to go wrong. Its user is `owner`, with the token OWNER."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.users = {OWNER: "owner", STRANGER: "stranger"}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_bytes: int | None = None
        self.large_objects = True
        self.faults: list[Fault] = []
        self.broken_after: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.refused_cards: dict[str, str] = {}
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables with which a program talks to this Hub alone, and keeps everything in `home`."""
        names = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        names |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        return names | ({"HF_TOKEN": token} if token else {})

    def add(self, name: str, *folders: Path, private: bool = False, gated: bool = False) -> list[str]:
        """Make a repository with a commit for each folder, `main` at the first; return the commits."""
        repository = self.repositories[name] = Repository({}, {}, private, gated)
        commits = [repository.commit("main", read(folder)) for folder in folders]
        repository.branches["main"] = commits[0]
        return commits

    def reset(self) -> None:
        """Be as new, at the same address."""
        self.part_bytes, self.large_objects = None, True
        for kept in (self.repositories, self.objects, self.parts, self.faults, self.broken_after, self.damaged):
            kept.clear()
        self.refused_cards.clear()
        self.requests.clear()

    def fail(self, pattern: str, status: int, message: str = "out of order", times: int = 1, **headers: str) -> None:
        """Have requests such as "PUT /lfs" answered by an error."""
        self.faults.append(Fault(pattern, Refusal(status, message, headers=headers), times))

    def asked(self, pattern: str) -> int:
        """How many requests such as "POST .*commit" came."""
        return sum(bool(re.match(pattern, f"{request.method} {request.path}")) for request in self.requests)
