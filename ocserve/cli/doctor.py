"""`ocserve doctor`: is this machine and this installation fit to serve? One verdict per line.

Each check is a function that looks at one thing and returns verdicts; none raises and none changes anything. What may
hang (the native library, the network) runs in threads under a time limit, all the rest in the one that asked.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import click
import msgspec

from ocserve import __version__, config, files, machine
from ocserve.cli import places
from ocserve.cli.places import Verdict
from ocserve.machine import LlamaFacts

if TYPE_CHECKING:
    from ocserve.catalog.store import Damaged, Installed, Store

_DEPENDENCIES = ("llama-cpp-python", "starlette", "uvicorn", "h11", "msgspec", "jinja2", "huggingface_hub")
_MISSING_HINT = "reinstall with: pip install --force-reinstall ocserve"


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Check this machine and this installation. The exit status is 1 if anything fails."""
    verdicts = examine()
    if as_json:
        click.echo(msgspec.json.encode({"verdicts": verdicts}))
    else:
        width = max(len(each.check) for each in verdicts)
        for each in verdicts:
            click.echo(f"{each.verdict:4}  {each.check:{width}}  {each.message}")
            if each.hint:
                click.echo(f"{'':{width + 6}}  hint: {each.hint}")
    if any(each.verdict == "fail" for each in verdicts):
        raise click.exceptions.Exit(1)


def examine() -> list[Verdict]:
    """All checks, in the order of reading."""
    from ocserve import app as app  # and all below it, which the threads are not to import beside each other

    settings, settings_verdicts = _settings()
    with ThreadPoolExecutor() as pool:
        llama = pool.submit(check_llama)
        hub = pool.submit(check_hub, settings.store)
        index = pool.submit(check_index, settings.store.hub_timeout_s)
        return [
            *check_versions(),
            *settings_verdicts,
            *places.check_files(settings),
            *places.check_log(settings.log),
            *check_names(settings),
            *places.check_keys(settings.auth),
            places.check_ledger(settings),
            places.check_cache(settings),
            *llama.result(),
            *check_memory(),
            *check_store(settings.store),
            hub.result(),
            index.result(),
            *check_model(settings),
            *check_sources(settings.store, hub.result(), index.result()),
            *check_address(settings),
        ]


def _settings() -> tuple[config.Config, list[Verdict]]:
    """The settings, or the defaults when they are wrong, so that the rest can still be examined."""
    try:
        settings = config.load()
    except config.ConfigError as error:
        return config.Config(), [Verdict("settings", "fail", error.message, error.hint)]
    source = str(settings.path) if settings.path.exists() else f"no file at {settings.path}"
    changed = sum(origin != "default" for _, _, origin in settings)
    return settings.config, [Verdict("settings", "ok", f"{source}, {changed} values differ from the defaults")]


def check_names(settings: config.Config) -> list[Verdict]:
    """Limits and prices of models that would not be served: a name may be mistyped."""
    from ocserve.accounts import pricing
    from ocserve.catalog.errors import CatalogError
    from ocserve.catalog.store import Store

    names = [("limits.models", each.model) for each in settings.limits.models]
    try:
        names += [("billing.prices", name) for name in pricing.load(settings.billing.prices).models]
        store = Store(settings.store)
        installed = {each.name for each in store.installed()}
        meant = {name: store.find(name) for _, name in names if name not in installed}
    except (config.ConfigError, CatalogError):  # which other checks say
        return []
    verdicts = []
    for setting, name in names:
        if name in meant:
            other = meant[name]
            why = f"is another name of {other.name}" if other else "is not installed"
            hint = f"write {other.name}" if other else "ocserve list shows what is"
            verdicts.append(Verdict(setting, "warn", f"{name} {why}: this does nothing", hint))
    return verdicts


def check_versions() -> list[Verdict]:
    """Python, ocserve, and what it is built on."""
    verdicts = [Verdict("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")]
    versions, missing = [f"ocserve {__version__}"], []
    for name in _DEPENDENCIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    verdicts.append(Verdict("versions", "ok", ", ".join(versions)))
    if missing:
        verdicts.append(Verdict("versions", "fail", f"not installed: {', '.join(missing)}", _MISSING_HINT))
    return verdicts


def check_llama(argv: Sequence[str] | None = None) -> list[Verdict]:
    """llama.cpp's build and devices, asked in a child process that may crash or hang; `argv` is another such child."""
    from ocserve import app

    environment = config.engine_environment()
    try:
        facts = app.probe(environment, argv) if argv else app.probe(environment)
    except app.ProbeFailed as error:
        return [Verdict("llama.cpp", "fail", error.message, error.hint)]
    return judge_llama(facts, facts.gpu_makers)


