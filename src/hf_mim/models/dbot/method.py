"""What hf_mim has to know of dBOT."""

from ..method import FrozenPart, Method

_CITATION = r"""@inproceedings{liu2024dbot,
    title = {Exploring Target Representations for Masked Autoencoders},
    author = {Liu, Xingbin and Zhou, Jinghao and Kong, Tao and Lin, Xianming and Ji, Rongrong},
    booktitle = {International Conference on Learning Representations},
    year = {2024}
}"""

METHOD = Method(
    model_type="dbot",
    prefix="DBOT",
    name="dBOT",
    paper="Liu et al., *Exploring Target Representations for Masked Autoencoders*, ICLR 2024",
    citation=_CITATION,
    presets={
        "tiny": {
            "decoder_hidden_size": 64,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
            # At so few blocks stochastic depth only takes away.
            "drop_path_rate": 0.0,
        },
        "mini": {
            "decoder_hidden_size": 96,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 3,
            "drop_path_rate": 0.0,
        },
        "huge": {"drop_path_rate": 0.3},
    },
    schedules={},
    frozen=FrozenPart("teacher", optional=True),
)
