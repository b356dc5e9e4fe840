"""A plain ViT of torch's own `nn.TransformerEncoder`, slimmed by an adapter of one's own."""

import torch
import torch.nn.functional as F
from torch import nn

import patchslim
from patchslim.hosts import HostFacts
from patchslim.testing import check_adapter
from patchslim.tokens.shapes import BlockShape, HostShape


class Vit(nn.Module):
    """A host: patches, learned positions, a mean, a classifier."""

    def __init__(self, side=8, patch=8, width=64, depth=4, heads=4):
        super().__init__()
        self.side, self.patch = side, nn.Conv2d(3, width, patch, patch)
        self.place = nn.Parameter(torch.randn(side * side, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", 1e-5, True, True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), False)
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2) + self.place
        return self.head(self.encoder(x).mean(dim=1))


class VitAdapter(patchslim.Adapter):
    """Says where the host keeps its parts."""

    family, host_classes = "my Vit", frozenset({f"{__name__}.Vit"})

    def describe(self, host):
        scale, shape = (64 // 4) ** -0.5, (3, *(host.side * k for k in host.patch.kernel_size))
        depth = len(host.encoder.layers)
        return HostFacts(0, shape, (scale,) * depth, (0.0,) * depth, False, None)

    def shape(self, host, image_size=None):
        blocks = (BlockShape.standard(64, heads=4),) * len(host.encoder.layers)
        embed = host.side**2 * host.patch.weight.numel()
        return HostShape((host.side, host.side), 0, embed, blocks, host.head.weight.numel())

    def blocks(self, host):
        return host.encoder.layers

    def embed(self, host, images, options):
        x = host.patch(images).flatten(2).transpose(1, 2) + host.place
        return patchslim.Tokens(x=x, prefix=0, grid=(host.side, host.side))

    def project(self, host, index, tokens, part):
        layer, y = host.encoder.layers[index], host.encoder.layers[index].norm1(tokens.x)
        weights, biases = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        parts = zip("qkv", weights.chunk(3), biases.chunk(3), strict=True)
        flat = {name: F.linear(y, weight, bias) for name, weight, bias in parts if name in part}
        return tuple(flat[name].unflatten(2, (4, -1)).transpose(1, 2) for name in part)

    def mix(self, host, index, queries, attended):
        out = host.encoder.layers[index].self_attn.out_proj
        return queries.x + F.linear(attended.transpose(1, 2).flatten(2), out.weight, out.bias)

    def feed(self, host, index, x):
        layer = host.encoder.layers[index]
        return x + layer.linear2(layer.activation(layer.linear1(layer.norm2(x))))

    def norm(self, host, x):
        return host.encoder.norm(x)

    def head(self, host, tokens, options):
        weight = tokens.sizes() if tokens.alive is None else tokens.sizes() * tokens.alive
        share = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
        return host.head((self.norm(host, tokens.x) * share.unsqueeze(2)).sum(dim=1))


model = Vit().eval()
check_adapter(model, VitAdapter())
slimmed = patchslim.slim(model, "tome", macs=0.6, adapter=VitAdapter())
print("tokens after each block:", *slimmed.counts())
print(slimmed.macs(), "of", slimmed.dense_macs(), tuple(slimmed(torch.randn(2, 3, 64, 64)).shape))
