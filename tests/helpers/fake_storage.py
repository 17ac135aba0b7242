"""A fake Google Cloud Storage, in memory: the part of its JSON API that the libraries use.

gcsfs, google-cloud-storage, TensorStore and ArrayRecord talk to it as to the cloud when
`environment` is set. It has no accounts: `denied` holds the permissions that the caller lacks, and
`faults` are answers that take the place of the next ones that fit.
"""

import base64
import itertools
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from urllib.parse import parse_qsl, unquote, urlsplit

PERMISSION = {"GET": "get", "POST": "create", "PUT": "create", "DELETE": "delete"}
_CLOCK = itertools.count(1)  # generations: each write has a higher one


@dataclass
class Object:
    """An object."""

    data: bytes
    generation: int = field(default_factory=lambda: next(_CLOCK))


@dataclass
class Answer:
    """A response."""

    body: bytes | dict | str = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Storage:
    """The server and what its buckets hold.

    Attributes:
      buckets: names of buckets to their objects by name.
      denied: permissions that the caller lacks, as `storage.objects.create`.
      faults: [words of a request line, status, how often], the first that fits is taken.
      watch: is told of every request line.
      asked: the request lines so far.
    """

    def __init__(self, *buckets: str):
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self.denied: set[str] = set()
        self.faults: list[list] = []
        self.watch: Callable[[str], None] = lambda _: None
        self.asked: list[str] = []
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.lock = RLock()
        handler = type("Handler", (_Handler,), {"storage": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that point the libraries here."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # ArrayRecord's reader
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",
            "NO_GCE_CHECK": "true",  # no request to the metadata server for credentials
            # Bucket types are requested over gRPC, which is not available here.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def read(self, bucket: str, name: str) -> bytes:
        return self.buckets[bucket][name].data

    def write(self, bucket: str, name: str, data: bytes) -> None:
        with self.lock:
            self.buckets[bucket][name] = Object(data)

    def answer(self, method: str, target: str, headers, body: bytes) -> Answer:
        """The cloud's answer."""
        with self.lock:
            self.asked.append(f"{method} {unquote(target)}")
            self.watch(self.asked[-1])
            for fault in self.faults:
                if fault[2] and all(word in self.asked[-1] for word in fault[0].split()):
                    fault[2] -= 1
                    return refusal(fault[1], "as the test asks")
            url = urlsplit(target)
            query = parse_qsl(url.query)
            for pattern, serve in ROUTES:
                found = re.fullmatch(pattern, url.path)
                if found:
                    names = [unquote(name) for name in found.groups()]
                    if names[0] not in self.buckets:
                        return refusal(404, f"The specified bucket {names[0]} does not exist.")
                    return serve(self, method, names, query, headers, body)
        return refusal(501, f"not known here: {method} {target}")

    def refused(self, permission: str) -> Answer | None:
        if permission not in self.denied:
            return None
        return refusal(403, f"someone@example.com does not have {permission} access.")


def refusal(status: int, message: str) -> Answer:
    return Answer({"error": {"code": status, "message": message}}, status)


def described(bucket: str, name: str, stored: Object) -> dict:
    digest = base64.b64encode(md5(stored.data).digest()).decode()
    checksum = base64.b64encode(zlib.crc32(stored.data).to_bytes(4, "big")).decode()
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "metageneration": "1",
        "md5Hash": digest,
        "crc32c": checksum,  # of another polynomial: here it only has to change with the data
        "contentType": "application/octet-stream",
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": f"2026-01-01T00:00:00.{stored.generation:06}Z",
    }


def serve_bucket(storage: Storage, method, names, query, headers, body) -> Answer:
    return storage.refused("storage.buckets.get") or Answer(
        {"kind": "storage#bucket", "name": names[0], "id": names[0], "metageneration": "1"}
    )


def serve_permissions(storage: Storage, method, names, query, headers, body) -> Answer:
    asked = [value for key, value in query if key == "permissions"]
    return Answer({"permissions": [p for p in asked if p not in storage.denied]})


def serve_listing(storage: Storage, method, names, query, headers, body) -> Answer:
    (bucket,), options = names, dict(query)
    prefix, delimiter = options.get("prefix", ""), options.get("delimiter")
    first, last = options.get("startOffset", ""), options.get("endOffset")
    after, most = options.get("pageToken", ""), int(options.get("maxResults", 1000))
    items, prefixes = [], []
    for name in storage.names(bucket, prefix):
        if name < first or name <= after or (last is not None and name >= last):
            continue
        rest = name[len(prefix) :]
        if delimiter and delimiter in rest:
            folder = prefix + rest.split(delimiter)[0] + delimiter
            if folder not in prefixes:
                prefixes.append(folder)
        else:
            items.append(described(bucket, name, storage.buckets[bucket][name]))
        if len(items) + len(prefixes) > most:
            break
    found = {"kind": "storage#objects", "items": items[:most], "prefixes": prefixes}
    if len(items) > most:
        found["nextPageToken"] = items[most - 1]["name"]
    return storage.refused("storage.objects.list") or Answer(found)


def serve_object(storage: Storage, method, names, query, headers, body) -> Answer:
    (bucket, name), options = names, dict(query)
    refused = storage.refused(f"storage.objects.{PERMISSION[method]}")
    stored = storage.buckets[bucket].get(name)
    if refused:
        return refused
    if stored is None:
        return refusal(404, f"No such object: {bucket}/{name}")
    if fails_condition(options, stored):
        return refusal(412, "At least one of the conditions did not hold.")
    if options.get("ifGenerationNotMatch") == str(stored.generation):
        return Answer(status=304)
    if method == "DELETE":
        del storage.buckets[bucket][name]
        return Answer(status=204)
    if options.get("alt") != "media":
        return Answer(described(bucket, name, stored))
    return content(stored, headers.get("Range"))


def fails_condition(options: dict[str, str], stored: Object | None) -> bool:
    wanted = options.get("ifGenerationMatch")
    return wanted is not None and int(wanted) != (stored.generation if stored else 0)


def content(stored: Object, asked: str | None) -> Answer:
    """The bytes, or the requested range of them."""
    about = {"x-goog-generation": str(stored.generation)}
    if asked is None:
        return Answer(stored.data, headers=about)
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
    size = len(stored.data)
    begin = int(first) if first else size - int(last)
    end = min(int(last) + 1, size) if first and last else size
    if begin >= size:
        return refusal(416, "Requested range not satisfiable")
    about["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    return Answer(stored.data[begin:end], 206, about)


def serve_upload(storage: Storage, method, names, query, headers, body) -> Answer:
    (bucket,), options = names, dict(query)
    if "upload_id" in options:
        return go_on(storage, method, options["upload_id"], headers, body)
    name, kind = options.get("name", ""), options["uploadType"]
    if kind == "multipart":
        described_as, _, body = body.partition(b"\r\n\r\n" if b"\r\n\r\n" in body else b"\n\n")
        mark = headers["Content-Type"].split("boundary=")[1].strip('"').encode()
        inner, _, body = body.partition(b"\n--" + mark)
        name = json.loads(inner)["name"]
        body = re.split(rb"\r?\n\r?\n", body, maxsplit=1)[1].rsplit(b"\n--" + mark, 1)[0]
    elif kind == "resumable":
        number = str(next(_CLOCK))
        storage.uploads[number] = bucket, name or json.loads(body)["name"], bytearray()
        where = f"{storage.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
        return storage.refused("storage.objects.create") or Answer(
            headers={"Location": f"{where}&upload_id={number}"}
        )
    if fails_condition(options, storage.buckets[bucket].get(name)):
        return refusal(412, "At least one of the conditions did not hold.")
    return storage.refused("storage.objects.create") or keep(storage, bucket, name, body)


def go_on(storage: Storage, method: str, number: str, headers, body: bytes) -> Answer:
    """A chunk of a resumable upload; the last one says the size."""
    if method == "DELETE":
        storage.uploads.pop(number, None)
        return Answer(status=499)
    bucket, name, data = storage.uploads[number]
    data += body
    size = headers.get("Content-Range", "").rpartition("/")[2]
    if size != str(len(data)):
        return Answer(status=308, headers={"Range": f"bytes=0-{len(data) - 1}"})
    return keep(storage, bucket, name, bytes(data))


def keep(storage: Storage, bucket: str, name: str, data: bytes) -> Answer:
    storage.write(bucket, name, data)
    return Answer(described(bucket, name, storage.buckets[bucket][name]))


def serve_copy(storage: Storage, method, names, query, headers, body) -> Answer:
    bucket, name, *others = names
    stored = storage.buckets[bucket].get(name)
    if stored is None:
        return refusal(404, f"No such object: {bucket}/{name}")
    kept = keep(storage, *([bucket, *others][-2:]), stored.data)
    if len(others) == 1:
        del storage.buckets[bucket][name]
        return kept
    return Answer({"kind": "storage#rewriteResponse", "done": True, "resource": kept.body})


_OBJECT = "/storage/v1/b/([^/]+)/o/([^/]+)"
ROUTES: list[tuple[str, Callable]] = [
    ("/storage/v1/b/([^/]+)", serve_bucket),
    ("/storage/v1/b/([^/]+)/iam/testPermissions", serve_permissions),
    ("/storage/v1/b/([^/]+)/o", serve_listing),
    (f"(?:/download)?{_OBJECT}", serve_object),
    (f"{_OBJECT}/rewriteTo/b/([^/]+)/o/([^/]+)", serve_copy),
    (f"{_OBJECT}/moveTo/o/([^/]+)", serve_copy),
    ("(?:/resumable)?/upload/storage/v1/b/([^/]+)/o", serve_upload),
]


class _Handler(BaseHTTPRequestHandler):
    """Hands requests to `storage.answer`."""

    protocol_version = "HTTP/1.1"
    storage: Storage

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = self.storage.answer(self.command, self.path, self.headers, body)
        data = answer.body
        if isinstance(data, dict):
            data = json.dumps(data).encode()
            answer.headers["Content-Type"] = "application/json"
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if answer.status not in (204, 304):
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve  # noqa: N815 - the library's names

    def log_message(self, *_) -> None:
        """No log: tests read `Storage.asked`."""
