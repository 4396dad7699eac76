"""For training in PyTorch what Pumice will compile: pruning in steps, distillation, int8, and export.

    pruner = GradualPruner(model, CubicSchedule(start=0, end=5000, initial=0.0, final=0.8, every=50))
    for images, labels in batches:                      # your own loop, loss and optimiser
        loss = soft_label_loss(model(images), dense(images), temperature=3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        pruner.step()
    export(model, (images[:1],), "model.onnx")

docs/training.md tells more.
"""

from pumice.frontend.torch_distillation import (
    HiddenStates,
    embedding_loss,
    hidden_state_loss,
    similarity_loss,
    soft_label_loss,
)
from pumice.frontend.torch_export import export
from pumice.frontend.torch_int8 import add_fake_quantization, remove_fake_quantization
from pumice.frontend.torch_pruning import CubicSchedule, GradualPruner

__all__ = [
    "CubicSchedule",
    "GradualPruner",
    "HiddenStates",
    "add_fake_quantization",
    "embedding_loss",
    "export",
    "hidden_state_loss",
    "remove_fake_quantization",
    "similarity_loss",
    "soft_label_loss",
]