def judge_llama(facts: LlamaFacts, present: Sequence[str]) -> list[Verdict]:
    """What the probe's facts mean on a machine that has the GPUs in `present`."""
    features = re.findall(r"(\w+) = 1\b", facts.system_info)
    verdicts = [Verdict("llama.cpp", "ok", f"{facts.llama_cpp}, {' '.join(features) or 'no CPU features'}")]
    for device in facts.devices:
        memory = f"{_gigabytes(device.memory_free)} free of {_gigabytes(device.memory_total)}"
        verdicts.append(Verdict("device", "ok", f"{device.name} {device.description} ({device.kind}), {memory}"))
    if facts.usable_gpus:
        verdicts.append(Verdict("gpu", "ok", f"models run on {', '.join(gpu.name for gpu in facts.usable_gpus)}"))
    elif present:
        verdicts.append(
            Verdict(
                "gpu",
                "warn",
                f"THIS MACHINE HAS A GPU ({', '.join(present)}) THAT THIS BUILD OF llama.cpp DOES NOT USE",
                "reinstall llama-cpp-python with GPU support, for instance CMAKE_ARGS=-DGGML_CUDA=on pip install "
                "--force-reinstall --no-binary llama-cpp-python llama-cpp-python",
            )
        )
    else:
        verdicts.append(Verdict("gpu", "ok", "none found; models run on the processor"))
    return verdicts


def check_hub(store: config.Store) -> Verdict:
    """Whether the model hub answers at all; the credential is not sent."""
    import httpx2  # the hub client's own

    try:
        # Any answer will do, a refusal too: it says that the way there is open.
        answer = httpx2.head(store.hub_endpoint, timeout=store.hub_timeout_s)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        message = f"{store.hub_endpoint} does not answer ({type(error).__name__})"
        return Verdict("hub", "warn", message, "models can still come from the package index or a file")
    if answer.status_code >= 500:
        return Verdict("hub", "warn", f"{store.hub_endpoint} answers with status {answer.status_code}")
    return Verdict("hub", "ok", f"{store.hub_endpoint} answers")


def check_index(timeout_s: float) -> Verdict:
    """Whether pip reaches an index that has the default model, by the user's own settings of pip."""
    from ocserve.catalog import cards

    default = next(card for card in cards.load_cards() if card.name == cards.DEFAULT_NAME)
    wheel = next(variant.index for variant in default.variants if variant.index is not None)
    if importlib.util.find_spec("pip") is None:
        return Verdict("package index", "warn", "this Python has no pip", "run: python -m ensurepip")
    argv = [sys.executable, "-m", "pip", "index", "versions", wheel.distribution, "--disable-pip-version-check"]
    argv += ["--no-input", "--retries=0", f"--timeout={timeout_s:g}"]
    try:
        finished = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=4 * timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Verdict("package index", "warn", "pip does not get an answer", "pip config list shows its settings")
    if finished.returncode == 0 and wheel.version in finished.stdout:
        return Verdict("package index", "ok", f"pip finds {wheel.distribution} {wheel.version}")
    message = f"pip does not find {wheel.distribution} {wheel.version}"
    return Verdict("package index", "warn", message, "models can still come from the hub or a file")


def check_sources(store: config.Store, hub: Verdict, index: Verdict) -> list[Verdict]:
    """Whether there is any way to a model: one that is here, or a source that answers."""
    from ocserve.catalog import cards
    from ocserve.catalog.errors import CatalogError
    from ocserve.catalog.store import Store

    try:
        count = len(Store(store).installed())
    except CatalogError as error:
        return [Verdict("sources", "fail", error.message, error.hint)]
    here = "1 model is installed" if count == 1 else f"{count} models are installed"
    if hub.verdict == "ok":
        return [Verdict("sources", "ok", f"{here}, every model of the catalogue comes from the hub")]
    if index.verdict == "ok":
        only = f"of the catalogue only {cards.DEFAULT_NAME} is on the package index"
        return [Verdict("sources", "ok", f"{here}; the hub does not answer, and {only}")]
    if count:
        return [Verdict("sources", "warn", f"{here}, no source of more answers")]
    hint = "check the network and proxy settings, or serve a GGUF file of yours: ocserve run ./model.gguf"
    return [Verdict("sources", "fail", "no model is installed and no source of models answers", hint)]


def check_memory() -> list[Verdict]:
    """Main memory and cores that this process may use."""
    memory, cores = machine.host_memory(), machine.usable_cores()
    text = f"{_gigabytes(memory.available_bytes)} available of {_gigabytes(memory.total_bytes)}"
    enough = memory.available_bytes >= 1_000_000_000
    return [
        Verdict("memory", "ok" if enough else "warn", text, None if enough else "close other programs"),
        Verdict("processor", "ok", f"{cores} {'core' if cores == 1 else 'cores'} for this process"),
    ]


