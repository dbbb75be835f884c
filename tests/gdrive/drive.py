"""The files of a Drive, and what its API refuses."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FOLDER_ID = "1FolderOfTheTests"
FOLDER = "application/vnd.google-apps.folder"


class Refusal(Exception):  # noqa: N818  # no error of ours
    """An answer of the API that is no success, in its own form."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        error = {"domain": "global", "reason": reason, "message": message}
        self.body = {"error": {"errors": [error], "code": status, "message": message}}


@dataclass
class Item:
    """A file or a folder."""

    title: str
    parent: str
    mime_type: str = "application/octet-stream"
    content: bytes = b""
    trashed: bool = False
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))


class Drive:
    """A Shared Drive, or with `drive_id` None somebody's My Drive, one folder of which is shared with the account."""

    def __init__(self) -> None:
        self.page_size = 3  # small, so that every listing of a few files has several pages
        self.reset()

    def reset(self) -> None:
        """Empty the Drive, and let all be well."""
        self.drive_id: str | None = "0ASharedDriveOfTheTests"
        self.root = Item("experiments", parent="root", mime_type=FOLDER, id=FOLDER_ID)
        self.items = {self.root.id: self.root}
        self.role = "writer"
        self.shared = True
        self.quota: int | None = None  # bytes

    def files(self) -> dict[str, bytes]:
        """Content of all files that are not in the trash, by path below the shared folder."""
        return {self._path(item): item.content for item in self.items.values() if self._is_live_file(item)}

    def trash(self) -> list[str]:
        """Paths of what is in the trash."""
        return [self._path(item) for item in self.items.values() if item.trashed]

    def get(self, id: str) -> Item:
        if id not in self.items or not self.shared:
            raise Refusal(404, "notFound", f"File not found: {id}")
        return self.items[id]

    def insert(self, metadata: dict[str, Any], content: bytes = b"") -> Item:
        """A new file or folder; the API allows several of one title."""
        (parent,) = metadata["parents"]
        self.check_write(parent["id"], len(content))
        mime_type = metadata.get("mimeType") or "application/octet-stream"
        item = Item(metadata["title"], parent["id"], mime_type, content)
        self.items[item.id] = item
        return item

    def check_write(self, parent: str, num_bytes: int) -> None:
        if self.get(parent).mime_type != FOLDER or self.role != "writer":
            message = "The user does not have sufficient permissions for this file."
            raise Refusal(403, "insufficientFilePermissions", message)
        if self.quota is not None and self.used + num_bytes > self.quota:
            message = "Service Accounts do not have storage quota. Leverage shared drives."
            raise Refusal(403, "storageQuotaExceeded", message)

    @property
    def used(self) -> int:
        return sum(len(item.content) for item in self.items.values())

    def search(self, query: str) -> list[Item]:
        """What a `q=` of Drive's query language finds: parents, title and trashed, as the client asks for them."""
        parents = set(re.findall(r"'([^']+)' in parents", query))
        title = re.search(r"title='((?:[^'\\]|\\.)*)'", query)
        rest = re.sub(r"'[^']+' in parents|title='(?:[^'\\]|\\.)*'|trashed=false|[()]|\b(?:or|and)\b|\s", "", query)
        if rest or "trashed=false" not in query or not parents:
            raise Refusal(400, "invalid", f"Invalid Value: {query}")
        if not self.shared:
            return []
        wanted = title and title[1].replace("\\'", "'").lower()  # Drive does not mind the case
        return [
            item
            for item in self.items.values()
            if item.parent in parents and not item.trashed and wanted in (None, item.title.lower())
        ]

    def describe(self, item: Item) -> dict[str, Any]:
        """A file resource of Drive v2."""
        resource: dict[str, Any] = {
            "kind": "drive#file",
            "id": item.id,
            "title": item.title,
            "mimeType": item.mime_type,
            "parents": [{"id": item.parent}],
            "labels": {"trashed": item.trashed},
            "capabilities": {"canAddChildren": self.role == "writer" and item.mime_type == FOLDER},
        }
        if self.drive_id:
            resource["driveId"] = self.drive_id
        if item.mime_type != FOLDER:
            resource["fileSize"] = str(len(item.content))
            resource["md5Checksum"] = hashlib.md5(item.content).hexdigest()
        return resource

    def remove(self, id: str) -> None:
        """Delete an item and what is in it."""
        for child in [item.id for item in self.items.values() if item.parent == id]:
            self.remove(child)
        del self.items[id]

    def _is_live_file(self, item: Item) -> bool:
        return item.mime_type != FOLDER and not any(step.trashed for step in self._chain(item))

    def _chain(self, item: Item) -> Iterator[Item]:
        while item.id != self.root.id:
            yield item
            item = self.items[item.parent]

    def _path(self, item: Item) -> str:
        return "/".join(reversed([step.title for step in self._chain(item)]))
