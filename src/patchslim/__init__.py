"""Make a vision transformer faster by giving it fewer patches. Nothing is computed on import."""

from patchslim.calibration.calibrate import calibrate
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.calibration.task import CalibrationResult
from patchslim.data.hf_dataset import Dataset
from patchslim.data.images import Images
from patchslim.data.webdataset import Shards
from patchslim.errors import PatchslimError
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._registry import adapter_names, find_adapter
from patchslim.measurement.measure import measure
from patchslim.methods._method import Method
from patchslim.methods._registry import find_method, method_names
from patchslim.model.load import load
from patchslim.model.model import SlimModel
from patchslim.model.slim import macs, slim
from patchslim.report.report import Report
from patchslim.schedules.schedule import Schedule
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.shapes import Cost
from patchslim.tokens.tokens import Tokens
from patchslim.training.config import TrainConfig
from patchslim.training.train import TrainingResult, train

__all__ = [
    "Adapter",
    "CalibrationResult",
    "Cost",
    "Dataset",
    "Images",
    "Method",
    "PatchSlimmingConfig",
    "PatchslimError",
    "Reduction",
    "Report",
    "Schedule",
    "Shards",
    "SlimModel",
    "Tokens",
    "TrainConfig",
    "TrainingResult",
    "adapter_names",
    "calibrate",
    "find_adapter",
    "find_method",
    "load",
    "macs",
    "measure",
    "method_names",
    "slim",
    "train",
]
