"""How much faster is the slimmed model? Files are timed in turns, one process each.

Here PyTorch runs saved models. Exported ones are added by their paths, such as "slim.onnx".
"""

import tempfile
from pathlib import Path

import timm
import torch

import patchslim


def main() -> None:
    torch.manual_seed(0)
    host = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
    with tempfile.TemporaryDirectory() as folder:
        dense, slim = Path(folder) / "dense", Path(folder) / "slim"
        patchslim.slim(host, "identity", keep=1.0).save(dense)
        patchslim.slim(host, "topk", macs=0.6).save(slim)
        found = patchslim.benchmark([dense, slim], batch=2, rounds=3, warmup=1, threads=1)
    print(found.table())
    for row in found.rows:
        print(row.method, f"batch {row.batch}: {row.step.median:.0f} ms")


if __name__ == "__main__":
    main()
