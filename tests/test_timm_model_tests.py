"""timm's own model tests, unchanged, on slimmed models: each passes, or one error says what to do.

The tests come from timm's repository, as its scripts do in `test_timm_scripts.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from test_timm_scripts import SOURCE, read_script

pytestmark = pytest.mark.slow

HOSTS = (
    "test_vit",
    "test_vit3",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "levit_128s",
    "cait_xxs24_224",
)
# What timm's tests build by a name is slimmed at once. Weights of the Hub are left out.
CONFTEST = """
import os, sys, warnings
import patchslim, timm
from timm.models._features import FeatureGetterNet

HOSTS, METHOD = os.environ["HOSTS"].split(","), os.environ["METHOD"]

def create_slimmed(name, features_only=False, feature_cls=None, **settings):
    host = timm.create_model(name, **settings)
    slimmed = patchslim.slim(host, METHOD, macs=0.75)
    if not features_only:
        return slimmed
    features = FeatureGetterNet(slimmed, out_indices=[*range(len(host.feature_info))])
    features.default_cfg = host.default_cfg
    return features

def pytest_collection_modifyitems(items):
    warnings.simplefilter("ignore")
    sys.modules["test_models"].create_model = create_slimmed
    items[:] = [
        item for item in items
        if hasattr(item, "callspec") and item.callspec.params.get("model_name") in HOSTS
        and "pretrained" not in item.name and "inference" not in item.name
    ]
"""
# torch.fx and torch.jit.script cannot take code that depends on shapes.
REFUSED = ("fx", "torchscript")


def run_tests(folder: Path, method: str, hosts: tuple[str, ...]) -> list[ET.Element]:
    """Runs timm's tests on its hosts, slimmed, and lists the cases that were run."""
    (folder / "test_models.py").write_bytes(read_script("tests/test_models.py"))
    (folder / "conftest.py").write_text(CONFTEST)
    marks = "base cfg features torchscript fxforward fxbackward timeout".split()
    (folder / "pytest.ini").write_text("\n    ".join(["[pytest]\nmarkers =", *marks]))
    subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "ignore", "--junitxml", "found.xml", folder],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(SOURCE),
            "HOSTS": ",".join(hosts),
            "METHOD": method,
            "GITHUB_ACTIONS": "yes",  # leaves out what needs the Hub
        },
        capture_output=True,
        check=False,
        timeout=900,
    )
    return [*ET.parse(folder / "found.xml").iter("testcase")]


@pytest.mark.parametrize(
    ("method", "hosts", "least"), [("tome", HOSTS, 40), ("similarity", HOSTS[:4:2], 12)]
)
def test_timms_tests_pass_on_slimmed_models(
    method: str, hosts: tuple[str, ...], least: int, tmp_path: Path
) -> None:
    cases = run_tests(tmp_path, method, hosts)
    assert len(cases) >= least
    for case in cases:
        name = case.get("name", "")
        failure = case.find("failure")
        if any(word in name for word in REFUSED):
            assert failure is not None, name
            said = failure.get("message", "")
            assert said.startswith("patchslim.errors.WrongExport"), said
            assert "torch.export.export(slimmed, (images,))" in said
        else:
            assert failure is None, f"{name}: {ET.tostring(case, 'unicode')}"
            assert case.find("skipped") is None, name
            assert case.find("error") is None, name
