"""The published pages: what they say is what the settings do, for people and as JSON, and they hold to one another."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from markdown_it import MarkdownIt
from msgspec.structs import replace

from ocserve import config
from ocserve.accounts.billing import Billing
from ocserve.api import openai_models, openrouter
from ocserve.api.response_schemas import SCHEMAS
from ocserve.config import ConfigError
from ocserve.pages.publication import NOTHING_STATED, Publication
from tests.accounts.books import TODAY, priced
from tests.http.harness import KEY, MODEL, Answer, Served, serving

JSON = {"Accept": "application/json"}
SHAPES = {"/pricing": "Pricing", "/privacy": "Privacy", "/policy": "ContentPolicy", "/support": "Support"}
PRICES = """
[[price]]
model = "tiny"
prompt = "0.00000002"
completion = "0.0000000615"
cached_prompt = "0.000000005"
request = "0.000001"

[[price]]
model = "tiny"
from = 2026-12-01
prompt = "0.00000003"
completion = "0.00000006"

[[price]]
model = "tiny"
from = 2026-01-01
prompt = "0.000000025"
completion = "0.00000006"

[[price]]
model = "another"
prompt = "1"
completion = "1"
"""


def billing(**settings: Any) -> Billing:
    return Billing(config.Billing(**settings), priced(text=PRICES), today=lambda: TODAY)


def stated(tmp_path: Path) -> config.Config:
    """The settings of an operator who states everything."""

    def written(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return config.Config(
        operator=config.Operator(
            name="Acme <Inference>",
            email="help@acme.example",
            locations=("DE", "FI"),
            certifications=("GDPR",),
            terms_url="https://acme.example/terms",
            status_url="https://status.acme.example",
            privacy_text=written("privacy.md", "# Your rights\n\nAsk [us](mailto:help@acme.example)."),
            payment_text=written("payment.md", "Monthly invoices."),
            sla_text=written("sla.md", "99.9 % a month."),
            incident_text=written("incident.md", "Maintenance is announced a week before."),
        ),
        policy=config.Policy(url="https://judge.example/", text=written("policy.md", "- No spam")),
        otel=config.Otel(endpoint="http://127.0.0.1:4318"),
        images=config.Images(fetch="public"),
    )


def read(served: Served, path: str) -> dict[str, Any]:
    """A page as JSON, of the shape that is documented."""
    answer = served.request("GET", path, headers=JSON)
    assert answer.status == 200, answer
    assert answer.headers["content-type"] == "application/json"
    found: dict[str, Any] = answer.json
    jsonschema.validate(found, SCHEMAS[SHAPES[path]])
    return found


def text(answer: Answer) -> str:
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    return answer.body.decode()


def test_prices_are_those_of_the_price_list_in_millions_with_those_announced() -> None:
    with serving(billing=billing(failed="used"), key=KEY) as served:
        found = read(served, "/pricing")
        page = text(served.request("GET", "/pricing"))
    now, then = found["models"]
    assert (found["currency"], found["unit"]) == ("USD", "per million tokens")
    assert (now["id"], now["from"], now["announced"], now["tiers"]) == ("tiny", "2026-01-01", False, [])
    assert now["prices"] == {
        "prompt": "0.025",
        "completion": "0.06",
        "cached_prompt": "0.025",
        "cache_write": "0.025",
        "image": "0",
        "request": "0",
    }
    assert (then["from"], then["announced"], then["prices"]["prompt"]) == ("2026-12-01", True, "0.03")
    assert (found["policy"]["cancelled"], found["policy"]["failed"]) == ("used", "used")
    for said in ("$0.025", "$0.03", "USD", "2026-12-01", "is charged for what it used"):
        assert said in page
    assert "another" not in page  # it is not served


def test_prices_from_always_and_per_piece() -> None:
    early = Billing(config.Billing(cancelled="free"), priced(text=PRICES), today=lambda: datetime.date(2025, 1, 1))
    with serving(billing=early) as served:
        found = read(served, "/pricing")
    assert [each["from"] for each in found["models"]] == [None, "2026-01-01", "2026-12-01"]
    prices = found["models"][0]["prices"]
    assert (prices["completion"], prices["cached_prompt"], prices["request"]) == ("0.0615", "0.005", "0.000001")
    assert found["policy"]["cancelled"] == "free"


def test_a_server_without_prices_says_so() -> None:
    with serving() as served:
        assert read(served, "/pricing")["models"] == []
        page = text(served.request("GET", "/pricing"))
        assert "No prices are published." in page
        assert "own. Of these: A request whose client goes away is charged for what it used" in page
        assert "A request that fails by our fault is not charged" in page


def test_privacy_says_what_the_settings_keep(tmp_path: Path) -> None:
    with serving(publication=Publication.of(stated(tmp_path)), key=KEY) as served:
        found = read(served, "/privacy")
        page = text(served.request("GET", "/privacy"))
    assert (found["training_on_prompts"], found["training_on_completions"]) == (False, False)
    ledger, log, stored, repeats, memory, disk = found["retention"]
    assert (ledger["days"], ledger["content"]) == (400, False)
    assert not log["content"]
    assert (stored["seconds"], stored["content"], stored["on_disk"]) == (86400, True, False)
    assert repeats["seconds"] == 86400
    assert memory["content"]
    assert (disk["content"], disk["on_disk"]) == (True, True)
    assert found["zero_data_retention"] is False
    hook, hosts, collector = found["disclosed"]
    assert hosts["what"] == ["these addresses"]
    assert (hook["content"], hook["what"]) == (True, ["prompts", "answers"])
    assert collector["content"] is False
    assert found["operator"]["locations"] == ["DE", "FI"]
    assert "ocserve privacy purge" in found["deletion"]
    assert "help@acme.example" in found["deletion"]
    assert "is not kept by key on disk" in found["deletion"]
    assert "Everything" not in found["deletion"]
    for said in ("Acme &lt;Inference&gt;", "400 days", "DE, FI", "GDPR", "Your rights", "Nothing is trained"):
        assert said in page


def test_privacy_follows_the_settings() -> None:
    tree = config.Config(
        server=config.Server(stored_responses=0),
        ledger=config.Ledger(use="off"),
        cache=config.Cache(disk_bytes=0),
    )
    with serving(publication=Publication.of(tree)) as served:
        found = read(served, "/privacy")
        page = text(served.request("GET", "/privacy"))
    assert [each.get("days") for each in found["retention"]] == [None] * 3
    assert not any("stored" in each["what"] or "ledger" in each["what"] for each in found["retention"])
    assert found["zero_data_retention"] is True
    assert found["disclosed"] == []
    assert "zero data retention" in page
    assert "24 hours, or until the server stops" in page
    assert "Nobody." in page


def test_limits_say_whom_to_ask(tmp_path: Path) -> None:
    with serving(publication=Publication.of(stated(tmp_path)), key=KEY) as served:
        page = text(served.request("GET", "/limits"))
        document = served.request("GET", "/limits", headers=JSON).json
    assert "<p>Ask help@acme.example; a limit" in page
    assert document["raise"].startswith("Ask help@acme.example; ")
    assert "ocserve keys" not in page + document["raise"]
    links_only = config.Config(operator=config.Operator(terms_url="https://acme.example/terms"))
    with serving(publication=Publication.of(links_only), key=KEY) as served:
        page = text(served.request("GET", "/limits"))
    assert "Ask the operator, as Support says" in page
    assert "ocserve keys" not in page
    with serving(publication=Publication(), key=KEY) as served:
        assert "<code>ocserve keys limits NAME" in text(served.request("GET", "/limits"))


def test_the_content_policy_and_what_enforces_it(tmp_path: Path) -> None:
    with serving(publication=Publication.of(stated(tmp_path)), key=KEY) as served:
        found = read(served, "/policy")
        page = text(served.request("GET", "/policy"))
    assert found["text"] == "- No spam"
    assert (found["checks"], found["finish_reason"]) == (["prompt", "answer"], "content_filter")
    for said in ("<li>No spam</li>", "content_filter", "policy_unavailable", "once it has been judged"):
        assert said in page
    assert "judge.example" not in page  # who judges is nobody's business


def test_support_as_it_was_stated(tmp_path: Path) -> None:
    with serving(publication=Publication.of(stated(tmp_path)), key=KEY) as served:
        found = read(served, "/support")
        page = text(served.request("GET", "/support"))
    assert (found["email"], found["sla"]) == ("help@acme.example", "99.9 % a month.")
    assert "announced a week before" in page


@pytest.mark.parametrize("path", ["/policy", "/support"])
def test_what_nobody_has_stated_is_not_there(path: str) -> None:
    with serving(publication=NOTHING_STATED) as served:
        answer = served.request("GET", path)
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert "has" in answer.error["message"]


def test_pages_link_to_those_that_there_are_and_need_no_key(tmp_path: Path) -> None:
    everything = {"docs", "limits", "pricing", "privacy", "status", "policy", "support"}
    for publication, names in (
        (Publication(), everything - {"policy", "support"}),
        (Publication.of(stated(tmp_path)), everything),
    ):
        with serving(publication=publication, key=KEY, auth=config.Auth(anonymous=False)) as served:
            for name in sorted(names):
                links = set(re.findall(r'<a href="(\w+)">', text(served.request("GET", f"/{name}"))))
                assert links | {name} >= names, name
                assert links <= everything, name
                assert (names == everything) == ({"policy", "support"} <= links | {name}), name


def test_browsers_get_pages_and_others_what_they_accept() -> None:
    browser = "text/html,application/xhtml+xml,application/json;q=0.9,*/*;q=0.8"
    with serving() as served:
        for accept, media_type in (
            (browser, "text/html"),
            ("*/*", "text/html"),
            ("application/json", "application/json"),
        ):
            answer = served.request("GET", "/privacy", headers={"Accept": accept})
            assert answer.headers["content-type"].startswith(media_type)
            assert answer.headers["vary"] == "accept"


def test_texts_are_rendered_when_they_are_read_and_never_for_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[str] = []
    parse = MarkdownIt.parse

    def counted(markdown: MarkdownIt, src: str) -> Any:
        rendered.append(src)
        return parse(markdown, src)

    monkeypatch.setattr(MarkdownIt, "parse", counted)
    publication = Publication.of(stated(tmp_path))
    assert len(rendered) == 5, "one for each text"
    with serving(publication=publication, billing=billing()) as served:
        for path in ("/policy", "/privacy", "/pricing", "/support"):
            for _ in range(2):
                assert "<" in text(served.request("GET", path))
                read(served, path)
        assert "<p>Monthly invoices.</p>" in text(served.request("GET", "/pricing"))
    assert len(rendered) == 5


def test_texts_that_cannot_be_published_end_the_start(tmp_path: Path) -> None:
    for data, why in ((b"\xff\xfe", "not UTF-8"), (b"x" * 300_000, "more than"), (None, "cannot read")):
        file = tmp_path / "policy.md"
        file.unlink(missing_ok=True)
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(ConfigError, match=why):
            Publication.of(config.Config(policy=config.Policy(text=file)))


def test_lists_of_models_name_the_countries() -> None:
    model = replace(MODEL, countries=("DE", "FI"))
    places = [{"country_code": "DE"}, {"country_code": "FI"}]
    assert json.loads(openrouter.feed([model]))["data"][0]["datacenters"] == places
    assert "datacenters" not in json.loads(openrouter.feed([MODEL]))["data"][0]
    assert json.loads(openai_models.one(model))["datacenters"] == places
