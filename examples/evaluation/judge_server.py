"""An OpenAI-compatible server that stands in for a judge: to try a benchmark out without any vision-language model.

python examples/evaluation/judge_server.py --port 8001
unialign eval semgen-bench semgen-bench/ --model nano --judge openai:test@http://localhost:8001/v1 --out runs/semgen

Its marks mean nothing, and the calibration of ``unialign eval`` has to say so: ``hash`` (the default) derives them from
the request, so that runs repeat, ``ten`` always gives 10, ``random`` draws them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers chat completions with one object, as the prompts of ``unialign eval`` ask."""

    protocol_version = "HTTP/1.1"
    marks = "hash"

    def do_POST(self) -> None:
        """One chat completion."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.path.endswith("/chat/completions"):
            return self.reply(404, {"error": {"message": f"no {self.path} here; expected /v1/chat/completions"}})
        try:
            request = json.loads(body)
            text = json.dumps([message["content"] for message in request["messages"]])
        except (ValueError, KeyError, TypeError) as error:
            return self.reply(400, {"error": {"message": f"not a chat request: {error}"}})
        hashed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 11
        mark = {"ten": 10, "random": random.randint(0, 10), "hash": hashed}[self.marks]
        message = {"role": "assistant", "content": json.dumps({"reasoning": "none", "score": [mark]})}
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        named = {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": request.get("model", "")}
        return self.reply(200, {**named, "choices": [choice], "usage": usage})

    def reply(self, status: int, data: dict) -> None:
        """Send a JSON answer."""
        sent = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args: object) -> None:
        """Nothing is logged."""


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8001, help="0 takes any free one (default: 8001)")
    parser.add_argument("--marks", choices=("hash", "ten", "random"), default="hash", help="how marks come about")
    args = parser.parse_args()
    Handler.marks = args.marks
    with ThreadingHTTPServer(("127.0.0.1", args.port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
