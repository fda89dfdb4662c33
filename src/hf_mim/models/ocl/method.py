"""What hf_mim has to know of OCL."""

from ..method import Method

_CITATION = r"""@misc{ocl,
    title = {One Leaf Reveals the Season: Occlusion-Based Contrastive Learning with Semantic-Aware Views for Efficient
        Visual Representation}
}"""

METHOD = Method(
    model_type="ocl",
    prefix="OCL",
    name="OCL",
    paper="*One Leaf Reveals the Season: Occlusion-Based Contrastive Learning with Semantic-Aware Views for Efficient "
    "Visual Representation*",
    citation=_CITATION,
    presets={"large": {"mask_ratio": 0.4}},
    # Pictures are told from the others of their batch.
    schedules=dict.fromkeys(("tiny", "mini"), {"per_device_train_batch_size": 256, "base_learning_rate": 2e-3}),
    frozen=None,
)
