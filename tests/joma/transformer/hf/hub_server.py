"""A small stand-in for Hugging Face's server, on the loopback address.

Its answers are those that the real client asks for when it fetches a snapshot:
the commit of a revision, the tree of a commit, and files, whole or from a byte.
"""

import contextlib
import dataclasses
import hashlib
from http import server
import json
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
  """What the server has, and what it was asked.

  Attributes:
    files: Contents by name.
    name: Of the one model.
    revisions: Besides the commit.
    token: Without which the model is not there; None is public.
    is_gated: Whether a token does not help.
    cut_after: Bytes of a weight file after which the line breaks; None never.
    asked: Paths, and the ranges of files.
  """

  files: dict[str, bytes]
  name: str = "org/name"
  revisions: tuple[str, ...] = ("main", "v1")
  token: str | None = None
  is_gated: bool = False
  cut_after: int | None = None
  asked: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def serving(hub):
  """Yields the server's address."""

  class Handler(server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
      _answer(self, hub, has_body=True)

    def do_HEAD(self):
      _answer(self, hub, has_body=False)

    def log_message(self, *_):
      pass

  with server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
      yield f"http://127.0.0.1:{http.server_port}"
    finally:
      http.shutdown()
      thread.join()


def _answer(handler, hub, *, has_body):
  path = urllib.parse.unquote(handler.path.partition("?")[0])
  hub.asked.append((path, handler.headers.get("Range")))
  if error := _denied(handler, hub, path):
    return _send(handler, b"{}", has_body, *error)
  api, files = f"/api/models/{hub.name}", f"/{hub.name}/resolve/"
  if path.startswith(files):
    _, _, name = path.removeprefix(files).partition("/")
    return _send_file(handler, hub, name, has_body)
  kind, _, revision = path.removeprefix(api + "/").partition("/")
  if kind == "tree":
    found = [
        {"type": "file", "path": n, "size": len(b), "oid": _etag(b)}
        for n, b in hub.files.items()
    ]
  else:
    siblings = [{"rfilename": name} for name in hub.files]
    found = {"id": hub.name, "sha": COMMIT, "siblings": siblings}
  _send(handler, json.dumps(found).encode(), has_body)


def _denied(handler, hub, path):
  """Status and code of a refusal; None lets through."""
  if hub.name not in path:
    return 401, "RepoNotFound"
  given = handler.headers.get("Authorization")
  if hub.is_gated:
    return 403, "GatedRepo"
  if hub.token is not None and given != f"Bearer {hub.token}":
    return 401, "RepoNotFound"
  _, _, revision = path.partition("/revision/")
  if revision and revision not in (*hub.revisions, COMMIT):
    return 404, "RevisionNotFound"
  return None


def _send(handler, body, has_body, status=200, code=None):
  handler.send_response(status)
  handler.send_header("Content-Type", "application/json")
  handler.send_header("Content-Length", str(len(body)))
  if code is not None:
    handler.send_header("X-Error-Code", code)
  handler.end_headers()
  if has_body:
    handler.wfile.write(body)


def _send_file(handler, hub, name, has_body):
  if name not in hub.files:
    return _send(handler, b"", has_body, 404, "EntryNotFound")
  whole, asked = hub.files[name], handler.headers.get("Range")
  start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
  body = whole[start:]
  handler.send_response(206 if asked else 200)
  handler.send_header("Content-Length", str(len(body)))
  handler.send_header("ETag", f'"{_etag(whole)}"')
  handler.send_header("X-Repo-Commit", COMMIT)
  handler.send_header("Accept-Ranges", "bytes")
  if asked:
    end = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
    handler.send_header("Content-Range", end)
  handler.end_headers()
  if not has_body:
    return
  is_cut = hub.cut_after is not None and name.endswith(".safetensors")
  handler.wfile.write(body[: hub.cut_after] if is_cut else body)
  if is_cut:
    handler.wfile.flush()
    handler.connection.shutdown(2)
    handler.close_connection = True


def _etag(content):
  return hashlib.sha1(content).hexdigest()
