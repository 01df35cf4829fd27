"""Every setting: where it may come from, what is refused and with which words, and what is never shown."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ocserve import config
from ocserve.config import Auth, ConfigError, load, resolve_key

KEY = "correct-horse-battery"


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("")
    return path


def refusal(toml: Path, text: str = "", environ: dict[str, str] | None = None, **flags: object) -> ConfigError:
    toml.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load({name.replace("__", "."): value for name, value in flags.items()}, environ=environ or {}, path=toml)
    return refused.value


def test_defaults_are_the_tree(toml: Path) -> None:
    settings = load(environ={}, path=toml)
    assert settings.config == config.Config()
    assert set(settings.origins.values()) == {"default"}
    assert settings.config.server.port == 11711


def test_every_setting_has_a_description_a_variable_and_a_type_that_is_understood() -> None:
    settings = config.catalogue()
    assert len({setting.variable for setting in settings.values()}) == len(settings) > 30
    for setting in settings.values():
        assert len(setting.description) > 10, setting.name
        assert not setting.description.endswith("."), setting.name
    assert {name for name in settings if any(word in name for word in ("key", "token", "secret", "password"))} == {
        *config.SECRETS,
        *("auth.key_file", "auth.keys_file", "limits.tokens_per_minute", "limits.tokens_per_day"),
        *("engine.pool_tokens", "engine.batch_tokens"),
    }


@pytest.mark.parametrize("strongest", range(4))
def test_the_strongest_source_wins_and_is_named(toml: Path, strongest: int) -> None:
    toml.write_text("[server]\nport = 1\n" if strongest >= 1 else "")
    environ = {"OCSERVE_SERVER_PORT": "2"} if strongest >= 2 else {}
    settings = load({"server.port": 3 if strongest >= 3 else None}, environ=environ, path=toml)
    assert settings.config.server.port == [11711, 1, 2, 3][strongest]
    assert settings.origins["server.port"] == ["default", "config.toml", "OCSERVE_SERVER_PORT", "flag"][strongest]


def test_every_setting_can_be_set_from_the_environment(toml: Path) -> None:
    values = {
        "server.unknown_parameters": "ignore",
        "auth.anonymous": "false",
        "engine.require_gpu": "true",
        "engine.kv_type": "q8_0",
        "engine.flash_attention": "off",
        "images.fetch": "public",
        "model.serve_installed": "false",
        "engine.prefill_order": "joint",
        "engine.prefix_cache": "false",
        "engine.fast_forward": "false",
        "engine.speculation": "off",
        "billing.unpriced": "refuse",
        "billing.cancelled": "free",
        "billing.failed": "used",
        "ledger.use": "on",
        "log.level": "debug",
        "log.format": "json",
        "policy.checks": "prompt,answer",
        "policy.on_failure": "allow",
        "policy.streams": "pass",
        "operator.locations": "DE,FI",
        "otel.sample_ratio": "0.7",
        "auth.api_key": KEY,
        "server.trusted_proxies": "10.0.0.7",
        "limits.models": '[{"model": "tiny", "requests_per_day": 7}]',
    }
    environ = {setting.variable: values.get(name, "7") for name, setting in config.catalogue().items()}
    settings = load(environ=environ, path=toml)
    assert settings.origins == {name: setting.variable for name, setting in config.catalogue().items()}
    assert settings.config.server.trusted_proxies == ("10.0.0.7",)
    assert settings.config.auth.anonymous is False
    assert settings.config.store.directory == Path("7")
    assert settings.config.server.drain_s == 7.0


def test_values_of_all_kinds_come_from_the_file(toml: Path) -> None:
    toml.write_text(
        '[server]\ncors_origins = ["https://a.example", "https://b.example"]\nheader_timeout_s = 3\n'
        '[auth]\nkey_file = "~/key"\nanonymous = false\n[model]\naliases = []\n'
    )
    tree = load(environ={}, path=toml).config
    assert tree.server.cors_origins == ("https://a.example", "https://b.example")
    assert tree.server.header_timeout_s == 3.0
    assert tree.auth.key_file == Path("~/key").expanduser()


def test_relative_paths_are_from_the_folder_of_the_file_that_names_them(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    toml.write_text(
        '[policy]\ntext = "policy.md"\ncommand = ["hooks/judge", "a/b"]\n[billing]\nprices = "/srv/prices.toml"\n'
        '[log]\nfile = "../log"\n[store]\ndirectory = "models"\n[auth]\nkey_file = "~/key"\n'
    )
    tree = load(environ={}, path=Path("../config.toml")).config
    folder = elsewhere / ".."
    assert (tree.policy.text, tree.log.file) == (folder / "policy.md", folder / ".." / "log")
    assert tree.policy.command == (str(folder / "hooks/judge"), "a/b")
    assert (tree.billing.prices, tree.auth.key_file) == (Path("/srv/prices.toml"), Path("~/key").expanduser())
    assert tree.store.directory == folder / "models"
    from_elsewhere = {"OCSERVE_POLICY_TEXT": "policy.md", "OCSERVE_POLICY_COMMAND": "./judge,a/b"}
    tree = load({"log.file": "log"}, environ=from_elsewhere, path=toml).config
    assert (tree.policy.text, tree.log.file) == (Path("policy.md"), Path("log"))
    assert tree.policy.command == (str(elsewhere / "judge"), "a/b")
    toml.write_text('[policy]\ncommand = ["judge", "a/b"]\n')
    assert load(environ={}, path=toml).config.policy.command == ("judge", "a/b")


def test_lists_are_written_with_commas_in_the_environment(toml: Path) -> None:
    settings = load(environ={"OCSERVE_MODEL_ALIASES": " a, b ,,c"}, path=toml)
    assert settings.config.model.aliases == ("a", "b", "c")


def test_what_a_list_may_hold_is_said(toml: Path) -> None:
    refused = refusal(toml, '[policy]\nchecks = ["prompts"]\n')
    assert "expected a list of prompt, answer" in refused.message
    assert "expected a list of texts" in refusal(toml, '[operator]\nlocations = ["Finland"]\n').message


def test_limits_of_models_are_tables(toml: Path) -> None:
    toml.write_text("[limits]\nrequests_per_minute = 60\n[[limits.models]]\nmodel = 'big'\ntokens_per_day = 1000\n")
    (found,) = load(environ={}, path=toml).config.limits.models
    assert (found.model, found.tokens_per_day, found.requests_per_minute) == ("big", 1000, None)
    for wrong in ("model = 'big'\nrpm = 5", "tokens_per_day = 5", "model = 'big'\ntokens_per_day = 0"):
        assert "tables with requests_per_minute" in refusal(toml, f"[[limits.models]]\n{wrong}\n").message
    assert "a JSON list" in refusal(toml, environ={"OCSERVE_LIMITS_MODELS": "big=5"}).message


def test_an_empty_variable_is_absent(toml: Path) -> None:
    settings = load(environ={"OCSERVE_SERVER_PORT": "", "OCSERVE_API_KEY": " ", "HF_TOKEN": ""}, path=toml)
    assert set(settings.origins.values()) == {"default"}


def test_variables_with_names_of_their_own_are_weaker_than_the_full_name(toml: Path) -> None:
    environ = {"OCSERVE_API_KEY": KEY, "HF_TOKEN": "hf_1", "HF_ENDPOINT": "http://mirror"}
    settings = load(environ=environ, path=toml)
    assert (settings.config.auth.api_key, settings.origins["auth.api_key"]) == (KEY, "OCSERVE_API_KEY")
    assert (settings.config.store.hub_token, settings.origins["store.hub_token"]) == ("hf_1", "HF_TOKEN")
    assert settings.config.store.hub_endpoint == "http://mirror"
    both = {**environ, "OCSERVE_STORE_HUB_TOKEN": "hf_2", "OCSERVE_STORE_HUB_ENDPOINT": "http://own"}
    settings = load(environ=both, path=toml)
    assert settings.config.store.hub_token == "hf_2"
    assert settings.origins["store.hub_endpoint"] == "OCSERVE_STORE_HUB_ENDPOINT"


def test_the_file_can_be_named_by_a_variable_and_must_then_exist(toml: Path, tmp_path: Path) -> None:
    toml.write_text("[server]\nport = 5\n")
    assert load(environ={"OCSERVE_CONFIG": str(toml)}).config.server.port == 5
    with pytest.raises(ConfigError, match="does not exist"):
        load(environ={"OCSERVE_CONFIG": str(tmp_path / "absent.toml")})


@pytest.mark.parametrize(
    ("text", "environ", "flags", "words", "hint"),
    [
        ("[server]\nprot = 1", {}, {}, "unknown setting `server.prot`", "`server.port`"),
        ("[sever]\nport = 1", {}, {}, "unknown section [sever]", "`server`"),
        ("port = 1", {}, {}, "unknown section [port]", ""),
        ("server = 1", {}, {}, "must be a table", ""),
        ("", {"OCSERVE_SERVER_PROT": "1"}, {}, "OCSERVE_SERVER_PROT", "`OCSERVE_SERVER_PORT`"),
        ("", {"OCSERVE_APIKEY": "x"}, {}, "OCSERVE_APIKEY", "`OCSERVE_API_KEY`"),
        ("", {}, {"server__hots": "x"}, "server.hots", "`server.host`"),
        ("[server]\nport = '1'", {}, {}, "server.port from {toml}: expected a whole number", "port to listen on"),
        ("[server]\nport = 70000", {}, {}, "expected a whole number from 0 to 65535", ""),
        ("[server]\nport = true", {}, {}, "expected a whole number", ""),
        ("[server]\nport = [1]", {}, {}, "expected a whole number", ""),
        ("[server]\ndrain_s = 0", {}, {}, "expected a number above 0", ""),
        ("[server]\ndrain_s = inf", {}, {}, "expected a finite number", ""),
        ("[server]\ndrain_s = nan", {}, {}, "expected", ""),
        ("[server]\ncors_origins = 'https://a'", {}, {}, "expected a list of texts, none of them empty", ""),
        ("[server]\nhost = ''", {}, {}, "expected text that is not empty", ""),
        ("[log]\nlevel = 'loud'", {}, {}, "expected one of debug, info, warning, error", ""),
        ("", {"OCSERVE_LIMITS_QUEUE": "-1"}, {}, "limits.queue from OCSERVE_LIMITS_QUEUE: expected a whole number", ""),
        ("", {"OCSERVE_AUTH_ANONYMOUS": "maybe"}, {}, "expected true or false", ""),
        ("", {}, {"engine__context": 0}, "from the command line: expected a whole number from 1 to 2147483647", ""),
        ("[engine]\ngpu_layers = 'all'", {}, {}, "expected a whole number from -1 to 9999", ""),
        ("[store]\ndirectory = 1", {}, {}, "expected a path", ""),
        ("[model]\ndefault = 1", {}, {}, "expected text that is not empty", ""),
        ("[server\n", {}, {}, "is not valid TOML", ""),
        ("", {"OCSERVE_API_KEY": "short"}, {}, "auth.api_key from OCSERVE_API_KEY: a key needs at least 16", "secrets"),
        ("[auth]\napi_key = 'short'", {}, {}, "auth.api_key from config.toml: a key needs at least 16", "secrets"),
        ("", {"OCSERVE_SERVER_TRUSTED_PROXIES": "::1,nginx"}, {}, "PROXIES: expected IP addresses or", "/8"),
    ],
)
def test_what_is_wrong_is_named_with_its_origin_and_what_was_expected(
    toml: Path, text: str, environ: dict[str, str], flags: dict[str, object], words: str, hint: str
) -> None:
    error = refusal(toml, text, environ, **flags)
    assert words.format(toml=toml) in error.message
    assert hint in (error.hint or "")


def test_secrets_are_shown_nowhere(toml: Path) -> None:
    toml.write_text(f'[auth]\napi_key = "{KEY}-CANARY"\n[store]\nhub_token = "CANARY"\n')
    settings = load(environ={}, path=toml)
    shown = {name: value for name, value, _ in settings}
    assert shown["auth.api_key"] == shown["store.hub_token"] == "set"
    for text in (repr(settings), str(settings), repr(settings.config), str(list(settings)), repr(settings.config.auth)):
        assert "CANARY" not in text
    assert config.masked("auth.api_key", None) == "unset"


def test_a_secret_in_the_wrong_place_is_not_repeated(toml: Path) -> None:
    error = refusal(toml, "[server]\nport = 'CANARY'\n[log]\nlevel = 'CANARY'")
    assert "CANARY" not in error.message
    error = refusal(toml, "", {"OCSERVE_LOG_LEVEL": "CANARY"})
    assert "CANARY" not in error.message + (error.hint or "")


def test_settings_are_frozen(toml: Path) -> None:
    settings = load(environ={}, path=toml)
    with pytest.raises(AttributeError):
        settings.config.server.port = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        settings.origins["server.port"] = "flag"  # type: ignore[index]


def test_a_key_comes_from_the_setting_or_the_first_line_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\nsecond line\n")
    file.chmod(0o600)
    assert resolve_key(Auth()) is None
    assert resolve_key(Auth(key_file=file)) == KEY
    assert resolve_key(Auth(api_key=KEY[::-1], key_file=file)) == KEY[::-1]


@pytest.mark.parametrize(
    "key", ["", "short", "x" * 15, "has a space in the key", "tab\tinside-the-key-", "clé-clé-clé-clé-"]
)
def test_a_weak_or_unsendable_key_is_refused_without_repeating_it(tmp_path: Path, key: str) -> None:
    file = tmp_path / "key"
    file.write_text(key + "\n", encoding="utf-8")
    file.chmod(0o600)
    for auth in [Auth(key_file=file)] + ([Auth(api_key=key)] if key else []):
        with pytest.raises(ConfigError) as refused:
            resolve_key(auth)
        assert not key or key not in refused.value.message


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(mode)
    with pytest.raises(ConfigError, match="others may read") as refused:
        resolve_key(Auth(key_file=file))
    assert "chmod 600" in (refused.value.hint or "")


def test_a_key_file_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe" * 20)
    binary.chmod(0o600)
    for file in (tmp_path / "absent", tmp_path, binary):
        tmp_path.chmod(0o700)
        with pytest.raises(ConfigError, match=r"auth\.key_file"):
            resolve_key(Auth(key_file=file))


def test_the_engine_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OCSERVE_API_KEY", "OCSERVE_AUTH_API_KEY", "OCSERVE_STORE_HUB_TOKEN", "HF_TOKEN")
    for name, value in itertools.zip_longest(names, (), fillvalue="CANARY"):
        monkeypatch.setenv(name, value)
    environment = config.engine_environment()
    assert "CANARY" not in environment.values()
    assert environment["PATH"] == os.environ["PATH"]


def test_importing_the_settings_is_cheap() -> None:
    code = "import sys, ocserve.config; print([m for m in ('platformdirs', 'click', 'structlog') if m in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
