"""What an exported graph cannot hold is refused by name."""

import pytest
import torch

from performers import SoftmaxFeatures, favor_attention


class Attend(torch.nn.Module):
    def __init__(self, **words):
        super().__init__()
        self.phi, self.words = SoftmaxFeatures(5, 11), words

    def forward(self, query, key, value):
        return favor_attention(query, key, value, self.phi, **self.words)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"window_size": 3, "far": False, "num_heavy": 2}, "must have one length"),
        ({"segment_ids": torch.zeros(2, 23, dtype=torch.int64)}, "an exported graph cannot hold"),
    ],
    ids=["heavy keys", "packed sequences"],
)
def test_what_no_exported_graph_can_hold_is_refused(words, message):
    tensors = torch.randn(3, 2, 4, 23, 5).unbind()
    shapes = None if "segment_ids" in words else [{2: torch.export.Dim("length", min=2)}] * 3
    with pytest.raises(ValueError, match=message):
        torch.export.export(Attend(**words), tensors, dynamic_shapes=shapes)
