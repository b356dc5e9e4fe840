"""Make a vision transformer faster by giving it fewer patches.

Importing this package imports no torch: each public name is imported when it is first used, so that
`patchslim --help` answers at once.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # importing it from typing would take longer than all else here
if TYPE_CHECKING:  # for type checkers and editors; a test compares it with the table below
    from typing import Any

    from patchslim.benchmarking.benchmark import benchmark as benchmark
    from patchslim.benchmarking.result import Benchmark as Benchmark
    from patchslim.calibration.calibrate import calibrate as calibrate
    from patchslim.calibration.patch_slimming.config import (
        PatchSlimmingConfig as PatchSlimmingConfig,
    )
    from patchslim.calibration.task import CalibrationResult as CalibrationResult
    from patchslim.data.hf_dataset import Dataset as Dataset
    from patchslim.data.images import Images as Images
    from patchslim.data.limits import Limits as Limits
    from patchslim.data.webdataset import Shards as Shards
    from patchslim.deployment.artefact import Artefact as Artefact
    from patchslim.deployment.budgets import Budgets as Budgets
    from patchslim.deployment.export import export as export
    from patchslim.deployment.load import load as load
    from patchslim.deployment.measure import measure as measure
    from patchslim.errors import PatchslimError as PatchslimError
    from patchslim.hosts._adapter import Adapter as Adapter
    from patchslim.hosts._registry import adapter_names as adapter_names
    from patchslim.hosts._registry import find_adapter as find_adapter
    from patchslim.methods._method import Method as Method
    from patchslim.methods._registry import find_method as find_method
    from patchslim.methods._registry import method_names as method_names
    from patchslim.model.model import SlimModel as SlimModel
    from patchslim.model.plan import macs as macs
    from patchslim.planning.plan import plan as plan
    from patchslim.planning.result import PlanResult as PlanResult
    from patchslim.planning.slim import slim as slim
    from patchslim.report.report import Report as Report
    from patchslim.schedules.schedule import Schedule as Schedule
    from patchslim.sweep.bench import bench as bench
    from patchslim.sweep.result import Sweep as Sweep
    from patchslim.tokens.reduction import Reduction as Reduction
    from patchslim.tokens.shapes import Cost as Cost
    from patchslim.tokens.tokens import Tokens as Tokens
    from patchslim.training.config import TrainConfig as TrainConfig
    from patchslim.training.train import TrainingResult as TrainingResult
    from patchslim.training.train import train as train

# Where each public name is defined.
_MODULES = {
    "Adapter": "patchslim.hosts._adapter",
    "Artefact": "patchslim.deployment.artefact",
    "Benchmark": "patchslim.benchmarking.result",
    "Budgets": "patchslim.deployment.budgets",
    "CalibrationResult": "patchslim.calibration.task",
    "Cost": "patchslim.tokens.shapes",
    "Dataset": "patchslim.data.hf_dataset",
    "Images": "patchslim.data.images",
    "Limits": "patchslim.data.limits",
    "Method": "patchslim.methods._method",
    "PatchSlimmingConfig": "patchslim.calibration.patch_slimming.config",
    "PatchslimError": "patchslim.errors",
    "PlanResult": "patchslim.planning.result",
    "Reduction": "patchslim.tokens.reduction",
    "Report": "patchslim.report.report",
    "Schedule": "patchslim.schedules.schedule",
    "Shards": "patchslim.data.webdataset",
    "SlimModel": "patchslim.model.model",
    "Sweep": "patchslim.sweep.result",
    "Tokens": "patchslim.tokens.tokens",
    "TrainConfig": "patchslim.training.config",
    "TrainingResult": "patchslim.training.train",
    "adapter_names": "patchslim.hosts._registry",
    "bench": "patchslim.sweep.bench",
    "benchmark": "patchslim.benchmarking.benchmark",
    "calibrate": "patchslim.calibration.calibrate",
    "export": "patchslim.deployment.export",
    "find_adapter": "patchslim.hosts._registry",
    "find_method": "patchslim.methods._registry",
    "load": "patchslim.deployment.load",
    "macs": "patchslim.model.plan",
    "measure": "patchslim.deployment.measure",
    "method_names": "patchslim.methods._registry",
    "plan": "patchslim.planning.plan",
    "slim": "patchslim.planning.slim",
    "train": "patchslim.training.train",
}

__all__ = [*_MODULES]
__version__: str


def __getattr__(name: str) -> Any:
    """Imports a public name, or a subpackage such as `patchslim.errors`, when it is first used."""
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name == "__version__":
        value = importlib.import_module("patchslim.versions").package_version()
    else:
        return _import_subpackage(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names."""
    return [*__all__, "__version__"]


def _import_subpackage(name: str) -> Any:
    """Imports `patchslim.NAME`, or raises an AttributeError with the nearest public names."""
    module = f"{__name__}.{name}"
    if not name.startswith("_"):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    import difflib

    near = difflib.get_close_matches(name, __all__, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")
