"""timm is imported without TorchDynamo, which works as before when it is needed."""

import subprocess
import sys

import pytest

CHECK = """
import sys
import scalp_core.models.architecture, scalp_core.models.batch_norm, scalp_core.models.initial_weights
import scalp_core.models.offline_weights, scalp_core.inference.gradcam, jobs.train.worker
assert "timm" in sys.modules and "torchvision" in sys.modules
assert "torch._dynamo" not in sys.modules, "imported"
assert "sympy" not in sys.modules, "imported with it"

import torch, torchvision
from timm.layers import disable_compiler
assert torch._dynamo.disable and sys.modules["torch._dynamo"].__file__
boxes = torch.tensor([[0, 0.0, 0.0, 2.0, 2.0]])
assert torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), boxes, 1).item() == 1
from timm.models.naflexvit import NaFlexRopeIterator
assert list(NaFlexRopeIterator.__dict__)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item() == 1
print("deferred")
"""


@pytest.mark.medium
def test_timm_is_imported_without_dynamo_which_is_there_when_needed():
    ended = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert ended.stdout.strip() == "deferred", ended.stderr
