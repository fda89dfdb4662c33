"""What hf_mim has to know of I-JEPA."""

from ..method import Method

_CITATION = r"""@inproceedings{assran2023ijepa,
    title = {Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture},
    author = {Assran, Mahmoud and Duval, Quentin and Misra, Ishan and Bojanowski, Piotr and Vincent, Pascal and
              Rabbat, Michael and LeCun, Yann and Ballas, Nicolas},
    booktitle = {Conference on Computer Vision and Pattern Recognition},
    year = {2023}
}"""

METHOD = Method(
    model_type="ijepa",
    prefix="IJepa",
    name="I-JEPA",
    paper="Assran et al., *Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture*, CVPR "
    "2023",
    citation=_CITATION,
    presets={
        "tiny": {
            "predictor_hidden_size": 64,
            "predictor_num_hidden_layers": 2,
            # At 0.996 the target hardly leaves its start in a run of a thousand steps.
            "ema_momentum": 0.99,
            # The default is for wide networks: at 0.02, 78% of what a narrow one says of a patch is where it lies, and
            # to predict that alone, it collapses (benchmarks/LOG.md).
            "initializer_range": 0.08,
        },
        "mini": {
            "predictor_hidden_size": 96,
            "predictor_num_hidden_layers": 2,
            "ema_momentum": 0.99,
            "initializer_range": 0.07,
        },
        "large": {"predictor_num_hidden_layers": 12},
        "huge": {"predictor_num_hidden_layers": 12},
    },
    schedules={},
    frozen=None,
    is_baseline=True,
    release_license="cc-by-nc-4.0",
)
