"""The patch of PyTriton's proxy: fits the installed version, and changes nothing where it does not fit."""

from __future__ import annotations

import ast
import importlib.metadata
import logging
from pathlib import Path

import pytest
import pytriton.proxy
from pytriton.models.model import Model

from serving import proxy

SOURCE = (Path(pytriton.proxy.__file__).parent / "model.py").read_text()


def test_patch_fits_the_installed_version() -> None:
    patched = proxy.patch_proxy(SOURCE)
    assert patched is not None
    classes = {node.name: node for node in ast.parse(patched).body if isinstance(node, ast.ClassDef)}
    assert "InFlightResponsesHandler" in classes
    assert "else InFlightResponsesHandler" in ast.unparse(classes["TritonPythonModel"])


def test_other_source_is_left_alone() -> None:
    assert proxy.patch_proxy(SOURCE.replace("BatchResponsesHandler", "OtherHandler")) is None
    assert proxy.patch_proxy(SOURCE + SOURCE) is None


def test_other_version_keeps_stock_behaviour_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = Model.get_proxy_model_files
    if getattr(stock, "is_patched", False):
        pytest.skip("another test in this process has installed the patch")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.0")
    with caplog.at_level(logging.WARNING):
        assert proxy.install() is False
    assert Model.get_proxy_model_files is stock
    assert [record.getMessage() for record in caplog.records] == [
        "PyTriton 0.8.0 is not the version that the in-flight patch fits (0.7.0): requests will run one batch at a time"
    ]
