"""Measures, of a network under training or at its end, what a verdict rests on."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ..data.dataset import ImageDataset
from ..data.loading import spread_indices
from ..models.vit.sizes import as_pair
from .encoders import FeatureEncoder
from .features import extract_features
from .knn import rank_me
from .online import OnlineEvaluation
from .report import feature_name
from .verdict import Comparison, Evidence, Verdict, compare_answers, compare_ranks, feature_spread, judge

# Held-out pictures that are reconstructed, and whose features are looked at without labels: they tell enough.
MAX_RECONSTRUCTED = 512
MAX_PICTURES = 1024
_RANK_RESAMPLES = 20
# Fewer pictures differ by chance, and have no rank to lose.
_MIN_PICTURES = 20
_SCORES = {"knn": "k-NN accuracy", "linear": "linear accuracy"}


def evidence_of(
    images_seen: int,
    features: dict[str, torch.Tensor],
    untrained: dict[str, torch.Tensor] | None = None,
    *,
    answers: dict | None = None,
    untrained_answers: dict | None = None,
    errors: tuple[np.ndarray, np.ndarray] | None = None,
    progress: float = 1.0,
    notes: Sequence[str] = (),
) -> Evidence:
    """
    What is measured, as [`judge`] takes it.

    Args:
        features, untrained: By pooling, of the same held-out pictures, `(num_pictures, dim)`.
        answers, untrained_answers: By pooling, by "knn" or "linear", by label, whether each picture is told: float of
            shape `(num_pictures,)`, NaN without a label. As [`evaluate_features`] fills in.
        errors: As [`reconstruction_errors`] gives.
        notes: What is to be said besides.
    """
    notes = list(notes)
    number = len(next(iter(features.values()), ()))
    if number < _MIN_PICTURES:
        notes.append(f"Only {number} held-out pictures: how far their features spread is not judged.")
        features = {}
    measured = {}
    for kind, pooled in (("", features), ("untrained_", untrained or {})):
        finite = {pooling: values for pooling, values in pooled.items() if bool(values.isfinite().all())}
        for pooling in pooled.keys() - finite.keys():
            notes.append(f"The {_name(pooling)} features {'' if not kind else 'untrained '}are not finite: left out.")
        measured[f"{kind}rank_me"] = {_name(p): rank_me(values[:MAX_PICTURES]) for p, values in finite.items()}
        measured[f"{kind}spread"] = {_name(p): feature_spread(values.numpy()) for p, values in finite.items()}
        measured[f"{kind}finite"] = finite
    now, before = measured.pop("finite"), measured.pop("untrained_finite")
    if untrained is None:
        notes.append("There is no untrained network to compare with.")
    scored, scored_before = (_best_by_score(by_pooling or {}) for by_pooling in (answers, untrained_answers))
    samples = {}
    if errors is None and not scored:
        samples = {_name(p): _rank_differences(now[p], before[p]) for p in now if p in before}
    return Evidence(
        images_seen,
        progress,
        answers=scored,
        untrained_answers=scored_before,
        rank_me_samples=samples,
        errors=None if errors is None else errors[0],
        mean_colour_errors=None if errors is None else errors[1],
        notes=notes,
        **measured,
    )


def compare(
    features: dict[str, dict[str, torch.Tensor]], answers: dict, than: dict[str, str], trained: str = "trained"
) -> list[Comparison]:
    """
    Whether a network is better than others: for each label by linear accuracy, each network at the pooling that tells
    most of it; without labels by RankMe. Nothing is said of fewer than 20 pictures, nor of features that are not
    finite.

    Args:
        features: By network and pooling, of the same held-out pictures, `(num_pictures, dim)`.
        answers: By network, as [`evaluate_features`] fills in.
        than: The other networks, by name: what they are called.
        trained (`str`): The name of the network that is compared.
    """
    number = len(next(iter(features[trained].values())))
    if number < _MIN_PICTURES:
        return []
    found = []
    for name, called in than.items():
        if trained in answers and name in answers:
            for label in next(iter(answers[trained].values()))["linear"]:
                now, before = (_best_of_label(answers[network], label) for network in (trained, name))
                found.append(compare_answers(called, label, now, before))
            continue
        shared = [pooling for pooling in features[trained] if pooling in features[name]]
        for pooling in shared[:1]:
            now, before = (features[network][pooling] for network in (trained, name))
            if now.isfinite().all() and before.isfinite().all():
                number = min(number, MAX_PICTURES)
                ranks = (rank_me(values[:MAX_PICTURES]) for values in (now, before))
                found.append(compare_ranks(called, *ranks, _rank_differences(now, before), number))
    return [comparison for comparison in found if comparison is not None]


def _best_of_label(by_pooling: dict, label: str) -> np.ndarray:
    columns = [np.asarray(scores["linear"][label], dtype=np.float64) for scores in by_pooling.values()]
    return max(columns, key=np.nanmean)


def _name(pooling: str) -> str:
    return feature_name("", pooling).removeprefix(", ")


def _best_by_score(answers: dict) -> dict[str, np.ndarray]:
    """By score, the mean over labels of the pooling that tells the most: each network is taken at its best."""
    found = {}
    for score, name in _SCORES.items():
        columns = [
            _mean_of_known(np.stack([np.asarray(label, dtype=np.float64) for label in by_score[score].values()]))
            for by_score in answers.values()
            if by_score.get(score)
        ]
        if columns:
            found[name] = max(columns, key=np.nanmean)
    return found


def _mean_of_known(columns: np.ndarray) -> np.ndarray:
    """Over the first axis, of what is not NaN; NaN where all is."""
    known = ~np.isnan(columns)
    return np.where(known, columns, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)


def _rank_differences(now: torch.Tensor, before: torch.Tensor) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    number = min(len(now), MAX_PICTURES)
    rows = [torch.randint(number, (number,), generator=generator) for _ in range(_RANK_RESAMPLES)]
    return np.array([rank_me(now[row]) - rank_me(before[row]) for row in rows])


@torch.no_grad()
def reconstruction_errors(
    model, dataset, *, batch_size: int = 64, bf16: bool = False
) -> tuple[np.ndarray, np.ndarray] | None:
    """
    Mean squared error of the hidden pixels of held-out pictures, and that of a mean colour: a picture's visible one,
    drawn towards that of all pictures as far as helps most (a few patches tell it badly); or, where the model is told
    each patch's own mean and variance (`norm_pix_loss`), the hidden patch's own.

    Args:
        model: In eval mode, with `reconstruct`.
        dataset: `dataset[0, i]` has `pixel_values` and `noise`; 512 of them are taken, spread over all.
        bf16 (`bool`, defaults to False): Run it in bfloat16 autocast.

    Returns:
        Two `np.ndarray` of shape `(num_pictures,)`; None where the method predicts no pixels.
    """
    device = next(model.parameters()).device
    parts = []
    indices = spread_indices(len(dataset), MAX_RECONSTRUCTED)
    for start in range(0, len(indices), batch_size):
        items = [dataset[0, index] for index in indices[start : start + batch_size]]
        pixels, noise = (torch.stack([item[name] for item in items]).to(device) for name in ("pixel_values", "noise"))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = model.reconstruct(pixels, noise)
        if found is None:
            return None
        mask, predicted = found[0].float(), found[1].float()
        visible = ((1 - mask) * pixels).sum((2, 3), keepdim=True) / (1 - mask).sum((2, 3), keepdim=True)
        if getattr(model.config, "norm_pix_loss", False):
            height, width = as_pair(model.config.patch_size)
            own = nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), (height, width))
            visible = own.repeat_interleave(height, 2).repeat_interleave(width, 3)
        parts.append([part.cpu() for part in (pixels, predicted, mask, visible)])
    pixels, predicted, mask, colour = (torch.cat(part).double() for part in zip(*parts, strict=True))
    if not getattr(model.config, "norm_pix_loss", False):
        common = colour.mean(0, keepdim=True)
        away = mask * (colour - common)
        share = (away * (pixels - common)).sum() / away.expand_as(pixels).square().sum().clamp(min=1e-12)
        colour = common + share.clamp(0, 1) * (colour - common)
    hidden = mask.sum((1, 2, 3)) * pixels.shape[1]
    return tuple(((mask * (pixels - guess).square()).sum((1, 2, 3)) / hidden).numpy() for guess in (predicted, colour))


class Appraisal:
    """
    The verdict at each evaluation of a training: from labels where `feature_evaluation` has them, and without.

    Args:
        images (`ImageDataset`): Held out; 1,024 of them are enough.
        held_out: The same as the trainer evaluates them, see [`reconstruction_errors`].
        processor: The image processor.
        seed (`int`): Of the untrained network's weights.
        images_per_step, images_before (`int`): Pictures of an optimiser step, and of earlier stages.
        reference: Images seen to what the preset's reference curve says, see [`describe_reference`].
        feature_evaluation ([`OnlineEvaluation`], *optional*): The trainer's.
    """

    def __init__(
        self,
        images: ImageDataset,
        held_out,
        processor,
        *,
        seed: int,
        images_per_step: int,
        images_before: int = 0,
        reference: Callable[[int], str] | None = None,
        feature_evaluation: OnlineEvaluation | None = None,
        num_workers: int = 0,
        bf16: bool = False,
    ):
        self.pictures = images
        self.held_out, self.processor, self.seed = held_out, processor, seed
        self.images_per_step, self.images_before, self.reference = images_per_step, images_before, reference
        self.feature_evaluation = feature_evaluation
        self.how = {"num_workers": num_workers, "bf16": bf16}
        self.last: Verdict | None = None
        self._untrained: tuple[dict, dict] | None = None

    def __call__(self, model, step: int, num_steps: int) -> dict[str, float]:
        """
        Leaves the verdict in `last`, and gives RankMe, spread and, where pixels are predicted, the share of the mean
        colour's error that the reconstruction saves. On all processes, of a model in eval mode.
        """
        evaluation = self.feature_evaluation
        if self._untrained is None:
            self._untrained = self._measure(untrained_like(model, self.seed))
        if evaluation is None:
            now = self._measure(model.encoder)
        else:
            # The trainer has just asked it of this network.
            now = evaluation.last_features, evaluation.last_answers
        images = self.images_before + step * self.images_per_step
        evidence = evidence_of(
            images,
            now[0],
            self._untrained[0],
            answers=now[1],
            untrained_answers=self._untrained[1],
            errors=reconstruction_errors(model, self.held_out, bf16=self.how["bf16"]),
            progress=step / max(num_steps, 1),
            notes=() if evaluation is None else evaluation.notes,
        )
        self.last = judge(evidence, None if self.reference is None else self.reference(images))
        numbers = {}
        for name, values in (("rank_me", evidence.rank_me), ("spread", evidence.spread)):
            numbers |= {f"feature_{name}": value for value in list(values.values())[:1]}
        if evidence.errors is not None and evidence.mean_colour_errors.mean() > 0:
            numbers["error_saved"] = float(1 - evidence.errors.mean() / evidence.mean_colour_errors.mean())
        return numbers

    def _measure(self, encoder) -> tuple[dict, dict]:
        """Features by pooling, and answers."""
        if self.feature_evaluation is not None:
            return self.feature_evaluation.measure(encoder)[1:]
        network = FeatureEncoder(encoder)
        return extract_features({"": network}, self.pictures, self.processor, network.poolings, **self.how)[""], {}


def untrained_like(model, seed: int):
    """The encoder of a model of the same config with fresh weights, in eval mode; moves no random state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(model)(model.config).encoder.eval().to(model.device)
