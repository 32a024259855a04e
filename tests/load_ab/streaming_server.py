"""Stands in for a server: streams answers as SGLang's /generate does and keeps what it was asked and when."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StreamingServer:
    """`answer(body)` gives the last chunk's meta_info keys to change; step_s: seconds a token. A context manager."""

    def __init__(self, answer=lambda body: {}, step_s=0.02):
        self.asked, self.spans = [], []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._head("application/json")
                self.wfile.write(json.dumps({"internal_states": [{}]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                began = time.perf_counter()
                self._head("text/event-stream")
                tokens = body["sampling_params"]["max_new_tokens"]
                for made in range(1, tokens + 1):
                    time.sleep(step_s)
                    meta = {"prompt_tokens": len(body["input_ids"]), "cached_tokens": 7, "completion_tokens": made, "finish_reason": None}
                    meta |= answer(body) if made == tokens else {}
                    # The first token has no text, as a piece of a character has none.
                    chunk = json.dumps({"text": "" if made == 1 else "x" * made, "meta_info": meta})
                    self.wfile.write(f"data: {chunk}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")
                with outer.lock:
                    outer.asked.append(body | {"routing": self.headers.get("X-SMG-Routing-Key")})
                    outer.spans.append((tuple(body["input_ids"]), began, time.perf_counter()))

            def _head(self, kind):
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def check_alive(self):
        pass

    def span(self, prompt):
        """(begin, end) of the request with this prompt."""
        return next((began, ended) for asked, began, ended in self.spans if asked == prompt)

    def most_at_once(self):
        return max(sum(b <= began < e for _, b, e in self.spans) for _, began, _ in self.spans)
