"""Which calibrator a method gets: its type decides, and never its name."""

import pytest
import torch

from patchslim.calibration import dispatch
from patchslim.calibration.calibrate import calibrate, must_be_calibrated
from patchslim.calibration.dispatch import find_calibrator, register_calibrator
from patchslim.calibration.patch_slimming.calibrate import calibrate_patch_slimming
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.calibration.task import CalibrationResult
from patchslim.calibration.threshold import calibrate_threshold
from patchslim.errors import BadSetting, UnknownName
from patchslim.methods._registry import find_method, method_names
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.methods.patch_slimming_dynamic import PatchSlimmingDynamic
from patchslim.methods.tome import ToMe
from patchslim.methods.topk import TopK
from patchslim.model.slim import slim
from patchslim.testing.trial import tiny_host

FREE = PatchSlimmingConfig(mode="free", images=6, probe=3, step=4)


class OwnThreshold(ToMe):
    """Somebody else's method with a threshold."""


class OwnPositions(PatchSlimming):
    """Somebody else's method for which positions are searched."""


class OwnCounts(TopK):
    """Somebody else's method that keeps the same number of patches in all images."""


def images():
    return [(torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), None)]


def test_each_shipped_method_has_the_calibrator_of_its_type():
    calibrators = {name: find_calibrator(find_method(name)()) for name in method_names()}
    thresholds = {name for name, each in calibrators.items() if each is calibrate_threshold}
    assert thresholds == {"ats", "duplicates", "similarity", "tome"}
    others = {name for name, each in calibrators.items() if each} - thresholds
    assert others == {"patch_slimming", "patch_slimming_dynamic"}
    needed = {name for name in calibrators if must_be_calibrated(find_method(name)())}
    assert needed == others


def test_a_threshold_of_your_own_method_is_found_without_registering():
    config = PatchSlimmingConfig(images=6)
    result = calibrate(tiny_host(depth=4), images(), OwnThreshold(), macs=0.8, config=config)
    assert type(result.model.method) is OwnThreshold
    assert result.record["spent"]["mean"] <= 0.8
    assert result.figure is None


def test_a_subclass_is_calibrated_like_its_base_and_keeps_its_type():
    assert find_calibrator(OwnPositions()) is calibrate_patch_slimming
    result = calibrate(tiny_host(depth=3), images(), OwnPositions(), macs=0.7, config=FREE)
    assert type(result.model.method) is OwnPositions
    assert result.model.method.order == result.record["order"]
    assert result.record["method"] == "OwnPositions"
    assert result.figure.startswith("<svg")


def test_a_method_by_name_and_an_instance_of_it_are_calibrated_alike():
    host = tiny_host(depth=3)
    by_name = calibrate(host, images(), "patch_slimming_dynamic", macs=0.7, config=FREE)
    instance = calibrate(host, images(), PatchSlimmingDynamic(), macs=0.7, config=FREE)
    assert by_name.record == instance.record


def test_settings_that_calibration_would_replace_are_refused():
    order = "4x4 " + " ".join(map(str, range(16)))
    with pytest.raises(BadSetting, match="order: calibration finds the settings of PatchSlimming"):
        calibrate(tiny_host(depth=3), images(), PatchSlimming(order=order), macs=0.7, config=FREE)


def test_a_method_with_nothing_to_calibrate_is_refused_until_its_type_is_registered(monkeypatch):
    host = tiny_host(depth=3)
    assert find_calibrator(OwnCounts()) is None
    with pytest.raises(UnknownName, match="nothing to calibrate") as refused:
        calibrate(host, images(), OwnCounts(), macs=0.7)
    assert "patch_slimming, " in str(refused.value)

    monkeypatch.setattr(dispatch, "_CALIBRATORS", dict(dispatch._CALIBRATORS))

    @register_calibrator(OwnCounts)
    def calibrate_counts(method, task):
        model = slim(task.host, method, macs=task.goal.macs)
        return CalibrationResult(model, None, {"images": len(task.load_batches()[0])})

    result = calibrate(host, images(), OwnCounts(), macs=0.7)
    assert result.record == {"images": 6}
    assert find_calibrator(TopK()) is None
