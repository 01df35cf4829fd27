"""Every setting, once: a frozen tree of structs, and the only reader of the environment.

A value comes from, weakest first: the default here, `config.toml` in the user's configuration folder, an environment
variable `OCSERVE_<SECTION>_<NAME>`, a command-line flag. `Settings` is the tree with, for each value, where it came
from. A layer is handed its own branch and never sees the whole. Importing this module is cheap; reading files and
finding folders happens in `load`.
"""

from __future__ import annotations

import ipaddress
import math
import os
import stat
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from ocserve.files import only_regular
from ocserve.kinds import SECRETS as SECRETS
from ocserve.kinds import masked as masked
from ocserve.operating import Operator as Operator
from ocserve.operating import Otel as Otel
from ocserve.operating import Policy as Policy
from ocserve.settings import IMAGE_BODY_BYTES as IMAGE_BODY_BYTES
from ocserve.settings import TEXT_BODY_BYTES as TEXT_BODY_BYTES
from ocserve.settings import Allowance as Allowance
from ocserve.settings import Auth as Auth
from ocserve.settings import Billing as Billing
from ocserve.settings import Cache as Cache
from ocserve.settings import Config as Config
from ocserve.settings import Engine as Engine
from ocserve.settings import Images as Images
from ocserve.settings import Ledger as Ledger
from ocserve.settings import Limits as Limits
from ocserve.settings import Log as Log
from ocserve.settings import Model as Model
from ocserve.settings import ModelLimits as ModelLimits
from ocserve.settings import Server as Server
from ocserve.settings import Store as Store

# A random key of 16 characters has at least 64 bits, out of reach of guessing over a network.
MIN_KEY_LENGTH = 16
_LONGEST_KEY_LINE = 4096


class ConfigError(Exception):
    """A setting is unknown, malformed or unusable. `message` names it and its origin, `hint` says what to do."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


# Variables with a name of their own, weaker than the OCSERVE_<SECTION>_<NAME> of the same setting.
_FURTHER_VARIABLES = MappingProxyType(
    {"OCSERVE_API_KEY": "auth.api_key", "HF_TOKEN": "store.hub_token", "HF_ENDPOINT": "store.hub_endpoint"}
)
_CONFIG_VARIABLE = "OCSERVE_CONFIG"


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the tree: its dotted name, its type, its default and what it is for."""

    name: str
    type: Any
    default: object
    description: str

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return "OCSERVE_" + self.name.replace(".", "_").upper()

    @property
    def is_secret(self) -> bool:
        return self.name in SECRETS

    @property
    def fields(self) -> Mapping[str, str]:
        """Of a list of tables what each field of one is for; else nothing."""
        table = get_args(get_args(self.type)[0])[0] if get_origin(self.type) is Annotated and _is_tuple(self) else None
        if not _is_table(table):
            return {}
        return {name: _described(kind) for name, kind in get_type_hints(table, include_extras=True).items()}


def catalogue() -> Mapping[str, Setting]:
    """Every setting by its dotted name, in the order of the tree."""
    settings: dict[str, Setting] = {}
    for section, branch in get_type_hints(Config).items():
        defaults = branch()
        for field, annotation in get_type_hints(branch, include_extras=True).items():
            name = f"{section}.{field}"
            settings[name] = Setting(name, annotation, getattr(defaults, field), _described(annotation))
    return settings


def _described(annotation: Any) -> str:
    metas = annotation.__metadata__ if get_origin(annotation) is Annotated else ()
    return next((meta.description for meta in metas if isinstance(meta, Meta) and meta.description), "")


@dataclass(frozen=True, slots=True)
class Settings:
    """The tree and, for each value, its origin: `default`, `config.toml`, a variable's name or `flag`."""

    config: Config
    origins: Mapping[str, str]
    path: Path

    def __iter__(self) -> Iterator[tuple[str, object, str]]:
        """Each setting as (dotted name, value, origin); a secret's value is `set` or `unset`."""
        for name, origin in self.origins.items():
            section, field = name.split(".")
            yield name, masked(name, getattr(getattr(self.config, section), field)), origin


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    path: Path | None = None,
) -> Settings:
    """Read all sources. `flags` are dotted names, None meaning absent; `path` is a `config.toml` that must exist.

    An empty environment variable counts as absent. Relative paths in the file are from the file's folder, all others
    from the current one. Raises `ConfigError`.
    """
    environ = os.environ if environ is None else environ
    known = catalogue()
    named = path or (Path(environ[_CONFIG_VARIABLE]) if environ.get(_CONFIG_VARIABLE) else None)
    file = named or _default_path()
    values: dict[str, tuple[object, str]] = {name: (setting.default, "default") for name, setting in known.items()}
    for name, value in _from_toml(file, known, must_exist=named is not None).items():
        converted = _converted(known[name], value, str(file), strict=True)
        values[name] = (_anchored(name, converted, file.absolute().parent), "config.toml")
    for name, variable, text in _from_environment(environ, known):
        converted = _converted(known[name], _split(known[name], text), variable, strict=False)
        values[name] = (_anchored(name, converted), variable)
    for name, value in (flags or {}).items():
        if name not in known:
            raise ConfigError(f"unknown setting `{name}`", _nearest(name, known))
        if value is not None:
            values[name] = (_converted(known[name], value, "the command line", strict=False), "flag")
    _check_meaning(values)
    return Settings(_tree(values), MappingProxyType({name: origin for name, (_, origin) in values.items()}), file)


