"""torch's counter sees all that a host does, whichever path torch takes."""

import pytest
import torch
from torch import nn

from patchslim.testing.counting import count_macs

ROWS, WIDTH = 9, 16
ATTENTION = 4 * ROWS * WIDTH**2 + 2 * ROWS**2 * WIDTH  # four projections, two products
FEED = 2 * ROWS * WIDTH * 24


class Attends(nn.Module):
    """torch's own attention, of which torch takes a fast path in evaluation."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Refuses(nn.Module):
    """A host that fails while it is counted."""

    def forward(self, x):
        raise RuntimeError("refuses")


HOSTS = {
    "MultiheadAttention": (Attends, ATTENTION),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True),
        ATTENTION + FEED,
    ),
    "Linear": (lambda: nn.Linear(WIDTH, 24), FEED // 2),
}


@pytest.mark.parametrize(("make", "wanted"), HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_counter_sees_attention_on_the_fast_path(make, wanted, batch):
    host = make().eval()
    assert count_macs(host, torch.randn(batch, ROWS, WIDTH)) == wanted


def test_the_fast_path_is_as_it_was_afterwards():
    before = torch.backends.mha.get_fastpath_enabled()
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        count_macs(Attends().eval(), torch.randn(1, ROWS, WIDTH))
        with pytest.raises(RuntimeError, match="refuses"):
            count_macs(Refuses(), torch.randn(1, ROWS, WIDTH))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    torch.backends.mha.set_fastpath_enabled(before)


def test_the_weights_require_the_gradients_that_they_required():
    host = Attends().eval()
    host.attention.in_proj_bias.requires_grad_(False)
    before = [p.requires_grad for p in host.parameters()]
    count_macs(host, torch.randn(1, ROWS, WIDTH))
    assert [p.requires_grad for p in host.parameters()] == before
