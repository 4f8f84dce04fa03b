"""The few answers of the Hugging Face Hub that a download asks for, on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = 'c0ffee' * 6 + 'beef'
ERRORS = {'private': (401, 'RepoNotFound'), 'gone': (404, 'RepoNotFound'), 'gated': (403, 'GatedRepo'), 'forbidden': (403, '')}


class Hub(BaseHTTPRequestHandler):
    """The repositories of `server.folder`: folder/ORG/NAME, each with one commit; ORG of ERRORS has none but the error."""

    protocol_version = 'HTTP/1.1'

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *_):
        pass

    def answer(self, body: bool):
        path = self.path.partition('?')[0].strip('/')
        self.server.seen.append((self.command, path, self.headers.get('Authorization')))
        parts = path.removeprefix('api/models/').split('/')
        if parts[0] in ERRORS:
            return self.send(*ERRORS[parts[0]])
        repository, rest = self.server.folder.joinpath(*parts[:2]), parts[2:]
        if not repository.is_dir() or len(parts) < 2:
            return self.send(404, 'RepoNotFound')
        if len(rest) > 1 and rest[1] not in ('main', COMMIT):
            return self.send(404, 'RevisionNotFound')
        if rest[:1] == ['resolve']:
            file = repository.joinpath(*rest[2:])
            return self.send(200, '', file.read_bytes(), body) if file.is_file() else self.send(404, 'EntryNotFound')
        files = sorted(p for p in repository.rglob('*') if p.is_file())
        names = [str(p.relative_to(repository)) for p in files]
        if rest[:1] == ['tree']:
            answer = [{'type': 'file', 'path': n, 'size': p.stat().st_size, 'oid': etag(p.read_bytes())}
                      for n, p in zip(names, files, strict=True)]
        else:
            answer = {'id': '/'.join(parts[:2]), 'sha': COMMIT, 'siblings': [{'rfilename': n} for n in names]}
        self.send(200, '', json.dumps(answer).encode(), body)

    def send(self, status: int, error: str, data: bytes = b'', body: bool = True):
        self.send_response(status)
        self.send_header('X-Repo-Commit', COMMIT)
        self.send_header('ETag', f'"{etag(data)}"')
        self.send_header('Content-Length', str(len(data)))
        if error:
            self.send_header('X-Error-Code', error)
        self.end_headers()
        if body:
            self.wfile.write(data)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve(folder: Path):
    """(address, what was asked: method, path and Authorization each) while it runs."""
    with ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
        server.folder, server.seen, server.daemon_threads = folder, [], True
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05})
        thread.start()
        try:
            yield f'http://127.0.0.1:{server.server_port}', server.seen
        finally:
            server.shutdown()
            thread.join()