def resolve_key(auth: Auth) -> str | None:
    """The key that callers must present, or None when there is none. Raises `ConfigError` for one that is not safe."""
    if auth.api_key is not None:
        return _safe_key(auth.api_key, "auth.api_key")
    if auth.key_file is not None:
        return _safe_key(_key_from_file(auth.key_file), f"auth.key_file ({auth.key_file})")
    return None


def _safe_key(key: str, origin: str) -> str:
    hint = "make one with: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
    if len(key) < MIN_KEY_LENGTH:
        raise ConfigError(f"{origin}: a key needs at least {MIN_KEY_LENGTH} characters", hint)
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(f"{origin}: a key may hold only visible ASCII characters and no spaces", hint)
    return key


def _key_from_file(file: Path) -> str:
    try:
        with open(file, encoding="utf-8", opener=only_regular) as lines:
            if os.name == "posix" and os.fstat(lines.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(f"auth.key_file: others may read {file}", f"chmod 600 {file}")
            return lines.readline(_LONGEST_KEY_LINE).strip()
    except OSError as error:
        raise ConfigError(f"auth.key_file: cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"auth.key_file: {file} is not text") from None


def _check_meaning(values: Mapping[str, tuple[object, str]]) -> None:
    """Refuse what has the right type and cannot be used, while its origin is known."""
    key, origin = values["auth.api_key"]
    if isinstance(key, str):
        _safe_key(key, f"auth.api_key from {origin}")
    proxies, origin = values["server.trusted_proxies"]
    assert isinstance(proxies, tuple)
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy, strict=False)
        except ValueError:
            raise ConfigError(
                f"server.trusted_proxies from {origin}: expected IP addresses or networks",
                "for example 127.0.0.1, ::1 or 10.0.0.0/8",
            ) from None


def _default_path() -> Path:
    from platformdirs import user_config_path  # not needed for `--help`

    return user_config_path("ocserve") / "config.toml"


def _from_toml(file: Path, known: Mapping[str, Setting], *, must_exist: bool) -> dict[str, object]:
    try:
        with open(file, encoding="utf-8", opener=only_regular) as source:
            document = tomllib.loads(source.read())
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"{file} does not exist", f"it is named by a flag or by {_CONFIG_VARIABLE}") from None
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None
    sections = {name.split(".")[0] for name in known}
    values: dict[str, object] = {}
    for section, table in document.items():
        if section not in sections:
            raise ConfigError(f"{file}: unknown section [{section}]", _nearest(section, sections))
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: `{section}` must be a table, written [{section}]")
        for field, value in table.items():
            name = f"{section}.{field}"
            if name not in known:
                raise ConfigError(f"{file}: unknown setting `{name}`", _nearest(name, known))
            values[name] = value
    return values


def _from_environment(environ: Mapping[str, str], known: Mapping[str, Setting]) -> Iterator[tuple[str, str, str]]:
    """(setting, variable, text) of each variable that is set, the stronger of two for one setting last."""
    ours = {setting.variable: name for name, setting in known.items()}
    accepted = {**_FURTHER_VARIABLES, **ours}
    for variable in environ:
        if variable.startswith("OCSERVE_") and variable not in accepted and variable != _CONFIG_VARIABLE:
            candidates = [name for name in accepted if name.startswith("OCSERVE_")]
            raise ConfigError(f"unknown environment variable {variable}", _nearest(variable, candidates))
    for variable, name in accepted.items():
        if text := environ.get(variable, "").strip():
            yield name, variable, text


def _is_tuple(setting: Setting) -> bool:
    return get_origin(get_args(setting.type)[0]) is tuple


def _is_table(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, msgspec.Struct)


