"""Two clients choose the same X-Request-Id: neither may end, read or disturb the other's generation."""

from __future__ import annotations

from tests.http.harness import CHAT, parse, read_all, serving, wait_for
from tests.scripted import Script, ScriptedEngine


def test_one_clients_request_id_does_not_reach_anothers_generation() -> None:
    with serving(lambda: ScriptedEngine(Script(tokens=("x",) * 40, step_s=0.02))) as served:
        request = served.compose("POST", "/v1/chat/completions", {**CHAT, "stream": True}, {"X-Request-Id": "same"})
        with served.connect() as first, served.connect() as second:
            first.sendall(request)
            wait_for(lambda: served.engine.running == 1)
            second.sendall(request)
            wait_for(lambda: len(served.engine.runs) == 2)
            second.close()
            answer = parse(read_all(first))
        assert len(set(served.engine.runs)) == 2
        assert answer.headers["x-request-id"] == "same"
        assert answer.events[-1] == "[DONE]"
        assert "".join(answer.events).count('"content":"x"') == 40
