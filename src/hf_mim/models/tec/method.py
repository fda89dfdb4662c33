"""What hf_mim has to know of TEC."""

from ..method import FrozenPart, Method

_CITATION = r"""@misc{gao2022tec,
    title = {Towards Sustainable Self-supervised Learning},
    author = {Gao, Shanghua and Zhou, Pan and Cheng, Ming-Ming and Yan, Shuicheng},
    year = {2022}
}"""

METHOD = Method(
    model_type="tec",
    prefix="TEC",
    name="TEC",
    paper="Gao et al., *Towards Sustainable Self-supervised Learning*, 2022",
    citation=_CITATION,
    presets={
        "tiny": {"adapter_group_size": 2, "decoder_hidden_size": 64, "decoder_num_attention_heads": 2},
        "mini": {"decoder_hidden_size": 96, "decoder_num_attention_heads": 3},
        # The paper's ViT-L; its temperature is for MAE-L as base.
        "large": {"decoder_hidden_size": 768, "attention_temperature": 1.4},
        # 32 blocks are no multiple of 3.
        "huge": {"adapter_group_size": 4},
    },
    schedules={},
    frozen=FrozenPart("base", optional=False),
)
