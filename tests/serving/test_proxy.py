"""The patch of PyTriton's proxy: fits the installed version, and changes nothing where it does not fit."""

from __future__ import annotations

import ast
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytriton
from pytriton.models import model as stock

from serving import tokenization
from serving.openai.flags import OpenAIFlags
from serving.triton import proxy

FOLDER = Path(pytriton.__file__).parent


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before install(), and so again after the test, whatever other tests of this process have installed."""
    for name in ("InferenceHandler", "RequestsResponsesConnector"):
        value = getattr(stock, name)
        is_patched = value.__module__ == proxy.__name__
        monkeypatch.setattr(stock, name, value.__bases__[0] if is_patched else value)
    monkeypatch.setattr(stock.Model, "generate_model", stock.Model.generate_model)


@pytest.mark.usefixtures("unpatched")
def test_patch_fits_the_installed_version() -> None:
    assert proxy.install()
    assert stock.InferenceHandler is proxy.CancellableHandler
    assert stock.RequestsResponsesConnector is proxy.CancellableConnector
    patched = stock.Model.generate_model
    assert proxy.install()
    assert stock.Model.generate_model is patched, "installed twice"


def test_stub_is_the_last_class_of_its_name() -> None:
    tree = ast.parse((FOLDER / "proxy/model.py").read_text() + proxy._STUB)
    models = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TritonPythonModel"]
    assert [ast.unparse(base) for base in models[-1].bases] == ["TritonPythonModel"]
    assert len(models) == 2


def test_both_sides_agree_on_messages_and_limits() -> None:
    names: dict[str, Any] = {"TritonPythonModel": object}  # of PyTriton's text
    exec(compile(proxy._STUB, "stub_model.py", "exec"), names)
    assert names["_CANCEL"] == proxy._CANCEL
    assert names["_MAX_WORDS"] == tokenization._MAX_WORDS_IN_ALL
    assert names["_MAX_BYTES"] == OpenAIFlags().max_request_bytes
    assert "execute" in vars(names["TritonPythonModel"])


@pytest.mark.parametrize("name", proxy._FILES)
def test_any_other_text_is_refused(tmp_path: Path, name: str) -> None:
    for file in proxy._FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(FOLDER / file, tmp_path / file)
    assert proxy.digest(tmp_path) == proxy._DIGEST
    (tmp_path / name).write_text((FOLDER / name).read_text() + "\n")
    assert proxy.digest(tmp_path) != proxy._DIGEST


@pytest.mark.usefixtures("unpatched")
def test_other_version_keeps_stock_behaviour_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = (stock.Model.generate_model, stock.InferenceHandler, stock.RequestsResponsesConnector)
    monkeypatch.setattr(proxy, "_DIGEST", "of another text")
    monkeypatch.setattr(proxy.importlib.metadata, "version", lambda name: "0.8.0")
    with caplog.at_level(logging.WARNING):
        assert proxy.install() is False
    assert (stock.Model.generate_model, stock.InferenceHandler, stock.RequestsResponsesConnector) == before
    assert [record.getMessage() for record in caplog.records] == [
        "PyTriton 0.8.0 is not the 0.7.0 that the patch fits: requests run one batch at a time, none is cancelled"
    ]
