"""What hf_mim has to know of the baseline, MAE."""

from ..method import Method

_CITATION = r"""@inproceedings{he2022mae,
    title = {Masked Autoencoders Are Scalable Vision Learners},
    author = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\'a}r, Piotr and Girshick, Ross},
    booktitle = {Conference on Computer Vision and Pattern Recognition},
    year = {2022}
}"""

METHOD = Method(
    model_type="vit_mae",
    prefix="ViTMAE",
    name="MAE",
    paper="He et al., *Masked Autoencoders Are Scalable Vision Learners*, CVPR 2022",
    citation=_CITATION,
    presets={
        "tiny": {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2},
        "mini": {"decoder_hidden_size": 96, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3},
    },
    schedules={},
    frozen=None,
    is_baseline=True,
    stock_hides=True,
    release_license="cc-by-nc-4.0",
)