def _split(setting: Setting, text: str) -> object:
    """A list is written with commas in the environment, one of tables as JSON."""
    if not _is_tuple(setting):
        return text
    if _is_table(get_args(get_args(setting.type)[0])[0]):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError:
            return text  # the conversion says what is expected
    return [item.strip() for item in text.split(",") if item.strip()]


def _converted(setting: Setting, value: object, origin: str, *, strict: bool) -> object:
    """`value` as the setting's type. `strict` False takes text for numbers and truth values."""
    try:
        converted: object = msgspec.convert(value, setting.type, strict=strict, dec_hook=_path)
    except msgspec.ValidationError:
        raise ConfigError(
            f"{setting.name} from {origin}: expected {_expected(setting.type)}", setting.description
        ) from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ConfigError(f"{setting.name} from {origin}: expected a finite number", setting.description)
    return converted


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    raise ValueError("Expected `str`")


def _anchored(name: str, value: object, folder: Path = Path()) -> object:
    """A relative path as one from `folder` (a file's own says the same wherever a program is started)."""
    if isinstance(value, Path):
        return folder / value
    if name == "policy.command" and isinstance(value, tuple) and value and "/" in value[0]:
        # A name without a slash is looked up in PATH. The program does not start in this process' folder.
        return (str((folder / Path(value[0]).expanduser()).absolute()), *value[1:])
    return value


def _expected(annotation: Any) -> str:
    """The values of a type in words; never the value that was refused, which may be a secret in the wrong place."""
    kind, *metas = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if types.NoneType in get_args(kind):
        return _expected(get_args(kind)[0])
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if get_origin(item) is Literal:
            return f"a list of {', '.join(get_args(item))}"
        if _is_table(item):
            return f"tables with {', '.join(item.__struct_fields__)} (in the environment: a JSON list of objects)"
        return "a list of texts, none of them empty"
    if kind not in (int, float):
        return {bool: "true or false", Path: "a path"}.get(kind, "text that is not empty")
    word = "a whole number" if kind is int else "a number"
    least, above, most = (
        next((value for meta in metas if (value := getattr(meta, name)) is not None), None)
        for name in ("ge", "gt", "le")
    )
    if most is not None:
        return f"{word} from {least} to {most}"
    if above is not None:
        return f"{word} above {above}"
    return f"{word} of at least {least}"


def _tree(values: Mapping[str, tuple[object, str]]) -> Config:
    sections: dict[str, dict[str, object]] = {}
    for name, (value, _) in values.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    branches = get_type_hints(Config)
    return Config(**{section: branches[section](**fields) for section, fields in sections.items()})


def _nearest(name: str, candidates: Mapping[str, object] | set[str] | list[str]) -> str | None:
    from difflib import get_close_matches  # only on the way to an error

    matches = get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"did you mean `{matches[0]}`?" if matches else "`ocserve config show` lists every setting"


def cache_directory(cache: Cache) -> Path:
    """The folder for stored prefixes and measured profiles."""
    from platformdirs import user_cache_path  # not needed for `--help`

    return cache.directory or user_cache_path("ocserve")


def ledger_file(ledger: Ledger) -> Path:
    """Where the ledger lies."""
    from platformdirs import user_data_path  # not needed for `--help`

    return (ledger.directory or user_data_path("ocserve", appauthor=False)) / "ledger.db"


def keys_file(auth: Auth) -> Path:
    """The file of the keys that `ocserve keys` makes."""
    from platformdirs import user_data_path  # not needed for `--help`

    return auth.keys_file or user_data_path("ocserve", appauthor=False) / "keys.json"


def maintenance_file(auth: Auth) -> Path:
    """Where announced maintenance is kept: beside the keys."""
    return keys_file(auth).with_name("maintenance.json")


def engine_environment() -> dict[str, str]:
    """The environment for the engine process: ours without the secrets."""
    secrets = {setting.variable for setting in catalogue().values() if setting.is_secret}
    secrets |= {variable for variable, name in _FURTHER_VARIABLES.items() if name in SECRETS}
    secrets |= {variable for variable in os.environ if variable.startswith("OTEL_")}  # a collector's credentials
    return {variable: text for variable, text in os.environ.items() if variable not in secrets}


def bare_environment() -> dict[str, str]:
    """The environment for a program of somebody else's: where programs are found, and nothing of ours."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}


def child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Our environment for a server that we start, with further variables."""
    return {**os.environ, **variables}


def key_variable(name: str) -> str:
    """A key for somebody else's server, from the environment variable that the user named. Raises `ConfigError`."""
    if not (key := os.environ.get(name, "").strip()):
        raise ConfigError(f"the environment variable {name} is not set")
    return key
