"""The way of an image from a layout to a registry, over plain HTTP."""

from __future__ import annotations

import http.client
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tests.support.images import Json, Layout, is_index, is_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping


class Pusher:
    """Pushes images of a layout to a registry over plain HTTP; each blob once per repository."""

    def __init__(self, host: str, *, authorization: str | None = None) -> None:
        self._connection = http.client.HTTPConnection(host, timeout=120)
        self._headers = {"Authorization": authorization} if authorization else {}
        self._present: set[tuple[str, str]] = set()

    def __enter__(self) -> Pusher:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def push(self, layout: Layout, descriptor: Json, repository: str, tag: str) -> None:
        """Push everything below `descriptor`, children first, then the tag."""
        for child in layout.children(descriptor):
            if is_index(child) or is_manifest(child):
                self.push(layout, child, repository, child["digest"])
            else:
                self.push_blob(repository, child["digest"], layout.blob_path(child["digest"]))
        self.put_manifest(
            repository, tag, layout.blob(descriptor["digest"]), descriptor["mediaType"]
        )

    def push_blob(self, repository: str, digest: str, content: Path | bytes) -> None:
        if (repository, digest) in self._present:
            return
        if self._call("HEAD", f"/v2/{repository}/blobs/{digest}")[0] != 200:
            status, headers = self._call("POST", f"/v2/{repository}/blobs/uploads/", b"")
            _expect(status, 202, "begin upload", digest)
            location = headers["location"].split("://", 1)[-1]
            target = location[location.index("/") :]
            joiner = "&" if "?" in target else "?"
            with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as body:
                size = body.seek(0, os.SEEK_END)
                body.seek(0)
                status, _ = self._call(
                    "PUT",
                    f"{target}{joiner}digest={digest}",
                    body,
                    {"Content-Type": "application/octet-stream", "Content-Length": str(size)},
                )
            _expect(status, 201, "upload", digest)
        self._present.add((repository, digest))

    def put_manifest(self, repository: str, tag: str, body: bytes, media_type: str) -> None:
        status, _ = self._call(
            "PUT", f"/v2/{repository}/manifests/{tag}", body, {"Content-Type": media_type}
        )
        _expect(status, 201, "push manifest", f"{repository}:{tag}")

    def _call(
        self,
        method: str,
        target: str,
        body: bytes | BinaryIO | io.BytesIO | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Mapping[str, str]]:
        self._connection.request(method, target, body, {**self._headers, **(headers or {})})
        with self._connection.getresponse() as response:
            response.read()
            return response.status, {key.lower(): value for key, value in response.getheaders()}


def _expect(status: int, wanted: int, what: str, subject: str) -> None:
    if status != wanted:
        raise RuntimeError(f"{what} {subject}: the registry answered {status}")
