"""Features of images: the input of the classifier."""

import numpy as np
import torch

from jobs.common.inference import Computation
from jobs.evaluate.features import AddFeatures
from scalp_core.bundles.loading import load_bundle
from scalp_core.models.architecture import load_model, normalize


def test_the_classifier_makes_the_logits_from_the_features(bundle):
    loaded = load_bundle(str(bundle)).fetch("weights")
    size = loaded.spec.preprocess.size
    images = np.random.default_rng(0).integers(256, size=(3, size, size, 3), dtype=np.uint8)
    computation = Computation("cpu", "fp32", "torch", {})
    batch = AddFeatures(lambda: loaded, computation, 1)({"image": images, "image_id": np.arange(3)})
    assert set(batch) == {"features", "image_id"}
    model = load_model(loaded)
    with torch.inference_mode():
        expected = model(normalize(torch.from_numpy(images), loaded.spec.preprocess))
        logits = model.get_classifier()(torch.from_numpy(batch["features"]))
    assert torch.allclose(logits, expected, atol=1e-4)
