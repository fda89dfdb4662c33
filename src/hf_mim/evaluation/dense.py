"""
What frozen patch features tell of what each pixel shows: which class it is of, and how far away.

Segmentation by k-NN and by a linear layer, as CAPI (Darcet et al., 2025) and DINOv3 (Siméoni et al., 2025) report it,
and depth by a linear layer: of patches, judged at each pixel. The probes are fitted in closed form or by L-BFGS on a
sample of the patches, so that seconds and a fixed amount of memory do for any number of pictures.
"""

from collections.abc import Mapping
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data.dataset import ImageDataset
from ..data.image_processing import annotation_transform, evaluation_transform
from ..models.vit.upsampling import upsample
from .encoders import FeatureEncoder
from .knn import knn_predict
from .linear import fit_linear
from .pictures import to_rgb, unnormalise
from .segmentation import Confusion

MASK, DEPTH = "mask", "depth"
# The sheet of pictures in a run's folder.
DENSE_PICTURE = "dense.png"
# How the names of its rows begin, in order.
DENSE_ROWS = ("picture", MASK, DEPTH)
MAX_TRAIN, MAX_TEST = 2000, 500
# Patches that the linear layers are fitted on; those among which neighbours are looked for, and those whose are.
_LINEAR_PATCHES, _KNN_PATCHES, _KNN_QUERIES = 32768, 4096, 16384
_RIDGE = 1e-3


