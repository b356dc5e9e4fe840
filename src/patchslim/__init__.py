"""Make a vision transformer faster by giving it fewer patches. Nothing is computed on import."""

from patchslim.adapter import Adapter, adapter_names, find_adapter
from patchslim.calibrate import Calibrated, calibrate
from patchslim.cost import Cost
from patchslim.course import Course
from patchslim.dataset import Dataset
from patchslim.errors import PatchslimError
from patchslim.images import Images
from patchslim.io import load
from patchslim.measure import measure
from patchslim.model import SlimModel
from patchslim.reducer import Reducer, find_reducer, reducer_names
from patchslim.reduction import Reduction
from patchslim.report import Report
from patchslim.schedule import Schedule
from patchslim.search import Search
from patchslim.shards import Shards
from patchslim.slim import macs, slim
from patchslim.tokens import Tokens
from patchslim.train import Trained, train

__all__ = [
    "Adapter",
    "Calibrated",
    "Cost",
    "Course",
    "Dataset",
    "Images",
    "PatchslimError",
    "Reducer",
    "Reduction",
    "Report",
    "Schedule",
    "Search",
    "Shards",
    "SlimModel",
    "Tokens",
    "Trained",
    "adapter_names",
    "calibrate",
    "find_adapter",
    "find_reducer",
    "load",
    "macs",
    "measure",
    "reducer_names",
    "slim",
    "train",
]
