"""Names in files of earlier versions, as today's code has them.

Up to 0.6.1 a slimmed model kept its method under the name `reducer`, so that learned weights of a
method were saved as `reducer.predictors...`. They are `method.predictors...` now.
"""

from __future__ import annotations

import re
from typing import Any

OLD_METHOD = re.compile(r"^(slimmed\.)?reducer\.")


def rename_old_weights(state: Any) -> Any:
    """Renames weights in all dictionaries within `state` to today's names; keeps all else."""
    if not isinstance(state, dict):
        return state
    return {_rename(key): rename_old_weights(value) for key, value in state.items()}


def _rename(key: Any) -> Any:
    return OLD_METHOD.sub(r"\1method.", key) if isinstance(key, str) else key