class RawPatches:
    """
    The pixels of a patch as its features: what any encoder has to beat.

    Args:
        patch_size (`tuple[int, int]`): (height, width).
        neighbours (`bool`): With those of the eight patches around it; at the border the nearest ones again.

    A side of a patch is averaged down to at most 8 pixels; with neighbours, to at most 4.
    """

    device = torch.device("cpu")

    def __init__(self, patch_size: tuple[int, int], neighbours: bool = False):
        self.patch_size = patch_size
        self.neighbours = neighbours

    @torch.no_grad()
    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features (batch_size, rows, columns, dim), float32, of normalised pictures."""
        rows, columns = (side // patch for side, patch in zip(pixel_values.shape[2:], self.patch_size, strict=True))
        height, width = (min(side, 4 if self.neighbours else 8) for side in self.patch_size)
        pixels = nn.functional.adaptive_avg_pool2d(pixel_values.float(), (rows * height, columns * width))
        kernel = (height, width)
        if self.neighbours:
            pixels = nn.functional.pad(pixels, (width, width, height, height), mode="replicate")
            kernel = (3 * height, 3 * width)
        columns_of_pixels = nn.functional.unfold(pixels, kernel, stride=(height, width))
        return columns_of_pixels.transpose(1, 2).unflatten(1, (rows, columns))


def raw_patches(patch_size: tuple[int, int]) -> dict[str, RawPatches]:
    """The references, by name: the pixels of a patch, and of it and those around it."""
    return {"raw patches": RawPatches(patch_size), "raw 3 x 3 patches": RawPatches(patch_size, neighbours=True)}


class _Annotated(Dataset):
    """Pictures and maps of their pixels, as the processor makes them."""

    def __init__(self, pictures: ImageDataset, processor, names: list[str]):
        self.pictures, self.names = pictures, names
        self.transform = evaluation_transform(processor, pictures.num_channels)
        self.transform_map = annotation_transform(processor, pictures.num_channels)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.pictures.annotated(index, self.names)
        maps = {name: self.transform_map(item[name]) for name in self.names}
        return {"pixel_values": self.transform(item["image"])} | maps


def annotated_maps(train: ImageDataset, test: ImageDataset) -> list[str]:
    """Which of `"mask"` and `"depth"` both splits have."""
    return [name for name in (MASK, DEPTH) if name in train.annotations and name in test.annotations]


def evaluate_dense(
    encoders: Mapping[str, FeatureEncoder | RawPatches],
    train: ImageDataset,
    test: ImageDataset,
    processor,
    *,
    max_train: int = MAX_TRAIN,
    max_test: int = MAX_TEST,
    num_shown: int = 8,
    batch_size: int = 64,
    num_workers: int = 0,
    bf16: bool = False,
    seed: int = 0,
) -> tuple[dict, dict[str, np.ndarray]]:
    """
    Segmentation and depth by frozen patch features, of the first pictures of two splits that have masks or depths.

    * Probes see patches. A patch's target is the share of its pixels that each class has, and its mean depth; pixels
      that have none (`IGNORED`; depth 0) do not count. The linear layers are fitted on at most 32,768 patches, as many
      of every picture. Neighbours (cosine, k = 20, weights `exp(similarity / 0.07)`) are looked for among 4,096, for
      the patches of as many of the test pictures as have 16,384.
    * They are judged by pixels: the logits (k-NN: shares of the votes; depth: the numbers) of the patches are
      interpolated bilinearly to the picture's size.
    * Depth is told beside what its place in the picture tells: the linear layer has a bias for each place, fitted as
      one of what is left after the training pictures' means, of the features of each patch and of the depth at each
      pixel. So no feature gains by knowing where it is, and `depth_r2`, the share of the squared distance from that
      mean depth which is told, is 0 for a feature of no use.

    Args:
        encoders: By name; of encoders the tokens of the last block after the final norm are taken.
        train, test, processor: As for [`extract_features`].
        max_train, max_test, num_shown (`int`): Pictures, at most.
        bf16 (`bool`): Run the encoders in bfloat16 autocast.
        seed (`int`): Of the sample of patches.

    Returns:
        A `dict` for JSON: `num_train`, `num_test`, `classes`
        (their names), and `features`: by encoder, `knn_miou`, `linear_miou`, `knn_iou` and `linear_iou` (in percent;
        of each class of `classes`, None of one that is neither there nor told), `depth_r2` (percent), `depth_rmse` (in
        the unit of the depths) and `depth_delta1` (percent of the pixels within a factor of 1.25); those that the data
        allows, None of features that are not finite. And rows of pictures, for `label_rows`: by name uint8
        (num_shown, height, width, 3).

    Raises:
        ValueError: If the splits have neither masks nor depths in common.
    """
    names = annotated_maps(train, test)
    if not names:
        raise ValueError(f"{train.source} and {test.source} have neither masks nor depths.")
    train = train.select(np.arange(min(len(train), max_train)))
    test = test.select(np.arange(min(len(test), max_test)))
    loaders = [
        # With a generator of its own, as that of `transformed_pictures`.
        DataLoader(
            _Annotated(split, processor, names), batch_size, num_workers=num_workers, generator=torch.Generator()
        )
        for split in (train, test)
    ]
    classes = list(train.mask_names) if MASK in names else []
    mean_depth, samples = _sample(encoders, loaders[0], len(train), len(classes), bf16, seed)
    judges = {}
    for name in encoders:
        # A sample is given up for what is fitted on it.
        judges[name] = _Judge(samples.pop(name), len(classes), mean_depth, encoders[name].device)
    shown = []
    for batch in loaders[1]:
        wanted = min(num_shown - len(shown), len(batch["pixel_values"]))
        told = {
            name: judges[name].judge(_patches(encoder, batch["pixel_values"], bf16), batch, wanted)
            for name, encoder in encoders.items()
        }
        for row in range(wanted):
            one = {name: values[row] for name, values in batch.items()}
            shown.append(one | {("told", name): maps[row] for name, maps in told.items()})
    results = {"num_train": len(train), "num_test": len(test)} | ({"classes": classes} if classes else {})
    scores = {name: judge.scores() for name, judge in judges.items()}
    return results | {"features": scores}, _rows(shown, list(encoders), classes, mean_depth, processor)


def _patches(encoder, pixel_values: torch.Tensor, bf16: bool) -> torch.Tensor:
    with torch.autocast(encoder.device.type, torch.bfloat16) if bf16 else nullcontext():
        return encoder.patches(pixel_values)


def _tiles(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Maps (batch_size, height, width) cut into patches: (batch_size, num_patches, pixels of a patch)."""
    values = values.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
    return values.transpose(2, 3).flatten(3).flatten(1, 2)


def _shares(mask: torch.Tensor, grid: tuple[int, int], num_classes: int) -> torch.Tensor:
    """How often each class is in each patch, of a mask (batch_size, height, width): (batch_size, L, num_classes)."""
    tiles = _tiles(mask, grid).long()
    tiles = torch.where((tiles >= 0) & (tiles < num_classes), tiles, num_classes)
    counts = torch.zeros(*tiles.shape[:2], num_classes + 1).scatter_add_(2, tiles, torch.ones(()).expand(tiles.shape))
    return counts[..., :num_classes]