def check_store(settings: config.Store) -> list[Verdict]:
    """Where models lie, and whether there is room for more."""
    from ocserve.catalog.store import Store

    store = Store(settings)
    directory = store.directory
    existing = next(folder for folder in (directory, *directory.parents) if folder.exists())
    if reason := files.obstacle_in(directory):
        return [Verdict("models", "fail", f"{directory}: {reason}", "set store.directory")]
    free = shutil.disk_usage(existing).free
    left = free - settings.reserve_bytes
    text = f"{directory}, {_gigabytes(free)} free, of which {_gigabytes(settings.reserve_bytes)} stay in reserve"
    if left < 200_000_000:
        return [Verdict("models", "warn", text, "there is no room for a model; free some space or set store.directory")]
    damaged = [
        Verdict("models", "warn", f"damaged: {each.folder}: {each.reason}", each.hint) for each in _damaged(store)
    ]
    return [Verdict("models", "ok", text), *damaged]


def _damaged(store: Store) -> list[Damaged]:
    from ocserve.catalog.errors import CatalogError

    try:
        return store.damaged()
    except CatalogError:  # the catalogue's own cards; another check says so
        return []


def check_model(settings: config.Config) -> list[Verdict]:
    """The model that `ocserve run` would serve: is it here, how large, and does it fit main memory as asked."""
    from ocserve.catalog import sizing
    from ocserve.catalog.errors import CatalogError
    from ocserve.catalog.store import Store

    try:
        named = settings.model.default or sizing.choose_default(settings.store, say=_say_nothing)
        installed = Store(settings.store).find(named)
        return _judge_installed(installed, settings) if installed else _judge_offered(named, settings)
    except CatalogError as error:
        return [Verdict("model", "fail", error.message, error.hint)]


def _judge_installed(model: Installed, settings: config.Config) -> list[Verdict]:
    """With what would be lowered. A GPU is left out of it: `ocserve run` counts with what is free there."""
    from ocserve.catalog import planning
    from ocserve.catalog.errors import DoesNotFit
    from ocserve.catalog.fit import describe

    facts = f"{model.name} (installed), {_gigabytes(model.size_bytes)}"
    memory = machine.host_memory()
    try:
        fitted = planning.plan(model, settings.engine, settings.cache, memory=memory)
    except DoesNotFit as error:
        return [Verdict("model", "warn", f"{facts}: {error.message}", error.hint)]
    plan, needed = fitted.plan, fitted.need
    took = f"needs about {_gigabytes(needed.total_bytes)} of memory ({describe(needed, plan)})"
    verdicts = [Verdict("model", "ok", f"{facts}, context {plan.context}, {took}")]
    return verdicts + [Verdict("model", "warn", note.text, "close other programs") for note in fitted.notes]


def _judge_offered(named: str, settings: config.Config) -> list[Verdict]:
    """A model that is not here: its card says about what it will take."""
    from ocserve.catalog import cards, references, sizing

    parsed = references.parse(named)
    if not isinstance(parsed, references.CatalogueReference):
        return [Verdict("model", "warn", f"{named} is not installed", f"ocserve pull {named}")]
    card, variant = cards.find(parsed)
    context = min(card.context_length, settings.engine.context or card.defaults.context)
    pool = max(context, settings.engine.pool_tokens or card.defaults.pool)
    needed = sizing.memory_needed(card, variant.size_bytes, pool)
    text = f"{card.name} (not installed yet), {_gigabytes(variant.size_bytes)}, context {context}, "
    text += f"needs about {_gigabytes(needed)} of memory"
    memory = machine.host_memory()
    if needed > memory.total_bytes:
        return [Verdict("model", "fail", f"{text}: more than this machine has", "choose a smaller one: ocserve list")]
    if needed > memory.available_bytes:
        hint = "close other programs or lower the context"
        return [Verdict("model", "warn", f"{text}: more than is free now", hint)]
    return [Verdict("model", "ok", text)]


def _say_nothing(_: str) -> None:
    """`choose_default` explains itself to `ocserve run`; the verdict says the same here."""


def check_address(settings: config.Config) -> list[Verdict]:
    """Whether the server may listen where it is told to, and whether the port is free."""
    from ocserve import app

    try:
        has_key = app.has_key(settings.auth)
        app.refuse_exposure(settings.server, has_key=has_key)
    except config.ConfigError as error:
        return [Verdict("access", "fail", error.message, error.hint)]
    access = Verdict("access", "ok", "a key is set" if has_key else "no key; only this machine may call")
    where = f"{settings.server.host}:{settings.server.port}"
    try:
        socket.create_server((settings.server.host, settings.server.port), family=_family(settings.server.host)).close()
    except OSError as error:
        hint = "an ocserve may be running already; `ocserve run --port 0` takes any free port"
        # Python adds "(while attempting to bind on address …)" to the system's sentence.
        reason = (error.strerror or type(error).__name__).partition(" (while")[0]
        return [access, Verdict("address", "warn", f"{where} cannot be taken: {reason}", hint)]
    return [access, Verdict("address", "ok", f"{where} is free")]


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
