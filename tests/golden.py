"""Numbers computed with the methods' released implementations (shared/golden), and how closely ours must agree."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

SHARED = Path(os.environ.get("HF_MIM_SHARED", Path(__file__).parents[2] / "shared"))


class Golden:
    """A golden case: its config, weights (`state`), inputs, expected tensors and numbers, gradient norms."""

    def __init__(self, name: str):
        # Small cases may be copied into the tests; where a case is in neither place, say so.
        folders = (Path(__file__).parent / "golden", SHARED / "golden")
        folder = next((f for f in folders if (f / f"{name}.safetensors").is_file()), None)
        if folder is None:
            pytest.skip(f"golden case {name} not found in {SHARED / 'golden'}; set HF_MIM_SHARED")
        report = json.loads((folder / f"{name}.json").read_text())
        tensors = safetensors.torch.load_file(folder / f"{name}.safetensors")
        self.config, self.numbers, self.grad_norms = report["config"], report["expected"], report["grad_norms"]
        self.state, self.teacher, self.base, self.input, self.expected = (
            {key.removeprefix(f"{group}."): value for key, value in tensors.items() if key.startswith(f"{group}.")}
            for group in ("state", "teacher", "base", "input", "expected")
        )

    def assert_tensor(self, name: str, actual: torch.Tensor) -> None:
        """Within 1e-5 of the largest absolute value."""
        expected = self.expected[name]
        assert actual.shape == expected.shape, name
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5, f"{name}: relative error {error}"

    def assert_numbers(self, outputs) -> None:
        """Losses within 1e-5 relative."""
        for name, expected in self.numbers.items():
            if name.startswith("loss"):
                assert getattr(outputs, name).item() == pytest.approx(expected, rel=1e-5), name

    def assert_grad_norms(self, actual: dict[str, float]) -> None:
        """`actual`, under the release's names: within 1e-4 relative; under 1e-6 counts as 0."""
        assert set(actual) >= set(self.grad_norms)
        for name, expected in self.grad_norms.items():
            if expected < 1e-6:
                assert actual[name] < 1e-6, name
            else:
                assert actual[name] == pytest.approx(expected, rel=1e-4), name


def block_grad_norms(layers, prefix: str) -> dict[str, float]:
    """Gradient norms of our blocks under timm's names; the fused matrix's is the root of the sum of squares."""
    norms = {}
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for i, layer in enumerate(layers):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                norms[f"{prefix}.{i}.{theirs}.{kind}"] = layer.get_parameter(f"{ours}.{kind}").grad.norm().item()
        for kind in ("weight", "bias"):
            grads = [getattr(getattr(layer.attention, f"{p}_proj"), kind) for p in "qkv"]
            if grads[0] is not None:
                norms[f"{prefix}.{i}.attn.qkv.{kind}"] = sum(g.grad.square().sum() for g in grads).sqrt().item()
    return norms
