"""What hf_mim has to know of dBOT."""

from ..method import FrozenPart, Method

METHOD = Method(
    model_type="dbot",
    prefix="DBOT",
    name="dBOT",
    paper="Liu et al., *Exploring Target Representations for Masked Autoencoders*, ICLR 2024",
    presets={
        "tiny": {
            "decoder_hidden_size": 64,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
            # At four blocks stochastic depth only takes away.
            "drop_path_rate": 0.0,
        },
        "huge": {"drop_path_rate": 0.3},
    },
    schedules={},
    frozen=FrozenPart("teacher", optional=True),
)
