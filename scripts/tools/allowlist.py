"""What a served model's port answers: an allowlist in front of vLLM's API server.

vLLM 0.32's own API key guards /v1 and little more: /invocations, /tokenize, /pause,
/update_weights and others answer anyone. Given to vLLM as
`--middleware scripts.tools.allowlist.Guard`.
"""

import hmac
import json
import os

OPEN = ("/health",)
KEYED = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/metrics")


class Guard:
    """Answer /health for everyone, the API and metrics with the key, nothing else (ASGI)."""

    def __init__(self, app):
        self.app, self.key = app, os.environ["VLLM_API_KEY"]

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or scope.get("path") in OPEN:
            return await self.app(scope, receive, send)
        if scope["type"] != "http" or scope["path"] not in KEYED:
            return await self._refuse(send, 404, "not found")
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            return await self._refuse(send, 401, "missing or wrong API key")
        return await self.app(scope, receive, send)

    @staticmethod
    async def _refuse(send, status: int, message: str) -> None:
        body = json.dumps({"error": {"message": message, "code": status}}).encode()
        length = str(len(body)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
