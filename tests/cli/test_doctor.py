"""`ocserve doctor`: each verdict follows from what is there, and nothing that is broken breaks the doctor."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ocserve import config
from ocserve.catalog import planning
from ocserve.catalog.store import Store
from ocserve.cli import doctor, main
from ocserve.cli.doctor import Verdict
from ocserve.engine import devices
from ocserve.machine import Device, HostMemory, LlamaFacts
from tests.serving.models import install

CPU = Device("CPU", "a processor", "cpu", 8_000_000_000, 16_000_000_000)
GPU = Device("CUDA0", "a GPU", "gpu", 70_000_000_000, 80_000_000_000)


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub on loopback that answers everything."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCSERVE_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text("")
    monkeypatch.setenv("OCSERVE_STORE_DIRECTORY", str(tmp_path / "models"))
    monkeypatch.setenv("OCSERVE_LEDGER_DIRECTORY", str(tmp_path / "ledger"))
    monkeypatch.setenv("OCSERVE_AUTH_KEYS_FILE", str(tmp_path / "keys.json"))
    monkeypatch.setenv("OCSERVE_STORE_HUB_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OCSERVE_STORE_HUB_TIMEOUT_S", "1")
    monkeypatch.setenv("OCSERVE_SERVER_PORT", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def facts(*devices: Device, offload: bool) -> LlamaFacts:
    return LlamaFacts("1.0", offload, "CPU : AVX = 1 | AVX2 = 1 | AVX512 = 0 | ", devices)


def test_the_whole_examination_without_any_source() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 1
    verdicts = {each["check"]: each for each in json.loads(result.output)["verdicts"]}
    assert set(verdicts) >= {"python", "versions", "llama.cpp", "gpu", "memory", "models", "hub", "package index"}
    assert set(verdicts) >= {"settings", "model", "sources", "access", "address", "processor", "device"}
    assert verdicts["llama.cpp"]["verdict"] == "ok"
    assert verdicts["hub"]["verdict"] == verdicts["package index"]["verdict"] == "warn"
    assert verdicts["sources"]["verdict"] == "fail"
    assert "smollm2:135m" in verdicts["model"]["message"]
    assert "context 8192" in verdicts["model"]["message"]


def test_one_line_for_each_verdict_and_0_when_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict("one", "ok", "fine"), Verdict("two", "warn", "so so", "do this")]
    monkeypatch.setattr(doctor, "examine", lambda: verdicts)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert result.output == "ok    one  fine\nwarn  two  so so\n           hint: do this\n"
    monkeypatch.setattr(doctor, "examine", lambda: [*verdicts, Verdict("three", "fail", "broken")])
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 1


def test_wrong_settings_are_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCSERVE_SERVER_PROT", "1")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "fail  settings" in result.output
    assert "OCSERVE_SERVER_PORT" in result.output


@pytest.mark.parametrize(
    ("file", "content", "check", "words"),
    [
        ("config.toml", b"[server]\nport = ", "settings", "config.toml"),
        ("config.toml", b"[server]\nport = 'http'\n", "settings", "server.port"),
        ("keys.json", b"{", "keys", "keys.json"),
        ("ledger/ledger.db", b"no ledger at all" * 100, "ledger", "file is not a database"),
        ("ledger", b"a file", "ledger", "is not a folder"),
        ("models", b"a file", "models", "models"),
    ],
)
def test_a_broken_file_fails_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes, check: str, words: str
) -> None:
    """Whatever else fails here is for want of a network."""
    monkeypatch.setattr(doctor, "check_llama", list)
    monkeypatch.setattr(doctor, "check_index", lambda _: Verdict("package index", "ok", ""))
    monkeypatch.setenv("OCSERVE_LEDGER_USE", "on")
    whole = CliRunner().invoke(main, ["doctor", "--json"])
    assert whole.exit_code == 0, whole.output
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    broken = CliRunner().invoke(main, ["doctor", "--json"])
    assert broken.exit_code == 1, broken.output
    failed = {each["check"]: each for each in json.loads(broken.output)["verdicts"] if each["verdict"] == "fail"}
    assert words in failed[check]["message"]
    assert set(failed) <= {check, *{"models": ("sources", "model"), "keys": ("access",)}.get(check, ())}
    assert (tmp_path / file).read_bytes() == content


def test_limits_and_prices_of_models_that_would_not_be_served_are_named(tmp_path: Path, tiny_model: Path) -> None:
    store = config.load().config.store
    name = install(Store(store), "mine", tiny_model).name
    prices = tmp_path / "prices.toml"
    listed = [f'[[price]]\nmodel = "{each}"\nprompt = "0.1"\ncompletion = "0.2"\n' for each in (name, "typo")]
    prices.write_text("".join(listed))
    limits = config.Limits(models=(config.ModelLimits(model="nobody"), config.ModelLimits(model=name)))
    tree = config.Config(store=store, limits=limits, billing=config.Billing(prices=prices))
    found = doctor.check_names(tree)
    assert [(each.check, each.verdict, each.message.split()[0]) for each in found] == [
        ("limits.models", "warn", "nobody"),
        ("billing.prices", "warn", "typo"),
    ]
    assert doctor.check_names(config.Config(store=store)) == []


def test_a_gpu_that_is_not_used_is_loud() -> None:
    *_, gpu = doctor.judge_llama(facts(CPU, offload=False), ["NVIDIA"])
    assert gpu.verdict == "warn"
    assert "NVIDIA" in gpu.message
    assert "GPU" in (gpu.hint or "")


def test_a_gpu_that_is_used_and_a_machine_without_one_are_fine() -> None:
    *_, gpu = doctor.judge_llama(facts(CPU, GPU, offload=True), ["NVIDIA"])
    assert (gpu.verdict, gpu.message) == ("ok", "models run on CUDA0")
    *_, gpu = doctor.judge_llama(facts(CPU, offload=False), [])
    assert gpu.verdict == "ok"
    build, device, _ = doctor.judge_llama(facts(CPU, offload=False), [])
    assert build.message == "1.0, AVX AVX2"
    assert "8.0 GB free of 16.0 GB" in device.message


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import sys; print('libcuda.so.1 is missing', file=sys.stderr); sys.exit(3)", "exit status 3, libcuda.so.1"),
        ("print('nonsense')", "cannot be used"),
    ],
)
def test_native_code_that_breaks_is_a_verdict(code: str, words: str) -> None:
    (verdict,) = doctor.check_llama([sys.executable, "-c", code])
    assert verdict.verdict == "fail"
    assert words in verdict.message


def test_native_code_that_hangs_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "PROBE_TIMEOUT_S", 0.2)
    (verdict,) = doctor.check_llama([sys.executable, "-c", "import time; time.sleep(60)"])
    assert verdict.verdict == "fail"


def test_a_hub_that_answers(hub: str) -> None:
    assert doctor.check_hub(config.Store(hub_endpoint=hub, hub_timeout_s=2.0)).verdict == "ok"


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "nonsense", "http://[", "ftp://x"])
def test_a_hub_that_does_not(endpoint: str) -> None:
    assert doctor.check_hub(config.Store(hub_endpoint=endpoint, hub_timeout_s=1.0)).verdict == "warn"


def test_sources_need_one_way_to_a_model() -> None:
    store = config.load().config.store
    good, bad = Verdict("hub", "ok", ""), Verdict("package index", "warn", "")
    assert doctor.check_sources(store, good, bad)[0].verdict == "ok"
    assert doctor.check_sources(store, bad, bad)[0].verdict == "fail"
    (only_index,) = doctor.check_sources(store, bad, good)
    assert only_index.verdict == "ok"
    assert "only smollm2:135m" in only_index.message


def test_a_damaged_model_is_a_verdict(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "a-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    room, damaged = doctor.check_store(config.load().config.store)
    assert (room.verdict, damaged.verdict) == ("ok", "warn")
    assert folder.name in str(damaged.hint)


def test_a_model_that_does_not_fit_or_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(name: str) -> Verdict:
        settings = config.Config(model=config.Model(default=name), store=config.load().config.store)
        return doctor.check_model(settings)[0]

    memory = HostMemory(total_bytes=10**10, available_bytes=6 * 10**8)
    monkeypatch.setattr(doctor.machine, "host_memory", lambda: memory)
    assert verdict("smollm2:135m").verdict == "warn"
    assert verdict("qwen3:32b").verdict == "fail"
    assert verdict("no-such-model").verdict == "fail"
    assert verdict("hf:owner/repo").verdict == "warn"


def test_show_states_the_same_need(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setenv("OCSERVE_MODEL_DEFAULT", "tiny")
    settings = config.load().config
    install(Store(settings.store), "tiny", tiny_model)

    def told(available: int) -> tuple[Any, list[Verdict]]:
        memory = HostMemory(total_bytes=10**10, available_bytes=available)
        monkeypatch.setattr(doctor.machine, "host_memory", lambda: memory)
        monkeypatch.setattr(planning, "host_memory", lambda: memory)
        shown = CliRunner().invoke(main, ["show", "tiny", "--json"])
        return json.loads(shown.stdout)["memory"], doctor.check_model(settings)

    roomy, (verdict,) = told(8 * 10**9)
    whole = roomy["need"]["host_bytes"]
    assert f"needs about {whole / 1e9:.1f} GB of memory" in verdict.message
    assert roomy["remarks"] == []
    lowered, (verdict, warning) = told(whole - roomy["need"]["host_cache_bytes"] // 2)
    assert lowered["need"]["host_bytes"] < whole - 10**8
    assert f"needs about {lowered['need']['host_bytes'] / 1e9:.1f} GB of memory" in verdict.message
    assert lowered["remarks"] == [warning.message]
    none, (verdict,) = told(10**6)
    assert none["need"]["host_bytes"] > 10**8
    assert verdict.message.endswith(none["remarks"][0])


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = config.Config(server=config.Server(port=taken.getsockname()[1]))
        access, address = doctor.check_address(settings)
    assert access.verdict == "ok"
    assert address.verdict == "warn"
    assert "--port 0" in (address.hint or "")
    assert address.message.count("127.0.0.1") == 1


def test_an_open_address_without_a_key_fails() -> None:
    (verdict,) = doctor.check_address(config.Config(server=config.Server(host="0.0.0.0")))
    assert verdict.verdict == "fail"
    assert "OCSERVE_API_KEY" in (verdict.hint or "")


def test_a_folder_that_cannot_be_made_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (verdict,) = doctor.check_store(config.Store(directory=tmp_path / "file" / "models"))
    assert (verdict.verdict, "is not a folder" in verdict.message) == ("fail", True)


def test_only_what_may_hang_is_asked_beside_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere: set[str] = set()

    def noting(name: str, answer: Any) -> Any:
        def check(*_: object) -> Any:
            if threading.current_thread() is not threading.main_thread():
                elsewhere.add(name)
            return answer

        return check

    one = Verdict("x", "ok", "")
    for name, answer in [("llama", []), ("hub", one), ("index", one), ("model", []), ("store", []), ("names", [])]:
        monkeypatch.setattr(doctor, f"check_{name}", noting(name, answer))
    doctor.examine()
    assert elsewhere == {"llama", "hub", "index"}
