"""What hf_mim has to know of PiLaMIM."""

from ..method import Method

_CITATION = r"""@inproceedings{lee2024pilamim,
    title = {PiLaMIM: Toward Richer Visual Representations by Integrating Pixel and Latent Masked Image Modeling},
    author = {Lee, Junmyeong and Hwang, Eui Jun and Cho, Sukmin and Park, Jong C.},
    booktitle = {NeurIPS 2024 Workshop: Self-Supervised Learning},
    year = {2024}
}"""

METHOD = Method(
    model_type="pilamim",
    prefix="PiLaMIM",
    name="PiLaMIM",
    paper="Lee et al., *PiLaMIM: Toward Richer Visual Representations by Integrating Pixel and Latent Masked Image "
    "Modeling*, NeurIPS 2024 Workshop: Self-Supervised Learning",
    citation=_CITATION,
    presets={
        "tiny": {
            "decoder_hidden_size": 64,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
            # At 0.996 the target hardly leaves its start in a run of a thousand steps.
            "ema_momentum": 0.99,
        },
        "mini": {
            "decoder_hidden_size": 96,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 3,
            "ema_momentum": 0.99,
        },
    },
    schedules={},
    frozen=None,
)
