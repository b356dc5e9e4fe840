"""What users have who export by themselves: `torch.export.export(slimmed, (images,))` converts."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch

import patchslim
from patchslim.deployment.graph import quietly
from test_export import pictures, slim


def run_openvino(program: Any, images: Any) -> Any:
    import openvino

    model = quietly(lambda: openvino.convert_model(program))
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(images.numpy())[0])


def run_onnx(program: Any, images: Any) -> Any:
    import onnxruntime

    made, file = (
        quietly(lambda: torch.onnx.export(program, dynamo=True, verbose=False)),
        io.BytesIO(),
    )
    made.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [each for each in patchslim.method_names() if each != "identity"]
)
def test_a_program_of_torch_export_converts(method):
    model, x = slim(method), pictures(2, flat=method == "duplicates")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,))
        want = model(x)
    for run in (run_openvino, run_onnx):
        assert torch.allclose(run(program, x), want, atol=1e-5), run.__name__