def _sample(encoders, batches, num_train: int, num_classes: int, bf16: bool, seed: int):
    """
    The training pictures' mean depth at each pixel; and of each encoder the mean of each patch's features, and some
    patches with what they show.
    """
    most = -(-_LINEAR_PATCHES // num_train)
    samples = {name: [] for name in encoders}
    means = dict.fromkeys(encoders, 0.0)
    # Encoders of one grid see the same patches.
    draws: dict[tuple[int, int], torch.Generator] = {}
    total, known = 0.0, 0
    for batch in batches:
        if DEPTH in batch:
            valid = batch[DEPTH] > 0
            total, known = total + (batch[DEPTH] * valid).sum(dim=0, dtype=torch.float64), known + valid.sum(dim=0)
        chosen = {}
        for name, encoder in encoders.items():
            patches = _patches(encoder, batch["pixel_values"], bf16)
            grid = tuple(patches.shape[1:3])
            if grid not in chosen:
                draw = draws.setdefault(grid, torch.Generator().manual_seed(seed))
                order = torch.rand(len(patches), grid[0] * grid[1], generator=draw).argsort(dim=1)[:, :most]
                chosen[grid] = order, _targets(batch, grid, num_classes, order)
            order, targets = chosen[grid]
            patches = patches.flatten(1, 2).cpu()
            means[name] = means[name] + patches.sum(dim=0) / num_train
            picked = patches.gather(1, order.unsqueeze(2).expand(-1, -1, patches.shape[2])).flatten(0, 1)
            samples[name].append(targets | {"features": picked, "grid": grid})
    mean_depth = None
    if DEPTH in batch:
        mean_depth = torch.where(known > 0, total / known.clamp(min=1), total.sum() / known.sum().clamp(min=1)).float()
    samples = {
        name: {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "grid"}
        | {"mean": means[name], "grid": parts[0]["grid"]}
        for name, parts in samples.items()
    }
    return mean_depth, samples


def _targets(batch, grid, num_classes: int, order: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the patches `order` (batch_size, n), flat: their places, how often each class is there, and depths."""
    targets = {"place": order.flatten()}
    if MASK in batch:
        counts = _shares(batch[MASK], grid, num_classes)
        targets["counts"] = counts.gather(1, order.unsqueeze(2).expand(-1, -1, num_classes)).flatten(0, 1)
    if DEPTH in batch:
        tiles = _tiles(batch[DEPTH], grid)
        number = (tiles > 0).sum(dim=2)
        depth = torch.where(number > 0, tiles.sum(dim=2) / number.clamp(min=1), 0.0)
        targets["depth"] = depth.gather(1, order).flatten()
    return targets


class _Judge:
    """Probes on the patches of one encoder, and how often they were right."""

    def __init__(self, sample: dict, num_classes: int, mean_depth: torch.Tensor | None, device: torch.device):
        self.num_classes, self.mean_depth, self.device = num_classes, mean_depth, device
        features = sample["features"].to(device)
        self.is_finite = bool(features.isfinite().all())
        self.confusion = {kind: Confusion(num_classes) for kind in ("knn", "linear")}
        # Of depths: squared distances from what is told, and from the mean; right within a factor of 1.25; all.
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.queries = _KNN_QUERIES
        if not self.is_finite:
            return
        if num_classes:
            counts = sample["counts"].to(device)
            labelled = counts.sum(dim=1) > 0
            shares = counts[labelled] / counts[labelled].sum(dim=1, keepdim=True)
            self.segmenter = fit_linear(features[labelled], shares, num_classes)
            order = torch.randperm(len(shares), generator=torch.Generator().manual_seed(0))[:_KNN_PATCHES].to(device)
            self.memory = features[labelled][order], shares[order]
        if mean_depth is not None:
            usual = _tiles(mean_depth[None], sample["grid"])[0].mean(dim=1)
            known = sample["depth"] > 0
            place = sample["place"][known]
            left = features[known.to(device)] - sample["mean"][place].to(device)
            self.depth_map = _ridge(left, (sample["depth"][known] - usual[place]).to(device))
            # The bias of each patch, which takes its mean features away.
            self.depth_bias = -nn.functional.linear(sample["mean"].to(device), self.depth_map).view(sample["grid"])

    @torch.no_grad()
    def judge(self, patches: torch.Tensor, batch: dict[str, torch.Tensor], num_shown: int) -> list[dict]:
        """Counts what is told of a batch; of the first pictures, returns the class and the depth of each pixel."""
        told = [{} for _ in range(num_shown)]
        flat = patches.flatten(0, 2)
        self.is_finite = self.is_finite and bool(flat.isfinite().all())
        if not self.is_finite:
            return told
        if MASK in batch:
            outputs = {"linear": nn.functional.linear(flat, *self.segmenter)}
            if self.queries > 0:
                self.queries -= len(flat)
                outputs["knn"] = knn_predict(*self.memory, flat, device=self.device)
            for kind, values in outputs.items():
                values = values.unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)
                for row, truth in enumerate(batch[MASK].long()):
                    # One picture's logits at a time.
                    found = upsample(values[row : row + 1], truth.shape)[0].argmax(dim=0).cpu()
                    self.confusion[kind].add(truth, found)
                    if kind == "linear" and row < num_shown:
                        told[row][MASK] = found
        if DEPTH in batch:
            values = nn.functional.linear(patches, self.depth_map).squeeze(3) + self.depth_bias
            usual, truth = self.mean_depth, batch[DEPTH]
            found, known = usual + upsample(values[:, None], truth.shape[1:])[:, 0].cpu(), truth > 0
            ratio = torch.maximum(found / truth, truth / found)
            self.sums += torch.stack(
                [
                    ((found - truth) * known).double().square().sum(),
                    ((usual - truth) * known).double().square().sum(),
                    ((ratio < 1.25) & (found > 0) & known).sum().double(),
                    known.sum().double(),
                ]
            )
            for row in range(num_shown):
                told[row][DEPTH] = found[row]
        return told

    def scores(self) -> dict:
        scores = {}
        for kind, confusion in self.confusion.items():
            if not self.num_classes:
                continue
            counted = confusion.scores()
            scores |= {f"{kind}_miou": counted["miou"], f"{kind}_iou": counted["iou"]}
        if self.mean_depth is not None:
            error, spread, right, number = self.sums.tolist()
            number = max(number, 1)
            scores |= {
                "depth_r2": 100 * (1 - error / max(spread, 1e-12)),
                "depth_rmse": (error / number) ** 0.5,
                "depth_delta1": 100 * right / number,
            }
        return scores if self.is_finite else dict.fromkeys(scores)


def _ridge(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Least squares without a bias, each feature shrunk by its own size: weights (1, dim)."""
    size = features.square().mean(dim=0).sqrt()
    size = torch.where(size > 1e-6, size, 1.0)
    features = features / size
    gram = features.T @ features / len(features) + _RIDGE * torch.eye(len(size), device=features.device)
    return (torch.linalg.solve(gram, features.T @ targets / len(features)) / size)[None]


def _rows(shown: list[dict], names: list[str], classes: list[str], mean_depth, processor) -> dict[str, np.ndarray]:
    """Rows of pictures: what is there, and what each encoder's linear layers tell."""
    pixel_values = torch.stack([one["pixel_values"] for one in shown])
    rows = {"picture": to_rgb(unnormalise(pixel_values, processor.image_mean, processor.image_std))}
    for kind, colour in ((MASK, class_colours(len(classes))), (DEPTH, _depth_colours(shown, mean_depth))):
        if kind not in shown[0]:
            continue
        rows[f"{kind}: truth"] = colour(torch.stack([one[kind] for one in shown]))
        for name in names:
            if all(kind in one["told", name] for one in shown):
                rows[f"{kind}: {name}"] = colour(torch.stack([one["told", name][kind] for one in shown]))
    return rows


def class_colours(num_classes: int):
    from matplotlib.colors import hsv_to_rgb

    # Hues by the golden ratio, so that neighbours differ. The first class, often the background, is dark; white is
    # what has none.
    hues = [hsv_to_rgb(((0.08 + 0.618 * k) % 1, 0.75, 0.95)) for k in range(num_classes - 1)]
    colours = np.array([[0.16] * 3, *hues, [1.0] * 3])

    def colour(mask: torch.Tensor) -> np.ndarray:
        mask = torch.where((mask >= 0) & (mask < num_classes), mask, num_classes).long()
        return (255 * colours[mask.numpy()]).round().astype(np.uint8)

    return colour


def _depth_colours(shown: list[dict], mean_depth: torch.Tensor | None):
    """The nearer than the mean at its place, the brighter."""
    from matplotlib import colormaps

    if mean_depth is None:
        return None
    truth = torch.stack([torch.where(one[DEPTH] > 0, one[DEPTH] - mean_depth, 0.0) for one in shown])
    reach = max(float(np.quantile(truth.abs().numpy(), 0.99)), 1e-6)

    def colour(depth: torch.Tensor) -> np.ndarray:
        nearness = torch.where(depth > 0, mean_depth - depth, 0.0) / (2 * reach)
        return (255 * colormaps["magma"]((0.5 + nearness).clamp(0, 1).numpy())[..., :3]).round().astype(np.uint8)

    return colour
